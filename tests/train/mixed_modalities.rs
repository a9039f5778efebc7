//! Tests of alternating images and clips: the modality of each step, the same on any number of ranks and after
//! resuming; a training on both; and parameters that a step does not use.

use crate::data::shard::write_images;
use crate::data::video_pipeline::write_videos;
use crate::support::training_job::{Run, occlude_command, send_signal};
use crate::support::{Outcome, path_text};
use crate::train::step::{BUCKET, LR, stepper};
use libtest_mimic::Failed;
use occlude::data::decode::ImageLimits;
use occlude::data::mixture::{Mixture, MixtureSource};
use occlude::data::modality::Modality;
use occlude::data::order::SampleOrder;
use occlude::data::pack::{PackOptions, pack};
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::error::Result;
use occlude::grid::{Grid, InputConfig};
use occlude::loader::{DataLoader, Labels, LoadedRows, LoaderOptions};
use occlude::method::{Batch, Features, LossOutput, Method, Model, Per, Step};
use occlude::op::shuffle::SampleKey;
use occlude::part::batch::Side;
use occlude::part::cost::ModelCost;
use occlude::part::encoder::EncodeOptions;
use occlude::part::params::{Init, ParamId, ParamSpecs};
use occlude::part::patchify::Patchify;
use occlude::train::step_mode::{LocalBatch, StepPipeline};
use occlude::view::clip::ClipConfig;
use occlude::view::{View, ViewKey};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    each_step_has_one_modality_in_the_configured_proportion,
    each_source_keeps_its_own_epochs,
    the_start_step_does_not_change_the_modality_of_a_step,
    any_number_of_ranks_reads_the_same_images_and_clips,
    a_corrupt_sample_is_replaced_by_one_of_its_modality,
    two_ranks_train_as_one,
    resuming_repeats_the_modalities_bit_for_bit,
    a_mixed_model_reconstructs_and_evaluates_both_modalities,
    parameters_unused_by_a_step_do_not_move,
    pipelined_steps_alternate_modalities,
];

/// Returns shards and weights of four sources, and their modalities: modalities 1 and 0 have weights 4 and 2.
fn sources() -> (Vec<(Vec<u64>, f64)>, [usize; 4]) {
    (vec![(vec![30, 20], 1.0), (vec![40], 1.5), (vec![11], 3.0), (vec![25, 6], 0.5)], [1, 0, 1, 0])
}

const STEP: u64 = 8;

fn order(seed: u64) -> SampleOrder {
    let (sources, kinds) = sources();
    SampleOrder::alternating(&sources, &kinds, STEP, seed, 2)
}

/// Returns the source of a sample.
fn source_of(sample: u64) -> usize {
    [50, 90, 101, 132].iter().position(|&end| sample < end).expect("a source")
}

fn each_step_has_one_modality_in_the_configured_proportion() -> Outcome {
    let order = order(3);
    let (_, kinds) = sources();
    let mut modalities = Vec::new();
    let mut shares = [0; 4];
    for step in 0..4096 {
        let samples: Vec<u64> =
            (step * STEP..(step + 1) * STEP).map(|position| order.epoch_and_sample(position).1).collect();
        let found: BTreeSet<usize> = samples.iter().map(|&sample| kinds[source_of(sample)]).collect();
        assert_eq!(found.len(), 1, "step {step} has modalities {found:?}");
        modalities.push(*found.first().expect("a kind"));
        samples.iter().for_each(|&sample| shares[source_of(sample)] += 1);
    }
    let ones = modalities.iter().sum::<usize>();
    assert!((2730..=2731).contains(&ones), "two thirds of 4096: {ones}");
    let runs = modalities.windows(2).filter(|two| two[0] != two[1]).count();
    assert!((1600..2050).contains(&runs), "random modalities change 1820 times, not {runs}");
    // The sources have a quarter and three quarters of the 21,846 positions of modality 1; of the 10,922 of modality 0
    // three quarters and a quarter.
    for (source, expected) in [5461, 8192, 16384, 2731].into_iter().enumerate() {
        assert!((shares[source] as i64 - expected as i64).abs() < 120, "source {source}: {shares:?}");
    }
    let other = SampleOrder::alternating(&sources().0, &kinds, STEP, 4, 2);
    let moved = (0..4096)
        .filter(|step| kinds[source_of(other.epoch_and_sample(step * STEP).1)] != modalities[*step as usize])
        .count();
    assert!(moved > 1000, "another seed gives other modalities");
    Ok(())
}

fn each_source_keeps_its_own_epochs() -> Outcome {
    let order = order(5);
    let mut visible: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    (0..600 * STEP).for_each(|position| {
        let (epoch, sample) = order.epoch_and_sample(position);
        visible.entry(sample).or_default().push(epoch);
    });
    assert_eq!(visible.len(), 132, "every sample is read");
    for (sample, mut epochs) in visible {
        epochs.sort();
        assert_eq!(epochs, (0..epochs.len() as u64).collect::<Vec<_>>(), "sample {sample} once per epoch");
    }
    Ok(())
}

fn the_start_step_does_not_change_the_modality_of_a_step() -> Outcome {
    let through = order(7);
    let full: Vec<_> = (0..9000 * STEP).map(|position| through.epoch_and_sample(position)).collect();
    for step in [0, 1, 17, 4095, 4096, 8191, 8999] {
        let fresh = order(7);
        for position in step * STEP..(step + 1) * STEP {
            assert_eq!(fresh.epoch_and_sample(position), full[position as usize], "position {position}");
        }
    }
    // One modality is an ordinary mixture.
    let (sources, _) = sources();
    let plain = SampleOrder::with_sources(&sources, 7, 2);
    let same = SampleOrder::alternating(&sources, &[0; 4], STEP, 7, 2);
    assert!((0..5000).all(|position| plain.epoch_and_sample(position) == same.epoch_and_sample(position)));
    Ok(())
}

/// Packs images of 2 classes as `stills`, and 12 videos as `clips`.
fn make(folder: &Path) -> std::result::Result<(), Failed> {
    write_images(&folder.join("pictures"), 2, 15)?;
    write_videos(&folder.join("videos"))?;
    for (from, to) in [("pictures", "stills"), ("videos", "clips")] {
        let options = PackOptions { name: Some(to.into()), samples_per_shard: 8, ..PackOptions::default() };
        pack(&path_text(folder.join(from)), &path_text(folder.join(to)), &options)?;
    }
    Ok(())
}

const GRID: Grid = Grid { frames: 2, rows: 2, cols: 3, channels: 3, patch_frames: 2, patch: 8 };

fn source(folder: &Path) -> Result<LoaderOptions> {
    let mixture_source = |name: &str, weight| MixtureSource { url: path_text(folder.join(name)), weight };
    let set = Mixture::open(&[mixture_source("stills", 1.0), mixture_source("clips", 1.0)], Duration::from_secs(1))?;
    let clip: ClipConfig = serde_json::from_value(json!({"sampling": {"stride": 2}})).expect("numbers");
    let view = View { clip: Some(clip), image: Some(Box::default()), ..View::default() };
    Ok(LoaderOptions {
        labels: Labels::Ignored,
        single_frame_sets: set
            .sets()
            .iter()
            .map(|set| set.is_video().map(|is_video| !is_video))
            .collect::<Result<_>>()?,
        mixture: Arc::new(set),
        cache: None,
        tokenizer: None,
        modality: Modality::Image,
        view: Arc::new(move |image, id, epoch, repeats, out| {
            view.train_views(&GRID, image, ViewKey { seed: 11, id, epoch }, repeats, out)
        }),
        shape: GRID.pixel_shape(),
        limits: ImageLimits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 16,
        max_corrupt_fraction: 0.2,
    })
}

fn feed(
    source: &LoaderOptions,
    batch: u64,
    rank: usize,
    world: usize,
    steps: std::ops::Range<u64>,
) -> Result<Vec<LoadedRows>> {
    let kinds: Vec<usize> = source.single_frame_sets.iter().map(|&is_image| usize::from(is_image)).collect();
    let order = SampleOrder::alternating(&source.mixture.weighted_sizes(), &kinds, batch, 11, 2);
    let feed = DataLoader::for_training(source.clone(), order, batch, rank, world, steps)?;
    feed.map(|rows| rows.map(|rows| LoadedRows { wait_time: Duration::ZERO, ..rows })).collect()
}

fn any_number_of_ranks_reads_the_same_images_and_clips() -> Outcome {
    let folder = tempfile::tempdir()?;
    make(folder.path())?;
    let source = source(folder.path())?;
    assert_eq!(source.single_frame_sets, [true, false]);
    let one = feed(&source, 6, 0, 1, 0..14)?;
    let frames: Vec<i64> = one.iter().map(|rows| rows.pixels.size()[2]).collect();
    assert_eq!(frames.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([1, 4]), "{frames:?}");
    let all = |index: u64| source.mixture.id(index);
    let stills: BTreeSet<u64> = (0..30).map(all).collect::<Result<_>>()?;
    for rows in &one {
        let is_image = rows.pixels.size()[2] == 1;
        assert_eq!(rows.pixels.size(), [6, 3, if is_image { 1 } else { 4 }, 16, 24]);
        assert!(rows.ids.iter().all(|id| stills.contains(id) == is_image), "step {} has one modality", rows.step);
    }
    for world in [2, 3, 4] {
        let ranks: Vec<Vec<LoadedRows>> =
            (0..world).map(|rank| feed(&source, 6, rank, world, 0..14)).collect::<Result<_>>()?;
        for (step, full) in one.iter().enumerate() {
            let parts: Vec<&Tensor> = ranks.iter().map(|rank| &rank[step].pixels).collect();
            assert!(full.pixels == Tensor::cat(&parts, 0), "step {step} on {world} ranks");
            assert!(full.ids == ranks.iter().flat_map(|rank| rank[step].ids.clone()).collect::<Vec<_>>());
        }
    }
    assert!(feed(&source, 6, 0, 1, 5..14)? == one[5..], "a loader resumes where another stopped");
    Ok(())
}

fn a_corrupt_sample_is_replaced_by_one_of_its_modality() -> Outcome {
    let folder = tempfile::tempdir()?;
    make(folder.path())?;
    let before = source(folder.path())?;
    let lost: Vec<u64> = [2, 33].into_iter().map(|index| before.mixture.id(index)).collect::<Result<_>>()?;
    for index in [2, 33] {
        let (shard, row) = before.mixture.find_sample(index)?;
        let member = shard.require_member(row, Modality::Image.extensions())?;
        let mut tar = std::fs::read(shard.name())?;
        tar[member.offset as usize..member.end() as usize].fill(7);
        std::fs::write(shard.name(), tar)?;
    }
    let after = feed(&source(folder.path())?, 6, 0, 1, 0..24)?;
    let stills: BTreeSet<u64> = (0..30).map(|index| before.mixture.id(index)).collect::<Result<_>>()?;
    for rows in &after {
        let is_image = rows.pixels.size()[2] == 1;
        assert!(rows.ids.len() == 6 && rows.ids.iter().all(|id| stills.contains(id) == is_image && !lost.contains(id)));
    }
    Ok(())
}

const STEPS: u64 = 40;

/// Returns the images and clips that all trainings here read.
pub fn shared_data() -> &'static Path {
    static MADE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
        let folder = tempfile::tempdir().expect("a folder");
        make(folder.path()).expect("images and clips");
        folder
    });
    MADE.path()
}

pub fn config() -> Value {
    let shape = json!({"width": 16, "depth": 1, "heads": 2});
    let weighted_set = |name: &str, weight: f64| json!({"url": shared_data().join(name), "weight": weight});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"channels": 1, "frames": 4, "patch_frames": 2, "height": 16, "width": 16, "patch": 4},
        "view": {"clip": {"sampling": {"stride": 2}, "repeats": 2}, "image": {"hflip": 0.0}},
        "method": {"omnimae": {"encoder": shape, "decoder": shape}},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": [weighted_set("stills", 2.0), weighted_set("clips", 1.0)], "threads": 1},
        "train": {"steps": STEPS, "global_batch": 10, "seed": 5},
        "checkpoint": {"every_steps": 10},
        "log": {"image_interval_steps": STEPS, "interval_s": 1000},
    })
}

/// Returns an uninterrupted training in a single process.
fn single_process_run() -> &'static Run {
    static RUN: LazyLock<Run> = LazyLock::new(|| {
        let run = Run::new(&config());
        run.finish(0, &[]);
        run
    });
    &RUN
}

/// Asserts the same losses, up to the order of summation.
fn assert_matches(run: &Run, label: &str) {
    for (ours, reference) in run.lines().iter().zip(single_process_run().lines()) {
        let difference = (ours.loss / reference.loss - 1.0).abs();
        assert!(difference < 1e-4, "{label}, step {}: {} against {}", reference.step, ours.loss, reference.loss);
    }
    assert_eq!(run.lines().len(), STEPS as usize);
}

fn two_ranks_train_as_one() -> Outcome {
    let two = Run::new(&config());
    two.finish(2, &[]);
    assert_matches(&two, "two ranks");
    Ok(())
}

fn resuming_repeats_the_modalities_bit_for_bit() -> Outcome {
    for (first, then) in [(0, 0), (2, 0)] {
        let run = Run::new(&config());
        let mut job = run.start(first, &[]);
        job.wait_for_step(12);
        send_signal(if first == 0 { job.pid() } else { job.rank(0) }, Signal::USR1);
        let end = job.end(30);
        assert_eq!(end.code, 75, "{}", end.stderr);
        assert!(run.saved().last() < Some(&STEPS), "stopped too late for this test");
        run.finish(then, &[]);
        if first == then {
            run.assert_same_as(single_process_run())?;
        } else {
            assert_matches(&run, "begun on two ranks");
        }
    }
    Ok(())
}

fn a_mixed_model_reconstructs_and_evaluates_both_modalities() -> Outcome {
    let run = single_process_run();
    let sheet = image::open(run.folder().join(format!("pictures/step-{STEPS:08}-reconstruction.png")))?;
    assert!(sheet.height() >= 8 * 16, "four images and four clips");
    let folder = run.folder();
    let checkpoint = path_text(&folder);
    let printed = |words: &[&str]| -> std::result::Result<String, Failed> {
        let output = occlude_command(words).output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let inputs = ["pictures", "videos"].map(|name| path_text(first_file(&shared_data().join(name))));
    let out = path_text(folder.join("shown"));
    printed(&["reconstruct", "--checkpoint", &checkpoint, "--input", &inputs[0], &inputs[1], "--out", &out])?;
    assert_eq!(std::fs::read_dir(&out)?.count(), 2);
    for kind in ["stills", "clips"] {
        let set = path_text(shared_data().join(kind));
        let text =
            printed(&["evaluate", "--checkpoint", &checkpoint, "--train", &set, "--test", &set, "--protocol", "knn"])?;
        let text: Value = serde_json::from_str(text.lines().last().expect("a line"))?;
        assert!(text["top1"].as_f64().or(text["accuracy"].as_f64()).is_some(), "{kind}: {text}");
    }
    Ok(())
}

fn first_file(folder: &Path) -> std::path::PathBuf {
    let mut inside: Vec<_> = std::fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path()).collect();
    inside.sort();
    if inside[0].is_dir() { first_file(&inside[0]) } else { inside[0].clone() }
}

/// A tensor that both modalities use, and one for each.
struct Heads {
    patchify: Patchify,
    params: ParamSpecs,
    ids: [ParamId; 3],
}

impl Heads {
    fn new() -> Heads {
        let mut params = ParamSpecs::default();
        let ids = ["both", "clips", "stills"].map(|name| params.add(name, &[3, 5], Init::Normal(1.0)));
        let input = InputConfig {
            channels: 3,
            frames: 4,
            height: 16,
            width: 24,
            patch: 8,
            patch_frames: 2,
            mean: Vec::new(),
            std: Vec::new(),
        };
        Heads { patchify: Patchify::new(&input).expect("an input"), params, ids }
    }
}

impl Model for Heads {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    fn cost(&self, _: &Grid, _: i64) -> ModelCost {
        unreachable!("it is not timed")
    }
    fn set_recompute(&mut self, _: bool) {
        unreachable!("it has no blocks")
    }
    fn depth(&self) -> usize {
        0
    }
    fn encode(&self, _: &Step, _: &Batch, _: EncodeOptions) -> Result<Features> {
        unreachable!("it is not probed")
    }
}

impl Method for Heads {
    fn model(&self) -> &dyn Model {
        self
    }
    fn model_mut(&mut self) -> &mut dyn Model {
        self
    }
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let w = step.weights;
        let head = self.ids[if batch.view().size()[2] == 1 { 2 } else { 1 }];
        let sum = (&w[self.ids[0]] * &w[head]).square().sum(Kind::Float) * batch.size() as f64;
        Ok(LossOutput::term("heads", sum, Per::Sample))
    }
}

/// Returns the local batch of a rank for a step of images or of clips.
fn load(step: u64, is_image: bool, world: &dyn World) -> LocalBatch {
    let rows = occlude::data::order::rank_rows(6, world.rank(), world.size());
    let keys: Vec<SampleKey> = rows.map(|id| SampleKey { id, epoch: step, repeat: 0 }).collect();
    let shape = [keys.len() as i64, 3, if is_image { 1 } else { 4 }, 16, 24];
    let pixels = Tensor::full(shape, (step * 9 % 256) as i64, (Kind::Uint8, Device::Cpu));
    LocalBatch { views: vec![pixels], keys, side: Side::default(), seed: 5, micro_batch: 2 }
}

/// Returns everything that a training keeps of one tensor.
fn kept_state(stepper: &occlude::train::step::Stepper, index: usize) -> Vec<Tensor> {
    let flat = &stepper.flat;
    let buffers = [&flat.master, &flat.exp_avg, &flat.exp_avg_sq].map(|buffer| flat.param_view(buffer, index).copy());
    buffers.into_iter().chain([flat.steps.get(index as i64).copy()]).collect()
}

fn parameters_unused_by_a_step_do_not_move() -> Outcome {
    let are_images = [true, false, true, true, false];
    let run = |world: Arc<dyn World>| -> Vec<Tensor> {
        let mut stepper = stepper(Heads::new(), world.clone(), Kind::Float, BUCKET);
        for (step, is_image) in (0..).zip(are_images) {
            let [both, local, other] = [0, if is_image { 2 } else { 1 }, if is_image { 1 } else { 2 }];
            let before: Vec<Vec<Tensor>> = (0..3).map(|index| kept_state(&stepper, index)).collect();
            let batches = load(step, is_image, world.as_ref()).micro_batches(Device::Cpu).expect("batches");
            stepper.step(&batches, LR, |_, _| Ok(())).expect("a step");
            assert!(kept_state(&stepper, other) == before[other], "step {step}: neither decayed nor updated");
            for index in [both, local] {
                let now = kept_state(&stepper, index);
                assert!(
                    now.iter().zip(&before[index]).all(|(now, before)| now != before),
                    "step {step} updates {index}"
                );
            }
        }
        (0..3).flat_map(|index| kept_state(&stepper, index)).collect()
    };
    let one = run(Arc::new(SoloWorld::new(Device::Cpu)));
    for ranks in [2, 3] {
        for two in run_on_threads(ranks, run) {
            let close = |(a, b): (&Tensor, &Tensor)| a.allclose(b, 1e-5, 1e-6, false);
            assert!(one.iter().zip(&two).all(close), "{ranks} ranks end with other weights than one");
        }
    }
    Ok(())
}

/// Pipelined steps may alternate shapes; each outcome belongs to its step.
fn pipelined_steps_alternate_modalities() -> Outcome {
    let turns = [true, false, false, true, false, true];
    for ranks in [1, 2] {
        run_on_threads(ranks, |world| {
            let mut synchronous = stepper(Heads::new(), world.clone(), Kind::Float, BUCKET);
            let mut pipelined = stepper(Heads::new(), world.clone(), Kind::Float, BUCKET);
            let mut pipeline = StepPipeline::new(6, &pipelined, &world).expect("a pipelined step mode");
            let mut losses = Vec::new();
            let mut output = Vec::new();
            for (step, is_image) in (0..).zip(turns) {
                let batch = load(step, is_image, world.as_ref());
                let batches = batch.micro_batches(Device::Cpu).expect("batches");
                losses.push(synchronous.step(&batches, LR, |_, _| Ok(())).expect("a step").loss);
                output.extend(pipeline.step(&mut pipelined, &batch, LR).expect("a step").map(|outcome| outcome.loss));
            }
            output.extend(pipeline.flush(&pipelined).expect("the last").map(|outcome| outcome.loss));
            assert_eq!(output.len(), losses.len());
            assert!(output.iter().zip(&losses).all(|(a, b)| (a / b - 1.0).abs() < 1e-5), "{output:?} for {losses:?}");
            let difference = |index| {
                (&kept_state(&synchronous, index)[0] - &kept_state(&pipelined, index)[0]).abs().max().double_value(&[])
            };
            assert!((0..3).all(|index| difference(index) < 1e-5));
        });
    }
    Ok(())
}
