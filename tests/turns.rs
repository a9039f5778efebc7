//! Still pictures and clips by turns: which step is of which kind, the same on any number of ranks and after a resume; a
//! training of both; and what a step does not use.

use crate::footage::footage;
use crate::job::{Run, occlude, signal};
use crate::shard::{pictures, text};
use crate::step::{BUCKET, LR, stepper};
use crate::support::Outcome;
use libtest_mimic::Failed;
use occlude::data::decode::Limits;
use occlude::data::medium::Medium;
use occlude::data::mix::{self, Mix};
use occlude::data::order::Order;
use occlude::data::pack::{Options, pack};
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::fault::Result;
use occlude::feed::{Feed, Rows, Source};
use occlude::grid::Grid;
use occlude::method::{Batch, Features, Method, Reconstruction, Term};
use occlude::op::shuffle::Origin;
use occlude::part::mask::Mask;
use occlude::part::view::View;
use occlude::part::view::clip::Clip;
use occlude::part::weights::{Init, Slot, Table, Weights};
use occlude::part::work::Work;
use occlude::run::pace::{Ahead, Share};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    a_step_is_of_one_kind_and_kinds_keep_their_weights,
    each_source_keeps_its_own_epochs,
    where_a_training_begins_changes_no_turn,
    any_number_of_ranks_reads_the_same_pictures_and_clips,
    a_bad_sample_is_replaced_by_one_of_its_kind,
    two_ranks_train_as_one,
    a_resume_repeats_the_turns_to_the_bit,
    a_model_of_both_is_shown_and_probed_on_either,
    what_a_turn_does_not_use_stays_where_it_is,
    steps_ahead_take_turns_too,
];

/// Shards and weights of four sources, and their kinds: kinds 1 and 0 have weights 4 and 2.
fn sources() -> (Vec<(Vec<u64>, f64)>, [usize; 4]) {
    (vec![(vec![30, 20], 1.0), (vec![40], 1.5), (vec![11], 3.0), (vec![25, 6], 0.5)], [1, 0, 1, 0])
}

const STEP: u64 = 8;

fn order(seed: u64) -> Order {
    let (sources, kinds) = sources();
    Order::by_turns(&sources, &kinds, STEP, seed, 2)
}

/// The source of a sample.
fn source_of(sample: u64) -> usize {
    [50, 90, 101, 132].iter().position(|&end| sample < end).expect("a source")
}

fn a_step_is_of_one_kind_and_kinds_keep_their_weights() -> Outcome {
    let (order, (_, kinds)) = (order(3), sources());
    let (mut turns, mut shares) = (Vec::new(), [0; 4]);
    for step in 0..4096 {
        let samples: Vec<u64> = (step * STEP..(step + 1) * STEP).map(|position| order.at(position).1).collect();
        let found: BTreeSet<usize> = samples.iter().map(|&sample| kinds[source_of(sample)]).collect();
        assert_eq!(found.len(), 1, "step {step} is of kinds {found:?}");
        turns.push(*found.first().expect("a kind"));
        samples.iter().for_each(|&sample| shares[source_of(sample)] += 1);
    }
    let ones = turns.iter().sum::<usize>();
    assert!((2730..=2731).contains(&ones), "two thirds of 4096: {ones}");
    let runs = turns.windows(2).filter(|two| two[0] != two[1]).count();
    assert!((1600..2050).contains(&runs), "turns in random places change 1820 times, not {runs}");
    // Of the 21,846 positions of kind 1 a quarter and three; of the 10,922 of kind 0 three quarters and a quarter.
    for (source, wanted) in [5461, 8192, 16384, 2731].into_iter().enumerate() {
        assert!((shares[source] as i64 - wanted as i64).abs() < 120, "source {source}: {shares:?}");
    }
    let other = Order::by_turns(&sources().0, &kinds, STEP, 4, 2);
    let moved = (0..4096).filter(|step| kinds[source_of(other.at(step * STEP).1)] != turns[*step as usize]).count();
    assert!(moved > 1000, "another seed has other turns");
    Ok(())
}

fn each_source_keeps_its_own_epochs() -> Outcome {
    let order = order(5);
    let mut seen: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    (0..600 * STEP).for_each(|position| {
        let (epoch, sample) = order.at(position);
        seen.entry(sample).or_default().push(epoch);
    });
    assert_eq!(seen.len(), 132, "every sample comes");
    for (sample, mut epochs) in seen {
        epochs.sort();
        assert_eq!(epochs, (0..epochs.len() as u64).collect::<Vec<_>>(), "sample {sample} once an epoch");
    }
    Ok(())
}

fn where_a_training_begins_changes_no_turn() -> Outcome {
    let through = order(7);
    let whole: Vec<_> = (0..9000 * STEP).map(|position| through.at(position)).collect();
    for step in [0, 1, 17, 4095, 4096, 8191, 8999] {
        let fresh = order(7);
        for position in step * STEP..(step + 1) * STEP {
            assert_eq!(fresh.at(position), whole[position as usize], "position {position}");
        }
    }
    // One kind is an ordinary mixture.
    let (sources, _) = sources();
    let (plain, same) = (Order::mixed(&sources, 7, 2), Order::by_turns(&sources, &[0; 4], STEP, 7, 2));
    assert!((0..5000).all(|position| plain.at(position) == same.at(position)));
    Ok(())
}

/// Pictures of 2 classes, packed as `stills`, and 12 videos, packed as `clips`.
fn make(folder: &Path) -> std::result::Result<(), Failed> {
    pictures(&folder.join("pictures"), 2, 15)?;
    footage(&folder.join("videos"))?;
    for (from, to) in [("pictures", "stills"), ("videos", "clips")] {
        let options = Options { name: Some(to.into()), samples_per_shard: 8, ..Options::default() };
        pack(&text(&folder.join(from)), &text(&folder.join(to)), &options)?;
    }
    Ok(())
}

const GRID: Grid = Grid { frames: 2, rows: 2, cols: 3, channels: 3, patch_frames: 2, patch: 8 };

fn source(folder: &Path) -> Result<Source> {
    let of = |name: &str, weight| mix::Source { url: text(&folder.join(name)), weight };
    let set = Mix::open(&[of("stills", 1.0), of("clips", 1.0)], Duration::from_secs(1))?;
    let clip: Clip = serde_json::from_value(json!({"sampling": {"stride": 2}})).expect("numbers");
    let view = View { clip: Some(clip), still: Some(Box::default()), ..View::default() };
    Ok(Source {
        stills: set.sets().iter().map(|set| set.moving().map(|moving| !moving)).collect::<Result<_>>()?,
        set: Arc::new(set),
        cache: None,
        captions: None,
        medium: Medium::Picture,
        view: Arc::new(move |picture, id, epoch, repeats, out| {
            view.train_all(&GRID, picture, 11, id, epoch, repeats, out)
        }),
        shape: GRID.pixels(),
        limits: Limits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 16,
        max_bad_share: 0.2,
    })
}

fn feed(source: &Source, batch: u64, rank: usize, world: usize, steps: std::ops::Range<u64>) -> Result<Vec<Rows>> {
    let kinds: Vec<usize> = source.stills.iter().map(|&still| usize::from(still)).collect();
    let order = Order::by_turns(&source.set.sizes(), &kinds, batch, 11, 2);
    let feed = Feed::train(source.clone(), order, batch, rank, world, steps)?;
    feed.map(|rows| rows.map(|rows| Rows { waited: Duration::ZERO, ..rows })).collect()
}

fn any_number_of_ranks_reads_the_same_pictures_and_clips() -> Outcome {
    let folder = tempfile::tempdir()?;
    make(folder.path())?;
    let source = source(folder.path())?;
    assert_eq!(source.stills, [true, false]);
    let one = feed(&source, 6, 0, 1, 0..14)?;
    let frames: Vec<i64> = one.iter().map(|rows| rows.pixels.size()[2]).collect();
    assert_eq!(frames.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([1, 4]), "{frames:?}");
    let all = |index: u64| source.set.id(index);
    let stills: BTreeSet<u64> = (0..30).map(all).collect::<Result<_>>()?;
    for rows in &one {
        let still = rows.pixels.size()[2] == 1;
        assert_eq!(rows.pixels.size(), [6, 3, if still { 1 } else { 4 }, 16, 24]);
        assert!(rows.ids.iter().all(|id| stills.contains(id) == still), "step {} is of one kind", rows.step);
    }
    for world in [2, 3, 4] {
        let ranks: Vec<Vec<Rows>> =
            (0..world).map(|rank| feed(&source, 6, rank, world, 0..14)).collect::<Result<_>>()?;
        for (step, whole) in one.iter().enumerate() {
            let parts: Vec<&Tensor> = ranks.iter().map(|rank| &rank[step].pixels).collect();
            assert!(whole.pixels == Tensor::cat(&parts, 0), "step {step} on {world} ranks");
            assert!(whole.ids == ranks.iter().flat_map(|rank| rank[step].ids.clone()).collect::<Vec<_>>());
        }
    }
    assert!(feed(&source, 6, 0, 1, 5..14)? == one[5..], "a feed goes on where another stopped");
    Ok(())
}

fn a_bad_sample_is_replaced_by_one_of_its_kind() -> Outcome {
    let folder = tempfile::tempdir()?;
    make(folder.path())?;
    let before = source(folder.path())?;
    let lost: Vec<u64> = [2, 33].into_iter().map(|index| before.set.id(index)).collect::<Result<_>>()?;
    for index in [2, 33] {
        let (shard, row) = before.set.sample(index)?;
        let member = shard.wanted(row, Medium::Picture.extensions())?;
        let mut tar = std::fs::read(shard.name())?;
        tar[member.offset as usize..member.end() as usize].fill(7);
        std::fs::write(shard.name(), tar)?;
    }
    let after = feed(&source(folder.path())?, 6, 0, 1, 0..24)?;
    let stills: BTreeSet<u64> = (0..30).map(|index| before.set.id(index)).collect::<Result<_>>()?;
    for rows in &after {
        let still = rows.pixels.size()[2] == 1;
        assert!(rows.ids.len() == 6 && rows.ids.iter().all(|id| stills.contains(id) == still && !lost.contains(id)));
    }
    Ok(())
}

const STEPS: u64 = 40;

/// Pictures and clips that all trainings here read.
pub fn shared() -> &'static Path {
    static MADE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
        let folder = tempfile::tempdir().expect("a folder");
        make(folder.path()).expect("pictures and clips");
        folder
    });
    MADE.path()
}

pub fn config() -> Value {
    let shape = json!({"width": 16, "depth": 1, "heads": 2});
    let of = |name: &str, weight: f64| json!({"url": shared().join(name), "weight": weight});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"channels": 1, "frames": 4, "patch_frames": 2, "height": 16, "width": 16, "patch": 4},
        "view": {"clip": {"sampling": {"stride": 2}, "repeats": 2}, "still": {"flip": 0.0}},
        "method": {"omnimae": {"encoder": shape, "decoder": shape}},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": [of("stills", 2.0), of("clips", 1.0)], "threads": 1},
        "train": {"steps": STEPS, "global_batch": 10, "seed": 5},
        "checkpoint": {"every_steps": 10},
        "log": {"pictures_every_steps": STEPS, "every_s": 1000},
    })
}

/// A training alone, not disturbed.
fn alone() -> &'static Run {
    static RUN: LazyLock<Run> = LazyLock::new(|| {
        let run = Run::new(&config());
        run.finish(0, &[]);
        run
    });
    &RUN
}

/// The same losses, up to the order of summation.
fn agrees(run: &Run, what: &str) {
    for (ours, theirs) in run.lines().iter().zip(alone().lines()) {
        let off = (ours.loss / theirs.loss - 1.0).abs();
        assert!(off < 1e-4, "{what}, step {}: {} against {}", theirs.step, ours.loss, theirs.loss);
    }
    assert_eq!(run.lines().len(), STEPS as usize);
}

fn two_ranks_train_as_one() -> Outcome {
    let two = Run::new(&config());
    two.finish(2, &[]);
    agrees(&two, "two ranks");
    Ok(())
}

fn a_resume_repeats_the_turns_to_the_bit() -> Outcome {
    for (first, then) in [(0, 0), (2, 0)] {
        let run = Run::new(&config());
        let mut job = run.start(first, &[]);
        job.reach(12);
        signal(if first == 0 { job.pid() } else { job.rank(0) }, Signal::USR1);
        let end = job.end(30);
        assert_eq!(end.code, 75, "{}", end.told);
        assert!(run.saved().last() < Some(&STEPS), "stopped too late to show anything");
        run.finish(then, &[]);
        if first == then {
            run.same_as(alone())?;
        } else {
            agrees(&run, "begun on two ranks");
        }
    }
    Ok(())
}

fn a_model_of_both_is_shown_and_probed_on_either() -> Outcome {
    let run = alone();
    let sheet = image::open(run.folder().join(format!("pictures/step-{STEPS:08}-reconstruction.png")))?;
    assert!(sheet.height() >= 8 * 16, "four pictures and four clips");
    let folder = run.folder();
    let checkpoint = text(&folder);
    let said = |words: &[&str]| -> std::result::Result<String, Failed> {
        let output = occlude(words).output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let inputs = ["pictures", "videos"].map(|name| text(&first_file(&shared().join(name))));
    let out = text(&folder.join("shown"));
    said(&["reconstruct", "--checkpoint", &checkpoint, "--input", &inputs[0], &inputs[1], "--out", &out])?;
    assert_eq!(std::fs::read_dir(&out)?.count(), 2);
    for kind in ["stills", "clips"] {
        let set = text(&shared().join(kind));
        let told =
            said(&["evaluate", "--checkpoint", &checkpoint, "--train", &set, "--test", &set, "--protocol", "knn"])?;
        let told: Value = serde_json::from_str(told.lines().last().expect("a line"))?;
        assert!(told["top1"].as_f64().or(told["accuracy"].as_f64()).is_some(), "{kind}: {told}");
    }
    Ok(())
}

fn first_file(folder: &Path) -> std::path::PathBuf {
    let mut inside: Vec<_> = std::fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path()).collect();
    inside.sort();
    if inside[0].is_dir() { first_file(&inside[0]) } else { inside[0].clone() }
}

/// A tensor that both kinds use, and one for each.
struct Heads {
    grid: Grid,
    table: Table,
    slots: [Slot; 3],
}

impl Heads {
    fn new() -> Heads {
        let mut table = Table::default();
        let slots = ["both", "clips", "stills"].map(|name| table.add(name, &[3, 5], Init::Normal(1.0)));
        Heads { grid: GRID, table, slots }
    }
}

impl Method for Heads {
    fn grid(&self) -> &Grid {
        &self.grid
    }
    fn table(&self) -> &Table {
        &self.table
    }
    fn recompute(&mut self) {}
    fn name(&self) -> &'static str {
        "heads"
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        vec![("heads", samples as f64)]
    }
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let own = self.slots[if batch.pixels.size()[2] == 1 { 2 } else { 1 }];
        let sum = (&w[self.slots[0]] * &w[own]).square().sum(Kind::Float) * batch.pixels.size()[0] as f64;
        Ok(vec![Term { name: "heads", sum }])
    }
    fn work(&self, _: u64) -> Work {
        unreachable!("nobody times it")
    }
    fn mask(&self, _: &Batch) -> Mask {
        unreachable!("it hides nothing")
    }
    fn normalised(&self, _: &Batch) -> Result<Tensor> {
        unreachable!("nobody dumps it")
    }
    fn features(&self, _: &Weights, _: &Batch) -> Result<Features> {
        unreachable!("nobody probes it")
    }
    fn reconstruct(&self, _: &Weights, _: &Batch) -> Result<Reconstruction> {
        unreachable!("nobody draws it")
    }
}

/// A rank's share of a step of pictures or of clips.
fn load(step: u64, still: bool, world: &dyn World) -> Share {
    let rows = occlude::data::order::rows(6, world.rank(), world.size());
    let origins: Vec<Origin> = rows.map(|id| Origin { id, epoch: step, repeat: 0 }).collect();
    let shape = [origins.len() as i64, 3, if still { 1 } else { 4 }, 16, 24];
    let pixels = Tensor::full(shape, (step * 9 % 256) as i64, (Kind::Uint8, Device::Cpu));
    Share { pixels, origins, text: None, valid: None, seed: 5, micro: 2 }
}

/// All that a training keeps of one tensor.
fn kept(stepper: &occlude::run::step::Stepper, index: usize) -> Vec<Tensor> {
    let flat = &stepper.flat;
    let buffers = [&flat.master, &flat.first, &flat.second].map(|buffer| flat.part(buffer, index).copy());
    buffers.into_iter().chain([flat.steps.get(index as i64).copy()]).collect()
}

fn what_a_turn_does_not_use_stays_where_it_is() -> Outcome {
    let turns = [true, false, true, true, false];
    let run = |world: Arc<dyn World>| -> Vec<Tensor> {
        let mut stepper = stepper(Heads::new(), world.clone(), Kind::Float, BUCKET);
        for (step, still) in (0..).zip(turns) {
            let [both, own, other] = [0, if still { 2 } else { 1 }, if still { 1 } else { 2 }];
            let before: Vec<Vec<Tensor>> = (0..3).map(|index| kept(&stepper, index)).collect();
            let batches = load(step, still, world.as_ref()).batches(Device::Cpu).expect("batches");
            stepper.step(&batches, LR, |_, _| Ok(())).expect("a step");
            assert!(kept(&stepper, other) == before[other], "step {step}: neither decayed nor moved");
            for index in [both, own] {
                let now = kept(&stepper, index);
                assert!(now.iter().zip(&before[index]).all(|(now, before)| now != before), "step {step} moves {index}");
            }
        }
        (0..3).flat_map(|index| kept(&stepper, index)).collect()
    };
    let one = run(Arc::new(Solo::new(Device::Cpu)));
    for ranks in [2, 3] {
        for two in threads(ranks, run) {
            let close = |(a, b): (&Tensor, &Tensor)| a.allclose(b, 1e-5, 1e-6, false);
            assert!(one.iter().zip(&two).all(close), "{ranks} ranks end elsewhere than one");
        }
    }
    Ok(())
}

/// Ahead of the device a step's shapes may take turns; what each finds is its own.
fn steps_ahead_take_turns_too() -> Outcome {
    let turns = [true, false, false, true, false, true];
    for ranks in [1, 2] {
        threads(ranks, |world| {
            let mut watched = stepper(Heads::new(), world.clone(), Kind::Float, BUCKET);
            let mut hurried = stepper(Heads::new(), world.clone(), Kind::Float, BUCKET);
            let mut ahead = Ahead::new(6, &hurried, &world).expect("a pace");
            let (mut losses, mut told) = (Vec::new(), Vec::new());
            for (step, still) in (0..).zip(turns) {
                let share = load(step, still, world.as_ref());
                let batches = share.batches(Device::Cpu).expect("batches");
                losses.push(watched.step(&batches, LR, |_, _| Ok(())).expect("a step").loss);
                told.extend(ahead.step(&mut hurried, &share, LR).expect("a step").map(|outcome| outcome.loss));
            }
            told.extend(ahead.settle(&hurried).expect("the last").map(|outcome| outcome.loss));
            assert_eq!(told.len(), losses.len());
            assert!(told.iter().zip(&losses).all(|(a, b)| (a / b - 1.0).abs() < 1e-5), "{told:?} for {losses:?}");
            let off = |index| (&kept(&watched, index)[0] - &kept(&hurried, index)[0]).abs().max().double_value(&[]);
            assert!((0..3).all(|index| off(index) < 1e-5));
        });
    }
    Ok(())
}
