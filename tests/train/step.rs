//! Tests of the gradient step: the same for any number of ranks and micro-batches, and rejected by all ranks together.

use crate::support::Outcome;
use crate::support::method_ext::MethodExt;
use occlude::bridge::bytes;
use occlude::data::order::rank_rows;
use occlude::dist::DelayedWorld;
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::error::Result;
use occlude::grid::{Grid, InputConfig};
use occlude::method::{Batch, Features, LossOutput, Method, Model, Per, Step, mae};
use occlude::op::shuffle::SampleKey;
use occlude::optim::flat::FlatParams;
use occlude::optim::update::{Config, Updater};
use occlude::part::batch::Side;
use occlude::part::cost::ModelCost;
use occlude::part::encoder::EncodeOptions;
use occlude::part::params::{Init, ParamId, ParamSpecs};
use occlude::part::patchify::Patchify;
use occlude::rng::{Philox, Purpose};
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepPipeline};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    one_to_four_ranks_match,
    micro_batches_match_and_reduce_once,
    uneven_local_batches_and_micro_batches_divide_once,
    a_rank_without_samples_stays_in_step,
    bf16_stays_close_to_fp32,
    a_nan_pixel_is_rejected_by_all_ranks,
    a_nan_gradient_is_rejected_by_all_ranks,
    a_tensor_used_by_one_rank_moves_on_all_and_an_unused_one_on_none,
];

pub const SOON: Duration = Duration::from_secs(60);
pub const LR: f64 = 1e-3;
/// Samples of a global batch.
pub const BATCH: u64 = 10;
/// Samples of the synthetic data set.
const SAMPLES: u64 = 64;

pub fn input() -> InputConfig {
    let mean = vec![0.5];
    let std = vec![0.25];
    InputConfig { channels: 1, frames: 1, height: 16, width: 16, patch: 4, patch_frames: 1, mean, std }
}

pub fn tiny_mae() -> mae::Mae {
    let config = json!({
        "encoder": {"width": 32, "depth": 2, "heads": 4}, "decoder": {"width": 24, "depth": 1, "heads": 3},
        "mask": {"ratio": 0.75},
    });
    mae::Mae::new(&serde_json::from_value(config).expect("numbers"), &input()).expect("a method")
}

pub fn optim() -> Config {
    serde_json::from_value(json!({"lr": LR, "weight_decay": 0.05, "ema_decay": 0.99})).expect("numbers")
}

/// About eight buckets for the tiny model.
pub const BUCKET: usize = 16_000;

/// Returns a plain stepper with fp32 gradients.
pub fn stepper(method: impl Method + 'static, world: Arc<dyn World>, kind: Kind, bucket: usize) -> Stepper {
    tch::set_num_threads(1);
    let flat = FlatParams::new(method.params(), 7, kind, world.device()).expect("buffers");
    let updater = Updater::new(&flat, &optim());
    Stepper::new(Box::new(method), flat, updater, world, bucket, SOON).expect("a stepper")
}

/// Returns the sample at a position of the training: a wave with its own direction, length and phase.
fn sample_at(position: u64) -> (SampleKey, Vec<u8>) {
    let id = position % SAMPLES;
    let epoch = position / SAMPLES;
    let mut draw = Philox::new(3, id, 0, Purpose::Order, 0);
    let x = draw.uniform_range(-1.0, 1.0);
    let y = draw.uniform_range(-1.0, 1.0);
    let phase = draw.uniform_range(0.0, 6.3);
    let wave = |at: i64| 128.0 + 100.0 * (x * (at % 16) as f64 + y * (at / 16) as f64 + phase).sin();
    (SampleKey { id, epoch, repeat: 0 }, (0..256).map(|at| wave(at) as u8).collect())
}

/// Returns rows of the global batch of a step.
fn batch(step: u64, rows: impl Iterator<Item = u64>) -> Batch {
    let (keys, pixels): (Vec<_>, Vec<_>) = rows.map(|row| sample_at(step * BATCH + row)).unzip();
    let pixels = Tensor::from_slice(&pixels.concat()).view([keys.len() as i64, 1, 1, 16, 16]);
    Batch::new(pixels, &keys, 5)
}

/// Returns the micro-batches of this rank: at most `micro` rows each, of a global batch of `size`.
pub fn micro_batches(step: u64, size: u64, world: &dyn World, micro: u64) -> Vec<Batch> {
    pipelined_batch(step, size, world, micro).micro_batches(world.device()).expect("batches")
}

/// Returns the same as the input of a pipelined step, on the CPU.
pub fn pipelined_batch(step: u64, size: u64, world: &dyn World, micro: u64) -> LocalBatch {
    let rows = rank_rows(size, world.rank(), world.size());
    let (keys, pixels): (Vec<_>, Vec<_>) = rows.map(|row| sample_at(step * BATCH + row)).unzip();
    let pixels = Tensor::from_slice(&pixels.concat()).view([keys.len() as i64, 1, 1, 16, 16]);
    LocalBatch { views: vec![pixels], keys, side: Side::default(), seed: 5, micro_batch: micro as usize }
}

/// The result of a training: the loss of every step and the weights.
pub struct Trajectory {
    pub losses: Vec<f64>,
    pub weights: Tensor,
}

impl Trajectory {
    /// Trains one rank in fp32.
    pub fn train(world: Arc<dyn World>, steps: u64, size: u64, micro: u64) -> Trajectory {
        let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
        let mut losses = Vec::new();
        for step in 0..steps {
            let outcome =
                stepper.step(&micro_batches(step, size, world.as_ref(), micro), LR, |_, _| Ok(())).expect("a step");
            assert!(outcome.bad_ranks.is_empty() && outcome.grad_norm > 0.0);
            losses.push(outcome.loss);
        }
        let weights = without_key_biases(&stepper.flat).to_device(Device::Cpu);
        Trajectory { losses, weights }
    }

    /// Trains with pipelined steps; returns also the number of parts of a step that were captured in the end.
    pub fn train_pipelined(world: Arc<dyn World>, steps: u64, size: u64, micro: u64) -> (Trajectory, usize) {
        let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
        let mut ahead = StepPipeline::new(size, &stepper, &world).expect("a pipelined step mode");
        let mut outcomes = Vec::new();
        for step in 0..steps {
            outcomes.extend(
                ahead.step(&mut stepper, &pipelined_batch(step, size, world.as_ref(), micro), LR).expect("a step"),
            );
        }
        outcomes.extend(ahead.flush(&stepper).expect("the last step"));
        assert!(outcomes.iter().all(|outcome| outcome.bad_ranks.is_empty() && outcome.grad_norm > 0.0));
        let weights = without_key_biases(&stepper.flat).to_device(Device::Cpu);
        (Trajectory { losses: outcomes.iter().map(|outcome| outcome.loss).collect(), weights }, ahead.captured_parts())
    }

    pub fn train_solo(steps: u64, size: u64) -> Trajectory {
        Trajectory::train(Arc::new(SoloWorld::new(Device::Cpu)), steps, size, u64::MAX >> 1)
    }

    /// Asserts equal losses to 1e-5, and weights to a tenth of what AdamW can have moved them.
    pub fn assert_matches(&self, other: &Trajectory, label: &str) {
        assert_eq!(self.losses.len(), other.losses.len(), "{label}: a loss for every step");
        for (step, (ours, reference)) in self.losses.iter().zip(&other.losses).enumerate() {
            let difference = (ours - reference).abs() / reference;
            assert!(difference <= 1e-5, "{label}, step {step}: loss {ours} against {reference}, off by {difference:e}");
        }
        let difference = (&self.weights - &other.weights).abs().max().double_value(&[]);
        let within = 0.1 * LR * self.losses.len() as f64;
        assert!(difference <= within, "{label}: weights off by {difference:e}, allowed {within:e}");
    }
}

/// Softmax cancels the bias of the keys: its gradient is pure rounding, which AdamW amplifies to ±lr.
fn without_key_biases(flat: &FlatParams) -> Tensor {
    let weights = flat.master.copy();
    for (index, spec) in flat.specs.iter().enumerate().filter(|(_, spec)| spec.name.ends_with("qkv.bias")) {
        assert_eq!(spec.shape.len(), 1);
        let _ = flat.param_view(&weights, index).chunk(3, 0)[1].zero_();
    }
    weights
}

fn one_to_four_ranks_match() -> Outcome {
    let alone = Trajectory::train_solo(30, BATCH);
    assert!(alone.losses[29] < 0.9 * alone.losses[0], "nothing is learned: {:?}", alone.losses);
    for size in 1..=4 {
        let paths = run_on_threads(size, |world| Trajectory::train(world, 30, BATCH, u64::MAX >> 1));
        for (rank, path) in paths.iter().enumerate() {
            path.assert_matches(&alone, &format!("rank {rank} of {size}"));
            assert_eq!(path.losses, paths[0].losses, "all ranks report the same loss");
            assert!(path.weights.equal(&paths[0].weights), "rank {rank} of {size} holds other weights than rank 0");
        }
    }
    Ok(())
}

fn micro_batches_match_and_reduce_once() -> Outcome {
    let alone = Trajectory::train_solo(10, BATCH);
    for micro in 1..=3 {
        let paths = run_on_threads(2, |world| {
            let recorded = Arc::new(DelayedWorld::new(world, Duration::ZERO));
            let path = Trajectory::train(recorded.clone(), 10, BATCH, micro);
            let buckets =
                stepper(tiny_mae(), Arc::new(SoloWorld::new(Device::Cpu)), Kind::Float, BUCKET).bucket_count();
            let sent: Vec<_> = recorded.events().into_iter().filter(|event| event.channel == "gradients").collect();
            assert_eq!(sent.len(), 10 * buckets, "{buckets} buckets, each once per step");
            for step in sent.chunks(buckets) {
                let elements: Vec<usize> = step.iter().map(|event| event.elements).collect();
                assert_eq!(elements, sent[..buckets].iter().map(|event| event.elements).collect::<Vec<_>>());
            }
            path
        });
        paths.iter().for_each(|path| path.assert_matches(&alone, &format!("micro-batches of {micro}")));
    }
    Ok(())
}

pub trait CountBuckets {
    fn bucket_count(&mut self) -> usize;
}

impl CountBuckets for Stepper {
    /// Buckets start once each in a step, so an empty step counts them.
    fn bucket_count(&mut self) -> usize {
        self.buckets.begin_step();
        self.buckets.finish(SOON).expect("nothing to wait for");
        self.buckets.events().len()
    }
}

/// Local batches and micro-batches of different sizes: a mean of means would be off.
fn uneven_local_batches_and_micro_batches_divide_once() -> Outcome {
    let full = |_: &dyn World| vec![batch(0, 0..7)];
    let step = |world: Arc<dyn World>, cut: &dyn Fn(&dyn World) -> Vec<Batch>| {
        let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
        let outcome = stepper.step(&cut(world.as_ref()), 0.0, |_, _| Ok(())).expect("a step");
        (outcome.loss, outcome.local_loss, stepper.flat.grad.copy())
    };
    let alone = step(Arc::new(SoloWorld::new(Device::Cpu)), &full);
    let ours = run_on_threads(2, |world| {
        step(world, &|world| match world.rank() {
            0 => vec![batch(0, 0..1)],
            _ => vec![batch(0, 1..5), batch(0, 5..6), batch(0, 6..7)],
        })
    });
    for (loss, _, gradient) in &ours {
        assert!((loss - alone.0).abs() <= 1e-6 * alone.0, "loss {loss} against {}", alone.0);
        let difference = (gradient - &alone.2).norm().double_value(&[]);
        assert!(difference <= 1e-5 * alone.2.norm().double_value(&[]), "the gradient is off by {difference:e}");
    }
    let mean = (ours[0].1 + 6.0 * ours[1].1) / 7.0;
    assert!((mean - alone.0).abs() <= 1e-6 * mean, "local losses are those of the samples of the rank");
    Ok(())
}

fn a_rank_without_samples_stays_in_step() -> Outcome {
    let alone = Trajectory::train_solo(5, 2);
    assert!(rank_rows(2, 0, 3).is_empty(), "rank 0 has none");
    let paths = run_on_threads(3, |world| Trajectory::train(world, 5, 2, 1));
    paths.iter().for_each(|path| path.assert_matches(&alone, "two samples on three ranks"));
    // The local losses are reported.
    let local = run_on_threads(3, |world| {
        let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
        stepper.step(&micro_batches(0, 2, world.as_ref(), 1), LR, |_, _| Ok(())).expect("a step").local_loss
    });
    assert!(local[0].is_nan() && local[1].is_finite() && local[2].is_finite(), "{local:?}");
    Ok(())
}

/// A bf16 number is off by up to 2⁻⁸ of itself, on average by a good deal less. The loss is a mean of thousands of
/// squares, each the sum of dozens of such products, with errors of either sign, so at the same weights it is off by
/// less than 2⁻⁹ (0.2 %); ten times that leaves room for two paths that diverge over 200 steps, and none for a lost
/// update or a missing fp32 master.
fn bf16_stays_close_to_fp32() -> Outcome {
    let mut both = [Kind::Float, Kind::BFloat16]
        .map(|kind| stepper(tiny_mae(), Arc::new(SoloWorld::new(Device::Cpu)), kind, BUCKET));
    let mut losses = Vec::new();
    for step in 0..200 {
        let [fp32, bf16] =
            [0, 1].map(|i| both[i].step(&[batch(step, 0..BATCH)], LR, |_, _| Ok(())).expect("a step").loss);
        losses.push((fp32, bf16));
    }
    let difference = |(fp32, bf16): (f64, f64)| (bf16 - fp32).abs() / fp32;
    assert!(difference(losses[0]) <= 2e-3, "at the same weights: {:?}", losses[0]);
    assert!(losses.iter().any(|(fp32, bf16)| fp32 != bf16), "bf16 is fp32");
    let worst = (0..200).max_by(|&a, &b| difference(losses[a]).total_cmp(&difference(losses[b]))).expect("a step");
    assert!(difference(losses[worst]) <= 0.02, "step {worst}: {:?}", losses[worst]);
    let last = losses[180..].iter().map(|loss| loss.1).sum::<f64>() / 20.0;
    assert!(last < 0.7 * losses[0].1, "bf16 learns: {last} after {}", losses[0].1);
    Ok(())
}

/// Returns everything that a step updates, bit for bit.
pub fn state_bytes(stepper: &Stepper) -> Vec<u8> {
    let flat = &stepper.flat;
    let average = stepper.updater.ema.as_ref().expect("an average");
    [&flat.master, &flat.compute, &flat.exp_avg, &flat.exp_avg_sq, &flat.steps, average]
        .map(|buffer| bytes(&buffer.to_device(Device::Cpu)).to_vec())
        .concat()
}

/// Returns the local batch of a step as floats, with one value of one rank replaced.
fn with_bad_value(step: u64, world: &dyn World, rank: usize, value: f64) -> Vec<Batch> {
    let mut batches = micro_batches(step, BATCH, world, 2);
    for batch in &mut batches {
        batch.views[0] = batch.view().to_kind(Kind::Float) / 64.0 - 2.0;
    }
    if world.rank() == rank {
        let _ = batches[0].view().get(0).get(0).get(0).get(9).get(5).fill_(value);
    }
    batches
}

fn a_nan_pixel_is_rejected_by_all_ranks() -> Outcome {
    for (value, rank) in [(f64::NAN, 1), (f64::INFINITY, 2), (f64::NAN, 0)] {
        let results = run_on_threads(3, |world| {
            let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
            let good = |step, stepper: &mut Stepper| {
                let outcome =
                    stepper.step(&with_bad_value(step, world.as_ref(), 9, 0.0), LR, |_, _| Ok(())).expect("a step");
                assert!(outcome.bad_ranks.is_empty() && outcome.loss.is_finite());
                outcome.loss
            };
            good(0, &mut stepper);
            let before = state_bytes(&stepper);
            let mut visible = Vec::new();
            let outcome = stepper
                .step(&with_bad_value(1, world.as_ref(), rank, value), LR, |_, outcome| {
                    visible.clone_from(&outcome.bad_ranks);
                    Ok(())
                })
                .expect("a rejected step is not an error");
            assert_eq!(outcome.bad_ranks, [rank], "rank {} names it", world.rank());
            assert_eq!(visible, [rank], "reported before the update");
            assert!(!outcome.loss.is_finite(), "the loss is reported unchanged");
            assert_eq!(outcome.local_loss.is_finite(), world.rank() != rank, "only its local loss is non-finite");
            assert!(state_bytes(&stepper) == before, "rank {} has changed", world.rank());
            // The next step is unaffected.
            let after = good(2, &mut stepper);
            assert!(state_bytes(&stepper) != before);
            (after, state_bytes(&stepper))
        });
        let untouched = run_on_threads(3, |world| {
            let mut stepper = stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
            let losses = [0, 2].map(|step| {
                stepper.step(&with_bad_value(step, world.as_ref(), 9, 0.0), LR, |_, _| Ok(())).expect("a step").loss
            });
            (losses[1], state_bytes(&stepper))
        });
        assert!(results == untouched, "{value} on rank {rank} changed later steps");
    }
    Ok(())
}

/// A method of three matrices for cases that no real one has. The seed of the batch selects them, in bits: 1 uses
/// `second`, 2 makes the gradient of `first` NaN while the loss stays finite. Nothing uses `third`.
pub struct Toy {
    patchify: Patchify,
    params: ParamSpecs,
    ids: [ParamId; 3],
}

impl Default for Toy {
    fn default() -> Toy {
        let mut params = ParamSpecs::default();
        let ids = ["first", "second", "third"].map(|name| params.add(name, &[3, 5], Init::Normal(1.0)));
        Toy { patchify: Patchify::new(&input()).expect("an input"), params, ids }
    }
}

impl Model for Toy {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    fn cost(&self, _: &Grid, _: i64) -> ModelCost {
        unreachable!("the toy is not timed")
    }
    fn set_recompute(&mut self, _: bool) {
        unreachable!("the toy has no blocks")
    }
    fn depth(&self) -> usize {
        0
    }
    fn encode(&self, _: &Step, _: &Batch, _: EncodeOptions) -> Result<Features> {
        unreachable!("the toy is not probed")
    }
}

impl Method for Toy {
    fn model(&self) -> &dyn Model {
        self
    }
    fn model_mut(&mut self) -> &mut dyn Model {
        self
    }
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let w = step.weights;
        let mut sum = w[self.ids[0]].square().sum(Kind::Float);
        if batch.seed & 1 > 0 {
            sum += w[self.ids[1]].square().sum(Kind::Float);
        }
        if batch.seed & 2 > 0 {
            // The root of 0 is 0, its derivative is ∞, and ∞ · 0 is NaN.
            sum += (&w[self.ids[0]] * 0.0).square().sum(Kind::Float).sqrt();
        }
        Ok(LossOutput::term("toy", sum, Per::Sample))
    }
}

pub fn toy_batch(seed: u64) -> Batch {
    Batch { seed, ..batch(0, 0..1) }
}

fn a_nan_gradient_is_rejected_by_all_ranks() -> Outcome {
    run_on_threads(3, |world| {
        let mut stepper = stepper(Toy::default(), world.clone(), Kind::Float, 1);
        let before = state_bytes(&stepper);
        let seed = if world.rank() == 1 { 2 } else { 0 };
        let outcome = stepper.step(&[toy_batch(seed)], LR, |_, _| Ok(())).expect("a rejected step is not an error");
        assert!(outcome.loss.is_finite() && !outcome.grad_norm.is_finite());
        assert!(outcome.bad_ranks.contains(&1), "{:?}", outcome.bad_ranks);
        assert!(state_bytes(&stepper) == before, "rank {} has changed", world.rank());
    });
    Ok(())
}

fn a_tensor_used_by_one_rank_moves_on_all_and_an_unused_one_on_none() -> Outcome {
    let all = run_on_threads(3, |world| {
        let mut stepper = stepper(Toy::default(), world.clone(), Kind::Float, 1);
        let start: Vec<Vec<u8>> =
            (0..3).map(|i| bytes(&stepper.flat.param_view(&stepper.flat.master, i)).to_vec()).collect();
        // Rank 2 uses the second tensor, in its first micro-batch only.
        let seeds = if world.rank() == 2 { [1, 0] } else { [0, 0] };
        stepper.step(&seeds.map(toy_batch), LR, |_, _| Ok(())).expect("a step");
        let moved = |i: usize| bytes(&stepper.flat.param_view(&stepper.flat.master, i)) != start[i];
        assert_eq!([0, 1, 2].map(moved), [true, true, false], "rank {}", world.rank());
        let counts = [0, 1, 2].map(|i| stepper.flat.steps.double_value(&[i]));
        assert_eq!(counts, [1.0, 1.0, 0.0], "rank {}: updates of unused tensors are not counted", world.rank());
        // A tensor used in one step may be unused in the next.
        let second = bytes(&stepper.flat.param_view(&stepper.flat.master, 1)).to_vec();
        stepper.step(&[toy_batch(0)], LR, |_, _| Ok(())).expect("a step");
        assert!(
            bytes(&stepper.flat.param_view(&stepper.flat.master, 1)) == second,
            "rank {}: once used, always updated",
            world.rank()
        );
        assert_eq!(stepper.flat.steps.double_value(&[0]), 2.0);
        state_bytes(&stepper)
    });
    assert!(all[0] == all[1] && all[0] == all[2], "all ranks hold the same");
    Ok(())
}
