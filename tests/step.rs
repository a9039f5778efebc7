//! The gradient step: the same whatever the number of ranks and micro-batches, and refused by all together.

use crate::support::Outcome;
use occlude::bridge::bytes;
use occlude::data::order::rows;
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::device::world::Delayed;
use occlude::fault::Result;
use occlude::grid::{Grid, Input};
use occlude::method::{Batch, Features, Method, Reconstruction, Term, mae};
use occlude::op::shuffle::Origin;
use occlude::optim::flat::Flat;
use occlude::optim::update::{Config, Updater};
use occlude::part::mask::Mask;
use occlude::part::weights::{Init, Slot, Table, Weights};
use occlude::part::work::Work;
use occlude::rng::{Draw, Purpose};
use occlude::run::pace::{Ahead, Share};
use occlude::run::step::Stepper;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    one_to_four_ranks_take_the_same_path,
    micro_batches_take_the_same_path_and_reduce_once,
    uneven_shares_and_micro_batches_divide_once,
    a_rank_without_samples_keeps_up,
    bf16_stays_beside_fp32,
    a_pixel_that_is_no_number_is_refused_by_all_ranks,
    a_gradient_that_is_no_number_is_refused_by_all_ranks,
    a_tensor_that_one_rank_uses_moves_on_all_and_one_that_none_uses_on_none,
];

pub const SOON: Duration = Duration::from_secs(60);
pub const LR: f64 = 1e-3;
/// Samples of a global batch.
pub const BATCH: u64 = 10;
/// Samples of the made-up data set.
const SAMPLES: u64 = 64;

pub fn input() -> Input {
    let (mean, std) = (vec![0.5], vec![0.25]);
    Input { channels: 1, frames: 1, height: 16, width: 16, patch: 4, patch_frames: 1, mean, std }
}

pub fn tiny() -> mae::Mae {
    let config = json!({
        "encoder": {"width": 32, "depth": 2, "heads": 4}, "decoder": {"width": 24, "depth": 1, "heads": 3},
        "mask": {"ratio": 0.75},
    });
    mae::Mae::new(&serde_json::from_value(config).expect("numbers"), &input()).expect("a method")
}

pub fn optim() -> Config {
    serde_json::from_value(json!({"lr": LR, "weight_decay": 0.05, "ema": 0.99})).expect("numbers")
}

/// About eight buckets for the tiny model.
pub const BUCKET: usize = 16_000;

/// Plain, and in fp32 on the wire.
pub fn stepper(method: impl Method + 'static, world: Arc<dyn World>, kind: Kind, bucket: usize) -> Stepper {
    tch::set_num_threads(1);
    let flat = Flat::new(method.table(), 7, kind, world.device()).expect("buffers");
    let updater = Updater::new(&flat, &optim());
    Stepper::new(Box::new(method), flat, updater, world, bucket, SOON).expect("a stepper")
}

/// The sample at a position of the training: a wave whose direction, length and phase are its own.
fn picture(position: u64) -> (Origin, Vec<u8>) {
    let (id, epoch) = (position % SAMPLES, position / SAMPLES);
    let mut draw = Draw::new(3, id, 0, Purpose::Order, 0);
    let (x, y, phase) = (draw.between(-1.0, 1.0), draw.between(-1.0, 1.0), draw.between(0.0, 6.3));
    let wave = |at: i64| 128.0 + 100.0 * (x * (at % 16) as f64 + y * (at / 16) as f64 + phase).sin();
    (Origin { id, epoch, repeat: 0 }, (0..256).map(|at| wave(at) as u8).collect())
}

/// Rows of the global batch of a step.
fn batch(step: u64, rows: impl Iterator<Item = u64>) -> Batch {
    let (origins, pixels): (Vec<_>, Vec<_>) = rows.map(|row| picture(step * BATCH + row)).unzip();
    let pixels = Tensor::from_slice(&pixels.concat()).view([origins.len() as i64, 1, 1, 16, 16]);
    Batch::new(pixels, &origins, 5)
}

/// This rank's share of a global batch of `size`, in micro-batches of at most `micro` rows.
pub fn share(step: u64, size: u64, world: &dyn World, micro: u64) -> Vec<Batch> {
    let own: Vec<u64> = rows(size, world.rank(), world.size()).collect();
    let device = world.device();
    let there = |batch: Batch| Batch {
        pixels: batch.pixels.to_device(device),
        origins: batch.origins.to_device(device),
        text: None,
        valid: batch.valid,
        seed: batch.seed,
    };
    own.chunks(micro as usize).map(|rows| there(batch(step, rows.iter().copied()))).collect()
}

/// The same as a step ahead of the device takes it, on the CPU.
pub fn load(step: u64, size: u64, world: &dyn World, micro: u64) -> Share {
    let own = rows(size, world.rank(), world.size());
    let (origins, pixels): (Vec<_>, Vec<_>) = own.map(|row| picture(step * BATCH + row)).unzip();
    let pixels = Tensor::from_slice(&pixels.concat()).view([origins.len() as i64, 1, 1, 16, 16]);
    Share { pixels, origins, text: None, valid: None, seed: 5, micro: micro as usize }
}

/// What a training leaves: the loss of every step and the weights.
pub struct Path {
    pub losses: Vec<f64>,
    pub weights: Tensor,
}

impl Path {
    /// Of one rank of a training in fp32.
    pub fn of(world: Arc<dyn World>, steps: u64, size: u64, micro: u64) -> Path {
        let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
        let mut losses = Vec::new();
        for step in 0..steps {
            let outcome = stepper.step(&share(step, size, world.as_ref(), micro), LR, |_, _| Ok(())).expect("a step");
            assert!(outcome.bad_ranks.is_empty() && outcome.grad_norm > 0.0);
            losses.push(outcome.loss);
        }
        let weights = without_key_biases(&stepper.flat).to_device(Device::Cpu);
        Path { losses, weights }
    }

    /// The same with steps ahead, and how many parts of one were captured in the end.
    pub fn ahead(world: Arc<dyn World>, steps: u64, size: u64, micro: u64) -> (Path, usize) {
        let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
        let mut ahead = Ahead::new(size, &stepper, &world).expect("a pace");
        let mut outcomes = Vec::new();
        for step in 0..steps {
            outcomes.extend(ahead.step(&mut stepper, &load(step, size, world.as_ref(), micro), LR).expect("a step"));
        }
        outcomes.extend(ahead.settle(&stepper).expect("the last step"));
        assert!(outcomes.iter().all(|outcome| outcome.bad_ranks.is_empty() && outcome.grad_norm > 0.0));
        let weights = without_key_biases(&stepper.flat).to_device(Device::Cpu);
        (Path { losses: outcomes.iter().map(|outcome| outcome.loss).collect(), weights }, ahead.captured())
    }

    pub fn solo(steps: u64, size: u64) -> Path {
        Path::of(Arc::new(Solo::new(Device::Cpu)), steps, size, u64::MAX >> 1)
    }

    /// Losses to 1e-5, weights to a tenth of what AdamW can have moved them.
    pub fn agrees(&self, other: &Path, what: &str) {
        assert_eq!(self.losses.len(), other.losses.len(), "{what}: a loss for every step");
        for (step, (ours, theirs)) in self.losses.iter().zip(&other.losses).enumerate() {
            let off = (ours - theirs).abs() / theirs;
            assert!(off <= 1e-5, "{what}, step {step}: loss {ours} against {theirs}, off by {off:e}");
        }
        let off = (&self.weights - &other.weights).abs().max().double_value(&[]);
        let within = 0.1 * LR * self.losses.len() as f64;
        assert!(off <= within, "{what}: weights off by {off:e}, allowed {within:e}");
    }
}

/// Softmax does not see the bias of the keys: its gradient is pure rounding, which AdamW blows up to ±lr.
fn without_key_biases(flat: &Flat) -> Tensor {
    let weights = flat.master.copy();
    for (index, spec) in flat.specs.iter().enumerate().filter(|(_, spec)| spec.name.ends_with("qkv.bias")) {
        assert_eq!(spec.shape.len(), 1);
        let _ = flat.part(&weights, index).chunk(3, 0)[1].zero_();
    }
    weights
}

fn one_to_four_ranks_take_the_same_path() -> Outcome {
    let alone = Path::solo(30, BATCH);
    assert!(alone.losses[29] < 0.9 * alone.losses[0], "nothing is learned: {:?}", alone.losses);
    for size in 1..=4 {
        let paths = threads(size, |world| Path::of(world, 30, BATCH, u64::MAX >> 1));
        for (rank, path) in paths.iter().enumerate() {
            path.agrees(&alone, &format!("rank {rank} of {size}"));
            assert_eq!(path.losses, paths[0].losses, "all ranks tell the same loss");
            assert!(path.weights.equal(&paths[0].weights), "rank {rank} of {size} holds other weights than rank 0");
        }
    }
    Ok(())
}

fn micro_batches_take_the_same_path_and_reduce_once() -> Outcome {
    let alone = Path::solo(10, BATCH);
    for micro in 1..=3 {
        let paths = threads(2, |world| {
            let noted = Arc::new(Delayed::new(world, Duration::ZERO));
            let path = Path::of(noted.clone(), 10, BATCH, micro);
            let buckets = stepper(tiny(), Arc::new(Solo::new(Device::Cpu)), Kind::Float, BUCKET).bucket_count();
            let sent: Vec<_> = noted.events().into_iter().filter(|event| event.channel == "gradients").collect();
            assert_eq!(sent.len(), 10 * buckets, "{buckets} buckets, each once a step");
            for step in sent.chunks(buckets) {
                let elements: Vec<usize> = step.iter().map(|event| event.elements).collect();
                assert_eq!(elements, sent[..buckets].iter().map(|event| event.elements).collect::<Vec<_>>());
            }
            path
        });
        paths.iter().for_each(|path| path.agrees(&alone, &format!("micro-batches of {micro}")));
    }
    Ok(())
}

pub trait Counted {
    fn bucket_count(&mut self) -> usize;
}

impl Counted for Stepper {
    /// Buckets start once each in a step, so an empty step counts them.
    fn bucket_count(&mut self) -> usize {
        self.buckets.begin();
        self.buckets.finish(SOON).expect("nothing to wait for");
        self.buckets.events().len()
    }
}

/// Shares and micro-batches of different sizes: a mean of means would be off.
fn uneven_shares_and_micro_batches_divide_once() -> Outcome {
    let whole = |_: &dyn World| vec![batch(0, 0..7)];
    let step = |world: Arc<dyn World>, cut: &dyn Fn(&dyn World) -> Vec<Batch>| {
        let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
        let outcome = stepper.step(&cut(world.as_ref()), 0.0, |_, _| Ok(())).expect("a step");
        (outcome.loss, outcome.local_loss, stepper.flat.gradient.copy())
    };
    let alone = step(Arc::new(Solo::new(Device::Cpu)), &whole);
    let ours = threads(2, |world| {
        step(world, &|world| match world.rank() {
            0 => vec![batch(0, 0..1)],
            _ => vec![batch(0, 1..5), batch(0, 5..6), batch(0, 6..7)],
        })
    });
    for (loss, _, gradient) in &ours {
        assert!((loss - alone.0).abs() <= 1e-6 * alone.0, "loss {loss} against {}", alone.0);
        let off = (gradient - &alone.2).norm().double_value(&[]);
        assert!(off <= 1e-5 * alone.2.norm().double_value(&[]), "the gradient is off by {off:e}");
    }
    let mean = (ours[0].1 + 6.0 * ours[1].1) / 7.0;
    assert!((mean - alone.0).abs() <= 1e-6 * mean, "local losses are those of the rank's own samples");
    Ok(())
}

fn a_rank_without_samples_keeps_up() -> Outcome {
    let alone = Path::solo(5, 2);
    assert!(rows(2, 0, 3).is_empty(), "rank 0 has none");
    let paths = threads(3, |world| Path::of(world, 5, 2, 1));
    paths.iter().for_each(|path| path.agrees(&alone, "two samples on three ranks"));
    // And it says so.
    let local = threads(3, |world| {
        let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
        stepper.step(&share(0, 2, world.as_ref(), 1), LR, |_, _| Ok(())).expect("a step").local_loss
    });
    assert!(local[0].is_nan() && local[1].is_finite() && local[2].is_finite(), "{local:?}");
    Ok(())
}

/// A bf16 number is off by up to 2⁻⁸ of itself, on average by a good deal less. The loss is a mean of thousands of squares,
/// each the sum of dozens of such products, with errors of either sign, so at the same weights it is off by less than 2⁻⁹
/// (0.2 %); ten times that leaves room for two paths that drift apart over 200 steps, and none for a lost update or a
/// missing fp32 master.
fn bf16_stays_beside_fp32() -> Outcome {
    let mut both =
        [Kind::Float, Kind::BFloat16].map(|kind| stepper(tiny(), Arc::new(Solo::new(Device::Cpu)), kind, BUCKET));
    let mut losses = Vec::new();
    for step in 0..200 {
        let [fp32, bf16] =
            [0, 1].map(|i| both[i].step(&[batch(step, 0..BATCH)], LR, |_, _| Ok(())).expect("a step").loss);
        losses.push((fp32, bf16));
    }
    let off = |(fp32, bf16): (f64, f64)| (bf16 - fp32).abs() / fp32;
    assert!(off(losses[0]) <= 2e-3, "at the same weights: {:?}", losses[0]);
    assert!(losses.iter().any(|(fp32, bf16)| fp32 != bf16), "bf16 is fp32");
    let worst = (0..200).max_by(|&a, &b| off(losses[a]).total_cmp(&off(losses[b]))).expect("a step");
    assert!(off(losses[worst]) <= 0.02, "step {worst}: {:?}", losses[worst]);
    let last = losses[180..].iter().map(|loss| loss.1).sum::<f64>() / 20.0;
    assert!(last < 0.7 * losses[0].1, "bf16 learns: {last} after {}", losses[0].1);
    Ok(())
}

/// All that a step moves, to the bit.
pub fn state(stepper: &Stepper) -> Vec<u8> {
    let flat = &stepper.flat;
    let average = stepper.updater.average.as_ref().expect("an average");
    [&flat.master, &flat.compute, &flat.first, &flat.second, &flat.steps, average]
        .map(|buffer| bytes(&buffer.to_device(Device::Cpu)).to_vec())
        .concat()
}

/// The rank's share of a step as floats, with one value of one rank replaced.
fn spoiled(step: u64, world: &dyn World, rank: usize, value: f64) -> Vec<Batch> {
    let mut own = share(step, BATCH, world, 2);
    for batch in &mut own {
        batch.pixels = batch.pixels.to_kind(Kind::Float) / 64.0 - 2.0;
    }
    if world.rank() == rank {
        let _ = own[0].pixels.get(0).get(0).get(0).get(9).get(5).fill_(value);
    }
    own
}

fn a_pixel_that_is_no_number_is_refused_by_all_ranks() -> Outcome {
    for (value, rank) in [(f64::NAN, 1), (f64::INFINITY, 2), (f64::NAN, 0)] {
        let results = threads(3, |world| {
            let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
            let good = |step, stepper: &mut Stepper| {
                let outcome = stepper.step(&spoiled(step, world.as_ref(), 9, 0.0), LR, |_, _| Ok(())).expect("a step");
                assert!(outcome.bad_ranks.is_empty() && outcome.loss.is_finite());
                outcome.loss
            };
            good(0, &mut stepper);
            let before = state(&stepper);
            let mut seen = Vec::new();
            let outcome = stepper
                .step(&spoiled(1, world.as_ref(), rank, value), LR, |_, outcome| {
                    seen.clone_from(&outcome.bad_ranks);
                    Ok(())
                })
                .expect("a refused step is no fault");
            assert_eq!(outcome.bad_ranks, [rank], "rank {} names it", world.rank());
            assert_eq!(seen, [rank], "and tells before it would move");
            assert!(!outcome.loss.is_finite(), "the loss is told as it is");
            assert_eq!(outcome.local_loss.is_finite(), world.rank() != rank, "only its own is bad");
            assert!(state(&stepper) == before, "rank {} has moved", world.rank());
            // The next step is as if nothing had been.
            let after = good(2, &mut stepper);
            assert!(state(&stepper) != before);
            (after, state(&stepper))
        });
        let untouched = threads(3, |world| {
            let mut stepper = stepper(tiny(), world.clone(), Kind::Float, BUCKET);
            let losses = [0, 2].map(|step| {
                stepper.step(&spoiled(step, world.as_ref(), 9, 0.0), LR, |_, _| Ok(())).expect("a step").loss
            });
            (losses[1], state(&stepper))
        });
        assert!(results == untouched, "{value} on rank {rank} left a trace");
    }
    Ok(())
}

/// A method of three matrices for what no real one does. The batch's seed says what happens, in bits: 1 uses `second`,
/// 2 makes the gradient of `first` no number while the loss stays one. Nothing uses `third`.
pub struct Toy {
    grid: Grid,
    table: Table,
    slots: [Slot; 3],
}

impl Toy {
    pub fn new() -> Toy {
        let mut table = Table::default();
        let slots = ["first", "second", "third"].map(|name| table.add(name, &[3, 5], Init::Normal(1.0)));
        Toy { grid: input().grid().expect("a grid"), table, slots }
    }
}

impl Method for Toy {
    fn grid(&self) -> &Grid {
        &self.grid
    }
    fn table(&self) -> &Table {
        &self.table
    }
    fn recompute(&mut self) {
        unreachable!("a toy has no blocks")
    }
    fn name(&self) -> &'static str {
        "toy"
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        vec![("toy", samples as f64)]
    }
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let mut sum = w[self.slots[0]].square().sum(Kind::Float);
        if batch.seed & 1 > 0 {
            sum += w[self.slots[1]].square().sum(Kind::Float);
        }
        if batch.seed & 2 > 0 {
            // The root of 0 is 0, its derivative is ∞, and ∞ · 0 is no number.
            sum += (&w[self.slots[0]] * 0.0).square().sum(Kind::Float).sqrt();
        }
        Ok(vec![Term { name: "toy", sum }])
    }
    fn work(&self, _batch: u64) -> Work {
        unreachable!("nobody times a toy")
    }
    fn mask(&self, _: &Batch) -> Mask {
        unreachable!("a toy hides nothing")
    }
    fn normalised(&self, _: &Batch) -> Result<Tensor> {
        unreachable!("nobody dumps a toy")
    }
    fn features(&self, _: &Weights, _: &Batch) -> Result<Features> {
        unreachable!("nobody probes a toy")
    }
    fn reconstruct(&self, _: &Weights, _: &Batch) -> Result<Reconstruction> {
        unreachable!("nobody draws a toy")
    }
}

pub fn toy_batch(seed: u64) -> Batch {
    Batch { seed, ..batch(0, 0..1) }
}

fn a_gradient_that_is_no_number_is_refused_by_all_ranks() -> Outcome {
    threads(3, |world| {
        let mut stepper = stepper(Toy::new(), world.clone(), Kind::Float, 1);
        let before = state(&stepper);
        let seed = if world.rank() == 1 { 2 } else { 0 };
        let outcome = stepper.step(&[toy_batch(seed)], LR, |_, _| Ok(())).expect("a refused step is no fault");
        assert!(outcome.loss.is_finite() && !outcome.grad_norm.is_finite());
        assert!(outcome.bad_ranks.contains(&1), "{:?}", outcome.bad_ranks);
        assert!(state(&stepper) == before, "rank {} has moved", world.rank());
    });
    Ok(())
}

fn a_tensor_that_one_rank_uses_moves_on_all_and_one_that_none_uses_on_none() -> Outcome {
    let all = threads(3, |world| {
        let mut stepper = stepper(Toy::new(), world.clone(), Kind::Float, 1);
        let begun: Vec<Vec<u8>> = (0..3).map(|i| bytes(&stepper.flat.part(&stepper.flat.master, i)).to_vec()).collect();
        // Rank 2 uses the second tensor, in its first micro-batch only.
        let seeds = if world.rank() == 2 { [1, 0] } else { [0, 0] };
        stepper.step(&seeds.map(toy_batch), LR, |_, _| Ok(())).expect("a step");
        let moved = |i: usize| bytes(&stepper.flat.part(&stepper.flat.master, i)) != begun[i];
        assert_eq!([0, 1, 2].map(moved), [true, true, false], "rank {}", world.rank());
        let counts = [0, 1, 2].map(|i| stepper.flat.steps.double_value(&[i]));
        assert_eq!(counts, [1.0, 1.0, 0.0], "rank {}: updates of the unused are not counted", world.rank());
        // What a step uses, the next one may leave alone.
        let second = bytes(&stepper.flat.part(&stepper.flat.master, 1)).to_vec();
        stepper.step(&[toy_batch(0)], LR, |_, _| Ok(())).expect("a step");
        assert!(
            bytes(&stepper.flat.part(&stepper.flat.master, 1)) == second,
            "rank {}: used once, for good",
            world.rank()
        );
        assert_eq!(stepper.flat.steps.double_value(&[0]), 2.0);
        state(&stepper)
    });
    assert!(all[0] == all[1] && all[0] == all[2], "all ranks hold the same");
    Ok(())
}
