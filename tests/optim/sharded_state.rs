//! Tests of sharded optimizer state and bf16 gradients: the same training as without, bit for bit where the order of
//! sums allows it.

use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, normal};
use crate::train::step::{
    BATCH, BUCKET, LR, SOON, Toy, Trajectory, micro_batches, pipelined_batch, tiny_mae, toy_batch,
};
use libtest_mimic::Failed;
use occlude::dist::World;
use occlude::dist::solo::run_on_threads;
use occlude::method::Method;
use occlude::op::adamw::{self, AdamWBuffers};
use occlude::optim::bucket::{Buckets, GradReduce};
use occlude::optim::flat::{FlatOptions, FlatParams, ShardOptions};
use occlude::optim::update::Updater;
use occlude::part::params::{Init, ParamSpecs};
use occlude::train::step::Stepper;
use occlude::train::step_mode::StepPipeline;
use serde_json::json;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

crate::trials![
    each_rank_holds_only_its_shard,
    shards_cover_every_weight_once,
    sharded_and_full_training_match,
    pipelined_sharded_and_full_training_match,
    the_kernel_updates_shards_like_full_buffers,
    clipped_sharded_training_stays_close_to_full,
    a_rejected_step_leaves_shards_unchanged,
    unused_tensors_do_not_move_in_shards,
    bf16_gradients_differ_only_by_rounding,
    a_step_with_bf16_gradients_stays_close_to_fp32,
    bf16_weights_gradients_and_shards_stay_close_to_fp32,
];

/// Options in which a stepper differs from the plain one.
#[derive(Clone, Copy)]
pub struct StepperOptions {
    pub kind: Kind,
    pub grad_dtype: Kind,
    pub sharded: bool,
    pub clip: Option<f64>,
}

pub const PLAIN: StepperOptions =
    StepperOptions { kind: Kind::Float, grad_dtype: Kind::Float, sharded: false, clip: None };

pub fn stepper(
    method: impl Method + 'static,
    world: &Arc<dyn World>,
    bytes: usize,
    options: StepperOptions,
) -> Stepper {
    tch::set_num_threads(1);
    let optim = json!({"lr": LR, "weight_decay": 0.05, "ema_decay": 0.99, "clip_grad_norm": options.clip});
    let optim = serde_json::from_value(optim).expect("numbers");
    let table = method.params();
    let kind_and_device = (options.kind, world.device());
    let flat = if options.sharded {
        FlatParams::new_sharded(
            table,
            FlatOptions { seed: 7, kind: kind_and_device.0, device: kind_and_device.1 },
            ShardOptions { bucket_bytes: bytes, rank: world.rank(), world_size: world.size() },
        )
    } else {
        FlatParams::new(table, 7, kind_and_device.0, kind_and_device.1)
    };
    let flat = flat.expect("buffers");
    let updater = Updater::new(&flat, &optim);
    let reduce = GradReduce { bucket_bytes: bytes, kind: options.grad_dtype };
    Stepper::new(Box::new(method), flat, updater, world.clone(), reduce, SOON).expect("a stepper")
}

/// Returns everything that a training consists of, in full: name and values in fp32.
fn full_state(stepper: &Stepper) -> Vec<(String, Tensor)> {
    let flat = &stepper.flat;
    stepper.buckets.finish_weight_gather(SOON).expect("full weights");
    let mut all = vec![("steps".to_string(), flat.steps.copy())];
    let average = stepper.updater.ema.as_ref().expect("an average");
    for (name, buffer) in
        [("weight", &flat.master), ("first", &flat.exp_avg), ("second", &flat.exp_avg_sq), ("average", average)]
    {
        let note = |index: usize, full: &Tensor| {
            all.push((format!("{name} of {}", flat.specs[index].name), full.copy()));
            Ok(())
        };
        stepper.buckets.for_each_full(flat, buffer, SOON, note).expect("full buffers");
    }
    let computed = flat.leaves.0.iter().zip(&flat.specs);
    all.extend(computed.map(|(leaf, spec)| (format!("computed {}", spec.name), leaf.detach().to_kind(Kind::Float))));
    all
}

fn steps(stepper: &mut Stepper, world: &dyn World, steps: u64) -> Vec<f64> {
    let each = |step| {
        let outcome = stepper.step(&micro_batches(step, BATCH, world, 2), LR, |_, _| Ok(())).expect("a step");
        assert!(outcome.bad_ranks.is_empty() && outcome.grad_norm > 0.0);
        outcome.loss
    };
    (0..steps).map(each).collect()
}

fn each_rank_holds_only_its_shard() -> Outcome {
    for ranks in [2, 3] {
        run_on_threads(ranks, |world| {
            let options = StepperOptions { kind: Kind::BFloat16, sharded: true, ..PLAIN };
            let stepper = stepper(tiny_mae(), &world, BUCKET, options);
            let flat = &stepper.flat;
            let parameters = stepper.method.params().parameter_count();
            let length = flat.compute.numel();
            let average = stepper.updater.ema.as_ref().expect("an average");
            for kept in
                [&flat.master, &flat.exp_avg, &flat.exp_avg_sq, &flat.reduced_grad, &flat.compute_shard, average]
            {
                assert_eq!(kept.numel() * ranks, length);
            }
            // Each tensor is aligned to 128 elements, and each bucket to that many per rank.
            let shards = flat.sharding.as_ref().expect("shards");
            let padding = 128 * (flat.specs.len() + ranks * shards.layout.buckets.len());
            assert!(length < parameters + padding, "{length} elements for {parameters} weights");
            assert_eq!(flat.grad.numel(), length);
        });
    }
    Ok(())
}

fn shards_cover_every_weight_once() -> Outcome {
    let mut table = ParamSpecs::default();
    for (index, shape) in [&[700, 3][..], &[1], &[130], &[64, 65], &[5, 5], &[128]].iter().enumerate() {
        table.add(format!("tensor.{index}"), shape, Init::Normal(0.5));
    }
    for (ranks, bytes) in [(1, 4), (2, 4), (3, 2000), (5, 9000), (2, 1 << 20)] {
        let flats: Vec<FlatParams> = (0..ranks)
            .map(|rank| {
                FlatParams::new_sharded(
                    &table,
                    FlatOptions { seed: 1, kind: Kind::Float, device: Device::Cpu },
                    ShardOptions { bucket_bytes: bytes, rank, world_size: ranks },
                )
                .expect("buffers")
            })
            .collect();
        for (index, spec) in table.specs().iter().enumerate() {
            let pieces: Vec<Tensor> = flats.iter().map(|flat| flat.shard_of(&flat.master, index)).collect();
            let joined = Tensor::cat(&pieces, 0);
            assert_eq!(Vec::<f32>::try_from(&joined)?, spec.initial_values(1), "{} on {ranks} ranks", spec.name);
        }
        let cut: Vec<usize> = (0..6).filter(|&i| flats.iter().all(|flat| !flat.shard_ranges[i].is_empty())).collect();
        assert!(ranks > 3 || !cut.is_empty(), "no boundary between {ranks} ranks splits a tensor");
    }
    Ok(())
}

fn assert_same(ours: &[(String, Tensor)], reference: &[(String, Tensor)], label: &str) {
    assert_eq!(ours.len(), reference.len());
    for ((name, ours), (_, reference)) in ours.iter().zip(reference) {
        assert!(ours.equal(reference), "{label}: {name} differs");
    }
}

fn sharded_and_full_training_match() -> Outcome {
    for ranks in [1, 2, 3] {
        for (kind, grad_dtype) in
            [(Kind::Float, Kind::Float), (Kind::BFloat16, Kind::Float), (Kind::BFloat16, Kind::BFloat16)]
        {
            run_on_threads(ranks, |world| {
                let plain = StepperOptions { kind, grad_dtype, ..PLAIN };
                let mut both =
                    [plain, StepperOptions { sharded: true, ..plain }].map(|m| stepper(tiny_mae(), &world, BUCKET, m));
                let start = full_state(&both[0]);
                assert_same(&full_state(&both[1]), &start, "at the start");
                let losses = both.each_mut().map(|stepper| steps(stepper, world.as_ref(), 6));
                assert_eq!(losses[0], losses[1], "{kind:?} on {ranks} ranks");
                let label = format!("{kind:?}, gradients in {grad_dtype:?}, {ranks} ranks");
                assert_same(&full_state(&both[1]), &full_state(&both[0]), &label);
                assert!(!full_state(&both[1])[1].1.equal(&start[1].1), "nothing has changed");
            });
        }
    }
    Ok(())
}

/// With pipelined steps the full weights arrive with the next step, and with the outcome of the last one.
fn pipelined_sharded_and_full_training_match() -> Outcome {
    for (ranks, micro) in [(1, 10), (2, 5), (2, 2), (3, 3)] {
        run_on_threads(ranks, |world| {
            let [full, shards] = [false, true].map(|sharded| {
                let mut stepper =
                    stepper(tiny_mae(), &world, BUCKET, StepperOptions { kind: Kind::BFloat16, sharded, ..PLAIN });
                // Weights of the last synchronous step are still being gathered when the first pipelined one begins.
                steps(&mut stepper, world.as_ref(), 2);
                let mut pipeline = StepPipeline::new(BATCH, &stepper, &world).expect("a pipelined step mode");
                let mut output = Vec::new();
                for step in 2..6 {
                    let load = pipelined_batch(step, BATCH, world.as_ref(), micro);
                    output.extend(pipeline.step(&mut stepper, &load, LR).expect("a step"));
                }
                output.extend(pipeline.flush(&stepper).expect("the last"));
                (output.iter().map(|outcome| outcome.loss).collect::<Vec<_>>(), full_state(&stepper))
            });
            assert!(full.0.len() == 4 && full.0 == shards.0, "{:?} for {:?}", shards.0, full.0);
            assert_same(&shards.1, &full.1, &format!("{ranks} ranks, micro-batches of {micro}"));
        });
    }
    Ok(())
}

/// The code of a GPU, here in the emulator: two updates, of which the first skips a tensor.
fn the_kernel_updates_shards_like_full_buffers() -> Outcome {
    let mut table = ParamSpecs::default();
    for (index, shape) in [&[37, 31][..], &[31], &[129, 3]].iter().enumerate() {
        table.add(format!("tensor.{index}"), shape, Init::Normal(0.5));
    }
    let decays: Vec<bool> = table.specs().iter().map(|spec| spec.weight_decay).collect();
    let kind_and_device = (Kind::BFloat16, Device::Cpu);
    let moved = |flat: &FlatParams| -> Result<(), Failed> {
        let numbers = adamw::TensorState::new(&flat.shard_ranges, &decays, flat.master.numel(), &flat.steps);
        for (seed, used) in [(1, [1f32, 1.0, 0.0]), (2, [1.0, 1.0, 1.0])] {
            for (index, spec) in flat.specs.iter().enumerate() {
                flat.copy_shard(&flat.reduced_grad, index, &normal(10 * seed + index as u64, &spec.shape));
            }
            numbers.used.shallow_clone().copy_(&Tensor::from_slice(&used));
            let FlatParams {
                master,
                exp_avg: first,
                exp_avg_sq: second,
                reduced_grad: summed,
                compute_shard: narrowed,
                ..
            } = flat;
            let buffers = AdamWBuffers {
                master,
                exp_avg: first,
                exp_avg_sq: second,
                gradient: summed,
                compute_weights: Some(narrowed),
            };
            let control = adamw::control(1e-2, 0.1, 0.5, true, kind_and_device.1);
            adamw::kernel(buffers, &numbers, &control, [0.9, 0.95], 1e-8)?;
        }
        Ok(())
    };
    let full = FlatParams::new(&table, 7, kind_and_device.0, kind_and_device.1)?;
    moved(&full)?;
    let shares = (0..3)
        .map(|rank| {
            FlatParams::new_sharded(
                &table,
                FlatOptions { seed: 7, kind: kind_and_device.0, device: kind_and_device.1 },
                ShardOptions { bucket_bytes: 4, rank, world_size: 3 },
            )
        })
        .collect::<Result<Vec<_>, _>>()?;
    shares.iter().try_for_each(moved)?;
    let joined = |of: fn(&FlatParams) -> &Tensor, index| {
        Tensor::cat(&shares.iter().map(|flat| flat.shard_of(of(flat), index)).collect::<Vec<_>>(), 0)
    };
    let buffers: [fn(&FlatParams) -> &Tensor; 4] =
        [|f| &f.master, |f| &f.exp_avg, |f| &f.exp_avg_sq, |f| &f.compute_shard];
    for index in 0..3 {
        for of in buffers {
            assert!(joined(of, index).equal(&full.shard_of(of(&full), index)), "tensor {index}");
        }
    }
    assert!(shares.iter().all(|flat| flat.steps.equal(&full.steps)), "every rank counts all updates");
    assert_eq!(Vec::<f32>::try_from(&full.steps)?, [2.0, 2.0, 1.0]);
    Ok(())
}

/// The norm for clipping is summed in another order, so that the scale is off by a rounding.
fn clipped_sharded_training_stays_close_to_full() -> Outcome {
    for ranks in [2, 3] {
        run_on_threads(ranks, |world| {
            let plain = StepperOptions { clip: Some(0.05), ..PLAIN };
            let mut both =
                [plain, StepperOptions { sharded: true, ..plain }].map(|m| stepper(tiny_mae(), &world, BUCKET, m));
            for step in 0..10 {
                let micro = micro_batches(step, BATCH, world.as_ref(), 2);
                let output = both.each_mut().map(|stepper| stepper.step(&micro, LR, |_, _| Ok(())).expect("a step"));
                let norms = output.each_ref().map(|outcome| outcome.grad_norm);
                assert!((norms[0] - norms[1]).abs() <= 1e-5 * norms[0], "step {step}: {norms:?}");
                assert!(output[1].clip_scale < 1.0, "every step is clipped");
            }
            for ((name, ours), (_, reference)) in full_state(&both[1]).iter().zip(&full_state(&both[0])) {
                let difference = (ours - reference).abs().max().double_value(&[]);
                // AdamW follows the sign of a gradient that is pure rounding, as for the biases of keys.
                assert!(
                    name.contains("qkv.bias") || difference <= 0.1 * LR * 10.0,
                    "{name} on {ranks} ranks: off by {difference:e}"
                );
            }
        });
    }
    Ok(())
}

fn a_rejected_step_leaves_shards_unchanged() -> Outcome {
    run_on_threads(2, |world| {
        let mut stepper = stepper(tiny_mae(), &world, BUCKET, StepperOptions { sharded: true, ..PLAIN });
        steps(&mut stepper, world.as_ref(), 2);
        let before = full_state(&stepper);
        let mut corrupt = micro_batches(2, BATCH, world.as_ref(), 2);
        corrupt[0].views[0] =
            corrupt[0].views[0].to_kind(Kind::Float) * if world.rank() == 1 { f64::NAN } else { 0.01 };
        let outcome = stepper.step(&corrupt, LR, |_, _| Ok(())).expect("a rejected step is not an error");
        assert_eq!(outcome.bad_ranks, [1]);
        assert_same(&full_state(&stepper), &before, "refused");
        steps(&mut stepper, world.as_ref(), 1);
    });
    Ok(())
}

fn unused_tensors_do_not_move_in_shards() -> Outcome {
    run_on_threads(3, |world| {
        let mut both =
            [false, true].map(|sharded| stepper(Toy::default(), &world, 1, StepperOptions { sharded, ..PLAIN }));
        for seeds in [[1, 0], [0, 0], [1, 1]] {
            // Only rank 2 uses the second tensor, and no rank the third.
            let micro = seeds.map(|seed| toy_batch(if world.rank() == 2 { seed } else { 0 }));
            both.iter_mut().for_each(|s| drop(s.step(&micro, LR, |_, _| Ok(())).expect("a step")));
        }
        assert_same(&full_state(&both[1]), &full_state(&both[0]), "three matrices");
        assert_eq!(Vec::<f32>::try_from(&both[1].flat.steps).expect("counts"), [3.0, 2.0, 0.0]);
    });
    Ok(())
}

/// The value of a rank is off by half a unit in the last of 8 bits, so by up to 2⁻⁸ of itself, and so is the rounded
/// sum: |Δ| ≤ 2⁻⁸ · (Σ|g| + |Σg|), plus a little for the rounding of a sum that is off already.
fn bf16_gradients_differ_only_by_rounding() -> Outcome {
    for ranks in [1, 2, 4] {
        for sharded in [false, true] {
            let exact = run_on_threads(ranks, |world| {
                let gradients: Vec<Tensor> = (0..ranks).map(|rank| normal(20 + rank as u64, &[40_000])).collect();
                let table = {
                    let mut table = ParamSpecs::default();
                    for i in 0..4 {
                        table.add(format!("tensor.{i}"), &[100, 100], Init::Zero);
                    }
                    table
                };
                let flat = if sharded {
                    FlatParams::new_sharded(
                        &table,
                        FlatOptions { seed: 1, kind: Kind::Float, device: Device::Cpu },
                        ShardOptions { bucket_bytes: 40_000, rank: world.rank(), world_size: ranks },
                    )
                } else {
                    FlatParams::new(&table, 1, Kind::Float, Device::Cpu)
                };
                let flat = flat.expect("buffers");
                let grad_dtype = GradReduce { bucket_bytes: 40_000, kind: Kind::BFloat16 };
                let buckets = Buckets::new(&flat, grad_dtype, world.open_channel("gradients").expect("a channel"))
                    .expect("buckets");
                let mut exact = 0;
                for pass in 0..2 {
                    let fill =
                        |index: usize, all: &Tensor| all.narrow(0, 10_000 * index as i64, 10_000).view([100, 100]);
                    for index in 0..4 {
                        flat.param_view(&flat.grad, index).copy_(&fill(index, &gradients[world.rank()]));
                    }
                    buckets.begin_step();
                    buckets.finish(SOON).expect("sums");
                    let check = |index: usize, full: &Tensor| {
                        let parts: Vec<Tensor> =
                            gradients.iter().map(|all| fill(index, all).to_kind(Kind::Double)).collect();
                        let sum =
                            parts.iter().fold(Tensor::zeros([100, 100], (Kind::Double, Device::Cpu)), |a, b| a + b);
                        let sizes = parts.iter().fold(sum.abs(), |a, b| a + b.abs());
                        let difference = (full.to_kind(Kind::Double) - &sum).abs();
                        let within = sizes * (1.0 + 2f64.powi(-8)) * 2f64.powi(-8);
                        assert!((&difference - within).max().double_value(&[]) <= 0.0, "{ranks} ranks, pass {pass}");
                        exact += difference.eq(0.0).sum(Kind::Int64).int64_value(&[]);
                        Ok(())
                    };
                    buckets.for_each_full(&flat, &flat.reduced_grad, SOON, check).expect("full sums");
                }
                exact
            });
            assert!(exact.iter().all(|&exact| exact < 8000), "nothing was rounded: {exact:?} of 80,000 are exact");
        }
    }
    Ok(())
}

/// A gradient that is off by 2⁻⁷ of its size changes the first steps of AdamW, which depend on little but its sign,
/// only where it is nearly 0; losses of a few steps then stay within half a percent.
fn a_step_with_bf16_gradients_stays_close_to_fp32() -> Outcome {
    for ranks in [2, 4] {
        run_on_threads(ranks, |world| {
            let makes = [
                PLAIN,
                StepperOptions { grad_dtype: Kind::BFloat16, ..PLAIN },
                StepperOptions { grad_dtype: Kind::BFloat16, sharded: true, ..PLAIN },
            ];
            let losses =
                makes.map(|options| steps(&mut stepper(tiny_mae(), &world, BUCKET, options), world.as_ref(), 20));
            assert_eq!(losses[1], losses[2], "full and sharded");
            assert!(losses[0] != losses[1] && losses[0][0] == losses[1][0], "{losses:?}");
            for (step, (fp32, bf16)) in losses[0].iter().zip(&losses[1]).enumerate() {
                assert!((fp32 - bf16).abs() <= 5e-3 * fp32, "{ranks} ranks, step {step}: {bf16} for {fp32}");
            }
        });
    }
    Ok(())
}

/// Two percent, as for the weights alone (`step::bf16_stays_close_to_fp32`): the rounding of gradients is of the same
/// size and of either sign.
fn bf16_weights_gradients_and_shards_stay_close_to_fp32() -> Outcome {
    let fp32 = Trajectory::train_solo(200, BATCH).losses;
    let all = run_on_threads(2, |world| {
        let options = StepperOptions { kind: Kind::BFloat16, grad_dtype: Kind::BFloat16, sharded: true, clip: None };
        steps(&mut stepper(tiny_mae(), &world, BUCKET, options), world.as_ref(), 200)
    });
    let difference = |step: usize| (all[0][step] - fp32[step]).abs() / fp32[step];
    assert!(difference(0) <= 2e-3, "at the same weights: {} for {}", all[0][0], fp32[0]);
    let worst = (0..200).max_by(|&a, &b| difference(a).total_cmp(&difference(b))).expect("a step");
    assert!(difference(worst) <= 0.02, "step {worst}: {} for {}", all[0][worst], fp32[worst]);
    let last = all[0][180..].iter().sum::<f64>() / 20.0;
    assert!(last < 0.7 * all[0][0] && all[0] == all[1], "bf16 learns: {last} after {}", all[0][0]);
    Ok(())
}
