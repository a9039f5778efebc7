//! The optimizer's state shared out among ranks, and bf16 on the wire: the same training as without, to the bit where the
//! order of sums allows it.

use crate::job::{Run, STEPS, signal, undisturbed};
use crate::step::{BATCH, BUCKET, LR, Path, SOON, Toy, load, share, tiny, toy_batch};
use crate::support::{Outcome, normal, read};
use libtest_mimic::Failed;
use occlude::device::World;
use occlude::device::solo::threads;
use occlude::method::Method;
use occlude::op::adamw::{self, Buffers};
use occlude::optim::bucket::{Buckets, Wire};
use occlude::optim::flat::Flat;
use occlude::optim::update::Updater;
use occlude::part::weights::{Init, Table};
use occlude::run::pace::Ahead;
use occlude::run::step::Stepper;
use rustix::process::Signal;
use serde_json::json;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

crate::trials![
    each_rank_holds_its_share_and_no_more,
    pieces_cover_every_weight_once,
    shards_and_whole_take_the_same_path,
    shards_ahead_take_the_path_of_whole_ones_ahead,
    the_kernel_moves_shares_as_it_moves_the_whole,
    clipped_shards_stay_beside_whole,
    a_refused_step_leaves_shards_alone,
    unused_tensors_rest_in_shards_too,
    bf16_on_the_wire_is_off_by_its_rounding_alone,
    a_step_with_bf16_on_the_wire_stays_beside_fp32,
    bf16_weights_wire_and_shards_stay_beside_fp32,
    whole_and_sharded_jobs_go_on_from_each_other,
    a_bf16_job_of_shards_resumes_to_the_bit,
    other_ranks_go_on_from_shards,
    dumps_of_shards_are_whole,
];

/// What sets a stepper apart from the plain one.
#[derive(Clone, Copy)]
pub struct Make {
    pub kind: Kind,
    pub wire: Kind,
    pub sharded: bool,
    pub clip: Option<f64>,
}

pub const PLAIN: Make = Make { kind: Kind::Float, wire: Kind::Float, sharded: false, clip: None };

pub fn stepper(method: impl Method + 'static, world: &Arc<dyn World>, bytes: usize, make: Make) -> Stepper {
    tch::set_num_threads(1);
    let optim = json!({"lr": LR, "weight_decay": 0.05, "ema": 0.99, "clip": make.clip});
    let optim = serde_json::from_value(optim).expect("numbers");
    let (table, place) = (method.table(), (make.kind, world.device()));
    let flat = match make.sharded {
        true => Flat::sharded(table, 7, place, bytes, (world.rank(), world.size())),
        false => Flat::new(table, 7, place.0, place.1),
    };
    let flat = flat.expect("buffers");
    let updater = Updater::new(&flat, &optim);
    let wire = Wire { bytes, kind: make.wire };
    Stepper::new(Box::new(method), flat, updater, world.clone(), wire, SOON).expect("a stepper")
}

/// All that a training is made of, whole: name and values in fp32.
fn everything(stepper: &Stepper) -> Vec<(String, Tensor)> {
    let flat = &stepper.flat;
    stepper.buckets.gathered(SOON).expect("whole weights");
    let mut all = vec![("steps".to_string(), flat.steps.copy())];
    let average = stepper.updater.average.as_ref().expect("an average");
    for (name, buffer) in
        [("weight", &flat.master), ("first", &flat.first), ("second", &flat.second), ("average", average)]
    {
        let note = |index: usize, whole: &Tensor| {
            all.push((format!("{name} of {}", flat.specs[index].name), whole.copy()));
            Ok(())
        };
        stepper.buckets.whole(flat, buffer, SOON, note).expect("whole buffers");
    }
    let computed = flat.leaves.0.iter().zip(&flat.specs);
    all.extend(computed.map(|(leaf, spec)| (format!("computed {}", spec.name), leaf.detach().to_kind(Kind::Float))));
    all
}

fn steps(stepper: &mut Stepper, world: &dyn World, steps: u64) -> Vec<f64> {
    let each = |step| {
        let outcome = stepper.step(&share(step, BATCH, world, 2), LR, |_, _| Ok(())).expect("a step");
        assert!(outcome.bad_ranks.is_empty() && outcome.grad_norm > 0.0);
        outcome.loss
    };
    (0..steps).map(each).collect()
}

fn each_rank_holds_its_share_and_no_more() -> Outcome {
    for ranks in [2, 3] {
        threads(ranks, |world| {
            let make = Make { kind: Kind::BFloat16, sharded: true, ..PLAIN };
            let stepper = stepper(tiny(), &world, BUCKET, make);
            let (flat, parameters) = (&stepper.flat, stepper.method.table().parameters());
            let length = flat.compute.numel();
            let average = stepper.updater.average.as_ref().expect("an average");
            for kept in [&flat.master, &flat.first, &flat.second, &flat.summed, &flat.narrowed, average] {
                assert_eq!(kept.numel() * ranks, length);
            }
            // Boundaries of 128 elements for each tensor, and as many a rank for each bucket.
            let shards = flat.shards.as_ref().expect("shards");
            let padding = 128 * (flat.specs.len() + ranks * shards.cut.buckets.len());
            assert!(length < parameters + padding, "{length} elements for {parameters} weights");
            assert_eq!(flat.gradient.numel(), length);
        });
    }
    Ok(())
}

fn pieces_cover_every_weight_once() -> Outcome {
    let mut table = Table::default();
    for (index, shape) in [&[700, 3][..], &[1], &[130], &[64, 65], &[5, 5], &[128]].iter().enumerate() {
        table.add(format!("tensor.{index}"), shape, Init::Normal(0.5));
    }
    for (ranks, bytes) in [(1, 4), (2, 4), (3, 2000), (5, 9000), (2, 1 << 20)] {
        let flats: Vec<Flat> = (0..ranks)
            .map(|rank| Flat::sharded(&table, 1, (Kind::Float, Device::Cpu), bytes, (rank, ranks)).expect("buffers"))
            .collect();
        for (index, spec) in table.specs().iter().enumerate() {
            let pieces: Vec<Tensor> = flats.iter().map(|flat| flat.piece(&flat.master, index)).collect();
            let joined = Tensor::cat(&pieces, 0);
            assert_eq!(Vec::<f32>::try_from(&joined)?, spec.draw(1), "{} on {ranks} ranks", spec.name);
        }
        let cut: Vec<usize> = (0..6).filter(|&i| flats.iter().all(|flat| !flat.kept[i].is_empty())).collect();
        assert!(ranks > 3 || !cut.is_empty(), "no boundary between {ranks} ranks cuts a tensor");
    }
    Ok(())
}

fn same(ours: &[(String, Tensor)], theirs: &[(String, Tensor)], what: &str) {
    assert_eq!(ours.len(), theirs.len());
    for ((name, ours), (_, theirs)) in ours.iter().zip(theirs) {
        assert!(ours.equal(theirs), "{what}: {name} is not the same to the bit");
    }
}

fn shards_and_whole_take_the_same_path() -> Outcome {
    for ranks in [1, 2, 3] {
        for (kind, wire) in
            [(Kind::Float, Kind::Float), (Kind::BFloat16, Kind::Float), (Kind::BFloat16, Kind::BFloat16)]
        {
            threads(ranks, |world| {
                let plain = Make { kind, wire, ..PLAIN };
                let mut both = [plain, Make { sharded: true, ..plain }].map(|m| stepper(tiny(), &world, BUCKET, m));
                let begun = everything(&both[0]);
                same(&everything(&both[1]), &begun, "at the start");
                let losses = both.each_mut().map(|stepper| steps(stepper, world.as_ref(), 6));
                assert_eq!(losses[0], losses[1], "{kind:?} on {ranks} ranks");
                let what = format!("{kind:?}, {wire:?} on the wire, {ranks} ranks");
                same(&everything(&both[1]), &everything(&both[0]), &what);
                assert!(!everything(&both[1])[1].1.equal(&begun[1].1), "nothing has moved");
            });
        }
    }
    Ok(())
}

/// There the whole weights come with the next step, and with the last one's outcome.
fn shards_ahead_take_the_path_of_whole_ones_ahead() -> Outcome {
    for (ranks, micro) in [(1, 10), (2, 5), (2, 2), (3, 3)] {
        threads(ranks, |world| {
            let [whole, shards] = [false, true].map(|sharded| {
                let mut stepper = stepper(tiny(), &world, BUCKET, Make { kind: Kind::BFloat16, sharded, ..PLAIN });
                // Weights of a step whose outcome the host saw are on their way when the first one ahead begins.
                steps(&mut stepper, world.as_ref(), 2);
                let mut ahead = Ahead::new(BATCH, &stepper, &world).expect("a pace");
                let mut told = Vec::new();
                for step in 2..6 {
                    let load = load(step, BATCH, world.as_ref(), micro);
                    told.extend(ahead.step(&mut stepper, &load, LR).expect("a step"));
                }
                told.extend(ahead.settle(&stepper).expect("the last"));
                (told.iter().map(|outcome| outcome.loss).collect::<Vec<_>>(), everything(&stepper))
            });
            assert!(whole.0.len() == 4 && whole.0 == shards.0, "{:?} for {:?}", shards.0, whole.0);
            same(&shards.1, &whole.1, &format!("{ranks} ranks, micro-batches of {micro}"));
        });
    }
    Ok(())
}

/// What a GPU runs, here in the emulator: two updates, of which the first leaves a tensor that is cut out.
fn the_kernel_moves_shares_as_it_moves_the_whole() -> Outcome {
    let mut table = Table::default();
    for (index, shape) in [&[37, 31][..], &[31], &[129, 3]].iter().enumerate() {
        table.add(format!("tensor.{index}"), shape, Init::Normal(0.5));
    }
    let decays: Vec<bool> = table.specs().iter().map(|spec| spec.decays).collect();
    let place = (Kind::BFloat16, Device::Cpu);
    let moved = |flat: &Flat| -> Result<(), Failed> {
        let numbers = adamw::Table::new(&flat.kept, &decays, flat.master.numel(), &flat.steps);
        for (seed, used) in [(1, [1f32, 1.0, 0.0]), (2, [1.0, 1.0, 1.0])] {
            for (index, spec) in flat.specs.iter().enumerate() {
                flat.keep(&flat.summed, index, &normal(10 * seed + index as u64, &spec.shape));
            }
            numbers.used.shallow_clone().copy_(&Tensor::from_slice(&used));
            let Flat { master, first, second, summed, narrowed, .. } = flat;
            let buffers = Buffers { master, first, second, gradient: summed, compute: Some(narrowed) };
            let control = adamw::control(1e-2, 0.1, 0.5, true, place.1);
            adamw::kernel(buffers, &numbers, &control, (0.9, 0.95), 1e-8)?;
        }
        Ok(())
    };
    let whole = Flat::new(&table, 7, place.0, place.1)?;
    moved(&whole)?;
    let shares = (0..3).map(|rank| Flat::sharded(&table, 7, place, 4, (rank, 3))).collect::<Result<Vec<_>, _>>()?;
    shares.iter().try_for_each(moved)?;
    let joined = |of: fn(&Flat) -> &Tensor, index| {
        Tensor::cat(&shares.iter().map(|flat| flat.piece(of(flat), index)).collect::<Vec<_>>(), 0)
    };
    let buffers: [fn(&Flat) -> &Tensor; 4] = [|f| &f.master, |f| &f.first, |f| &f.second, |f| &f.narrowed];
    for index in 0..3 {
        for of in buffers {
            assert!(joined(of, index).equal(&whole.piece(of(&whole), index)), "tensor {index}");
        }
    }
    assert!(shares.iter().all(|flat| flat.steps.equal(&whole.steps)), "every rank counts all updates");
    assert_eq!(Vec::<f32>::try_from(&whole.steps)?, [2.0, 2.0, 1.0]);
    Ok(())
}

/// The norm that clips is summed in another order, so that the scale is off by a rounding.
fn clipped_shards_stay_beside_whole() -> Outcome {
    for ranks in [2, 3] {
        threads(ranks, |world| {
            let plain = Make { clip: Some(0.05), ..PLAIN };
            let mut both = [plain, Make { sharded: true, ..plain }].map(|m| stepper(tiny(), &world, BUCKET, m));
            for step in 0..10 {
                let micro = share(step, BATCH, world.as_ref(), 2);
                let told = both.each_mut().map(|stepper| stepper.step(&micro, LR, |_, _| Ok(())).expect("a step"));
                let norms = told.each_ref().map(|outcome| outcome.grad_norm);
                assert!((norms[0] - norms[1]).abs() <= 1e-5 * norms[0], "step {step}: {norms:?}");
                assert!(told[1].clip_scale < 1.0, "every step is clipped");
            }
            for ((name, ours), (_, theirs)) in everything(&both[1]).iter().zip(&everything(&both[0])) {
                let off = (ours - theirs).abs().max().double_value(&[]);
                // Where a gradient is pure rounding, as of the biases of the keys, AdamW takes its sign for all there is.
                assert!(name.contains("qkv.bias") || off <= 0.1 * LR * 10.0, "{name} on {ranks} ranks: off by {off:e}");
            }
        });
    }
    Ok(())
}

fn a_refused_step_leaves_shards_alone() -> Outcome {
    threads(2, |world| {
        let mut stepper = stepper(tiny(), &world, BUCKET, Make { sharded: true, ..PLAIN });
        steps(&mut stepper, world.as_ref(), 2);
        let before = everything(&stepper);
        let mut spoiled = share(2, BATCH, world.as_ref(), 2);
        spoiled[0].pixels = spoiled[0].pixels.to_kind(Kind::Float) * if world.rank() == 1 { f64::NAN } else { 0.01 };
        let outcome = stepper.step(&spoiled, LR, |_, _| Ok(())).expect("a refused step is no fault");
        assert_eq!(outcome.bad_ranks, [1]);
        same(&everything(&stepper), &before, "refused");
        steps(&mut stepper, world.as_ref(), 1);
    });
    Ok(())
}

fn unused_tensors_rest_in_shards_too() -> Outcome {
    threads(3, |world| {
        let mut both = [false, true].map(|sharded| stepper(Toy::new(), &world, 1, Make { sharded, ..PLAIN }));
        for seeds in [[1, 0], [0, 0], [1, 1]] {
            // Only rank 2 uses the second tensor, nobody the third.
            let micro = seeds.map(|seed| toy_batch(if world.rank() == 2 { seed } else { 0 }));
            both.iter_mut().for_each(|s| drop(s.step(&micro, LR, |_, _| Ok(())).expect("a step")));
        }
        same(&everything(&both[1]), &everything(&both[0]), "three matrices");
        assert_eq!(Vec::<f32>::try_from(&both[1].flat.steps).expect("counts"), [3.0, 2.0, 0.0]);
    });
    Ok(())
}

/// A rank's value is off by half a unit in the last of 8 bits, so by up to 2⁻⁸ of itself, and so is the rounded sum:
/// |Δ| ≤ 2⁻⁸ · (Σ|g| + |Σg|), and a hair for the rounding of a sum that is off already.
fn bf16_on_the_wire_is_off_by_its_rounding_alone() -> Outcome {
    for ranks in [1, 2, 4] {
        for sharded in [false, true] {
            let exact = threads(ranks, |world| {
                let gradients: Vec<Tensor> = (0..ranks).map(|rank| normal(20 + rank as u64, &[40_000])).collect();
                let table = {
                    let mut table = Table::default();
                    for i in 0..4 {
                        table.add(format!("tensor.{i}"), &[100, 100], Init::Zero);
                    }
                    table
                };
                let flat = match sharded {
                    true => Flat::sharded(&table, 1, (Kind::Float, Device::Cpu), 40_000, (world.rank(), ranks)),
                    false => Flat::new(&table, 1, Kind::Float, Device::Cpu),
                };
                let flat = flat.expect("buffers");
                let wire = Wire { bytes: 40_000, kind: Kind::BFloat16 };
                let buckets =
                    Buckets::new(&flat, wire, world.channel("gradients").expect("a channel")).expect("buckets");
                let mut exact = 0;
                for pass in 0..2 {
                    let fill =
                        |index: usize, all: &Tensor| all.narrow(0, 10_000 * index as i64, 10_000).view([100, 100]);
                    for index in 0..4 {
                        flat.part(&flat.gradient, index).copy_(&fill(index, &gradients[world.rank()]));
                    }
                    buckets.begin();
                    buckets.finish(SOON).expect("sums");
                    let check = |index: usize, whole: &Tensor| {
                        let parts: Vec<Tensor> =
                            gradients.iter().map(|all| fill(index, all).to_kind(Kind::Double)).collect();
                        let sum =
                            parts.iter().fold(Tensor::zeros([100, 100], (Kind::Double, Device::Cpu)), |a, b| a + b);
                        let sizes = parts.iter().fold(sum.abs(), |a, b| a + b.abs());
                        let off = (whole.to_kind(Kind::Double) - &sum).abs();
                        let within = sizes * (1.0 + 2f64.powi(-8)) * 2f64.powi(-8);
                        assert!((&off - within).max().double_value(&[]) <= 0.0, "{ranks} ranks, pass {pass}");
                        exact += off.eq(0.0).sum(Kind::Int64).int64_value(&[]);
                        Ok(())
                    };
                    buckets.whole(&flat, &flat.summed, SOON, check).expect("whole sums");
                }
                exact
            });
            assert!(exact.iter().all(|&exact| exact < 8000), "nothing was rounded: {exact:?} of 80,000 are exact");
        }
    }
    Ok(())
}

/// A gradient that is off by 2⁻⁷ of its size moves AdamW's first steps, which know little but its sign, only where it is
/// nearly 0; losses of a few steps then stay within half a percent.
fn a_step_with_bf16_on_the_wire_stays_beside_fp32() -> Outcome {
    for ranks in [2, 4] {
        threads(ranks, |world| {
            let makes =
                [PLAIN, Make { wire: Kind::BFloat16, ..PLAIN }, Make { wire: Kind::BFloat16, sharded: true, ..PLAIN }];
            let losses = makes.map(|make| steps(&mut stepper(tiny(), &world, BUCKET, make), world.as_ref(), 20));
            assert_eq!(losses[1], losses[2], "whole and in shards");
            assert!(losses[0] != losses[1] && losses[0][0] == losses[1][0], "{losses:?}");
            for (step, (fp32, bf16)) in losses[0].iter().zip(&losses[1]).enumerate() {
                assert!((fp32 - bf16).abs() <= 5e-3 * fp32, "{ranks} ranks, step {step}: {bf16} for {fp32}");
            }
        });
    }
    Ok(())
}

/// Two hundredths, as for the weights alone (`step::bf16_stays_beside_fp32`): what is rounded on the wire besides is of
/// the same size and falls as often to either side.
fn bf16_weights_wire_and_shards_stay_beside_fp32() -> Outcome {
    let fp32 = Path::solo(200, BATCH).losses;
    let all = threads(2, |world| {
        let make = Make { kind: Kind::BFloat16, wire: Kind::BFloat16, sharded: true, clip: None };
        steps(&mut stepper(tiny(), &world, BUCKET, make), world.as_ref(), 200)
    });
    let off = |step: usize| (all[0][step] - fp32[step]).abs() / fp32[step];
    assert!(off(0) <= 2e-3, "at the same weights: {} for {}", all[0][0], fp32[0]);
    let worst = (0..200).max_by(|&a, &b| off(a).total_cmp(&off(b))).expect("a step");
    assert!(off(worst) <= 0.02, "step {worst}: {} for {}", all[0][worst], fp32[worst]);
    let last = all[0][180..].iter().sum::<f64>() / 20.0;
    assert!(last < 0.7 * all[0][0] && all[0] == all[1], "bf16 learns: {last} after {}", all[0][0]);
    Ok(())
}

const SHARDED: [&str; 2] = ["--set", "world.shard_optimizer=true"];

/// Trains until after `step` and stops with a checkpoint.
fn until(run: &Run, ranks: usize, step: u64, more: &[&str]) {
    let mut job = run.start(ranks, more);
    job.reach(step);
    signal(job.pid(), Signal::TERM);
    let end = job.end(60);
    assert_eq!(end.code, 75, "{}", end.told);
}

/// As `Run::same_as`, but for the norm, which shards sum in another order.
fn trained_the_same(ours: &Run, theirs: &Run) -> Outcome {
    let (newest, wanted) = (ours.newest()?, theirs.newest()?);
    assert_eq!((newest.manifest.step, newest.tensors.len()), (STEPS, wanted.tensors.len()));
    for (name, tensor) in &wanted.tensors {
        assert!(newest.tensors[name] == *tensor, "{name} is not the same to the bit");
    }
    let numbers = |run: &Run| -> Vec<_> { run.lines().iter().map(|line| (line.step, line.loss, line.lr)).collect() };
    assert!(numbers(ours) == numbers(theirs), "losses differ");
    let norms = |run: &Run| -> Vec<f64> { run.lines().iter().map(|line| line.grad_norm).collect() };
    for (ours, theirs) in norms(ours).iter().zip(norms(theirs)) {
        assert!((ours - theirs).abs() <= 1e-6 * theirs, "norm {ours} for {theirs}");
    }
    Ok(())
}

fn whole_and_sharded_jobs_go_on_from_each_other() -> Outcome {
    let run = Run::tiny();
    until(&run, 2, 40, &[]);
    until(&run, 2, 110, &SHARDED);
    until(&run, 2, 170, &[]);
    // Rank 0 draws pictures with the others' weights under way.
    run.finish(2, &[&SHARDED[..], &["--set", "log.pictures_every_steps=30"]].concat());
    assert!(run.folder().join("pictures").read_dir()?.count() >= 2);
    trained_the_same(&run, undisturbed(2))
}

fn a_bf16_job_of_shards_resumes_to_the_bit() -> Outcome {
    let sets = ["train.dtype=bf16", "world.wire=bf16", "world.bucket_mb=0.008"];
    let whole = Run::with(&sets);
    whole.finish(2, &[]);
    let run = Run::with(&sets);
    let mut job = run.start(2, &SHARDED);
    job.reach(70);
    signal(job.rank(1), Signal::KILL);
    assert_eq!(job.end(30).code, 70);
    until(&run, 2, 150, &[]);
    run.finish(2, &SHARDED);
    trained_the_same(&run, &whole)?;
    // What rounds cannot change on the way.
    let end = run.start(0, &["--set", "world.wire=fp32"]).end(60);
    assert!(end.code == 2 && end.told.contains("world.wire was \"bf16\" and is now \"fp32\""), "{}", end.told);
    Ok(())
}

fn other_ranks_go_on_from_shards() -> Outcome {
    let run = Run::tiny();
    until(&run, 3, 60, &SHARDED);
    until(&run, 2, 130, &SHARDED);
    run.finish(0, &[]);
    for (ours, theirs) in run.lines().iter().zip(undisturbed(0).lines()) {
        let off = (ours.loss - theirs.loss).abs() / theirs.loss;
        assert!(off <= 1e-3, "step {}: loss {} for {}", ours.step, ours.loss, theirs.loss);
    }
    assert_eq!(run.lines().len() as u64, STEPS);
    Ok(())
}

fn dumps_of_shards_are_whole() -> Outcome {
    let dumped = |more: &[&str]| -> Result<Vec<_>, Failed> {
        let run = Run::with(&["train.steps=3"]);
        run.finish(2, &[&["--dump-steps", "3"], more].concat());
        let file = |rank| run.folder().join(format!("dump/step-00000002-rank-{rank}.safetensors"));
        Ok(vec![read(&file(0))?, read(&file(1))?])
    };
    for (whole, sharded) in dumped(&[])?.iter().zip(dumped(&SHARDED)?) {
        assert_eq!(whole.len(), sharded.len());
        for (name, tensor) in whole {
            assert!(tensor.equal(&sharded[name]), "{name} is not the same to the bit");
        }
        assert!(whole.keys().any(|name| name.starts_with("grad.")));
    }
    Ok(())
}
