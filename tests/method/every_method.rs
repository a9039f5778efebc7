//! Laws that every method obeys, checked on its tiny config with made-up samples: the same on 1 to 4 ranks, resumed to
//! the bit, no synchronization of host and device, gradients as finite differences have them.

use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, root};
use crate::train::step_mode::{assert_no_synchronization, record_spans};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::modality::Modality;
use occlude::data::order::rank_rows;
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::grid::Grid;
use occlude::method::catalog;
use occlude::method::{Batch, Method, Progress, Step};
use occlude::op::shuffle::SampleKey;
use occlude::optim::flat::FlatParams;
use occlude::optim::update::Updater;
use occlude::part::batch::{NO_LABEL, Side};
use occlude::part::params::Weights;
use occlude::rng::{Philox, Purpose};
use occlude::train::controls::StepRates;
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepPipeline};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    one_to_four_ranks_train_alike,
    a_restored_training_goes_on_to_the_bit,
    a_pipelined_step_never_synchronizes,
    gradients_are_finite_differences,
];

const BATCH: u64 = 12;
const LR: f64 = 3e-4;
const TIMEOUT: Duration = Duration::from_secs(600);

/// Reads the tiny config of a method.
pub fn tiny_config(method: &str) -> Result<Config, Failed> {
    Ok(Config::read(&root().join(format!("configs/tiny/{method}.json")), &[])?)
}

/// The tiny configs of all methods.
fn configs() -> Result<Vec<Config>, Failed> {
    catalog::Config::NAMES.iter().map(|name| tiny_config(name)).collect()
}

/// Makes up samples by their index in a data set: pixels, captions and labels where the method reads them.
pub fn synthetic_batch(config: &Config, grid: &Grid, step: u64, rows: Range<u64>) -> Result<Batch, Failed> {
    let requirements = config.method.requirements();
    let [c, t, y, x] = match config.view.modality() {
        Modality::Audio => grid.pixel_shape(),
        Modality::Image => config.view.shape(grid),
    };
    let mut pixels = Vec::new();
    let mut keys = Vec::new();
    let mut captions = Vec::new();
    let mut labels = Vec::new();
    for row in rows.clone() {
        // A data set of three steps.
        let id = step % 3 * 1000 + row;
        keys.push(SampleKey { id, epoch: step / 3, repeat: 0 });
        let mut rng = Philox::new(5, id, 0, Purpose::Probe, 0);
        let row_pixels = (0..c * t * y * x).map(|_| rng.uniform() as f32);
        pixels.extend(row_pixels);
        if let Some(text) = requirements.captions {
            let words = 2 + rng.uniform_int(text.context_length as u64 - 2) as i64;
            let word = |at: i64, rng: &mut Philox| match at {
                at if at < words => 1 + rng.uniform_int(text.vocab_size as u64 - 1) as i64,
                _ => 0,
            };
            captions.extend((0..text.context_length).map(|at| word(at, &mut rng)));
        }
        let classes = requirements.classes.unwrap_or(1);
        labels.push(if row % 4 == 3 { NO_LABEL } else { rng.uniform_int(classes as u64) as i64 });
    }
    let n = rows.end.saturating_sub(rows.start) as i64;
    let pixels = Tensor::from_slice(&pixels).view([n, c, t, y, x]);
    let pixels = match config.view.modality() {
        Modality::Audio => pixels * 4.0 - 2.0,
        Modality::Image => (pixels * 255.0).to_kind(Kind::Uint8),
    };
    let side = Side {
        captions: requirements.captions.map(|text| Tensor::from_slice(&captions).view([n, text.context_length])),
        labels: requirements.classes.map(|_| Tensor::from_slice(&labels)),
        valid: None,
    };
    Ok(Batch::new(pixels, &keys, 9).with_side(side))
}

fn stepper(config: &Config, world: &Arc<dyn World>) -> Stepper {
    tch::set_num_threads(1);
    let method = config.method.build(&config.input).expect("a method");
    let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu).expect("buffers");
    let updater = Updater::new(&flat, &config.optim);
    Stepper::new(method, flat, updater, world.clone(), 1 << 16, TIMEOUT).expect("a stepper")
}

fn rates(step: u64) -> StepRates {
    let progress =
        Progress { samples: step * BATCH, global_batch: BATCH, epoch_samples: 36, total_samples: 30 * BATCH };
    StepRates { lr: LR, progress }
}

/// Returns this rank's part of a step.
fn local_rows(config: &Config, stepper: &Stepper, step: u64, world: &dyn World) -> Batch {
    let rows = rank_rows(BATCH, world.rank(), world.size());
    synthetic_batch(config, &stepper.method.grid(), step, rows).expect("samples")
}

fn take(config: &Config, stepper: &mut Stepper, step: u64, world: &dyn World) -> f64 {
    let batch = local_rows(config, stepper, step, world);
    let outcome = stepper.step(&[batch], rates(step), |_, _| Ok(())).expect("a step");
    assert!(outcome.bad_ranks.is_empty(), "step {step} is refused");
    outcome.loss
}

/// Returns the losses of `steps` steps, and the buffers after the first three: rounding that Adam enlarges step by step
/// has not yet reached them.
fn train(config: &Config, world: &Arc<dyn World>, steps: u64) -> (Vec<f64>, Vec<Tensor>) {
    let mut stepper = stepper(config, world);
    let mut buffers = Vec::new();
    let losses = (0..steps).map(|step| {
        let loss = take(config, &mut stepper, step, world.as_ref());
        if step == 2 {
            buffers = stepper.buffers.iter().map(|(_, value)| value.copy()).collect();
        }
        loss
    });
    (losses.collect(), buffers)
}

fn one_to_four_ranks_train_alike() -> Outcome {
    for config in configs()? {
        let name = config.method.name();
        let alone: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
        let (expected, buffers) = train(&config, &alone, 30);
        assert!(expected[29] < expected[0], "{name} does not learn: {expected:?}");
        for size in 2..=4 {
            for (losses, others) in run_on_threads(size, |world| train(&config, &world, 30)) {
                for (step, (ours, loss)) in losses.iter().zip(&expected).enumerate() {
                    let difference = (ours - loss).abs() / loss;
                    assert!(difference <= 1e-5, "{name}, {size} ranks, step {step}: {ours} against {loss}");
                }
                for (ours, buffer) in others.iter().zip(&buffers) {
                    let difference = (ours - buffer).abs().max().double_value(&[]);
                    let limit = 1e-5 * buffer.abs().max().double_value(&[]);
                    assert!(difference <= limit, "{name}, {size} ranks: a buffer is off by {difference:e}");
                }
            }
        }
    }
    Ok(())
}

fn a_restored_training_goes_on_to_the_bit() -> Outcome {
    for config in configs()? {
        let name = config.method.name();
        let pairs = run_on_threads(2, |world| {
            let whole = train(&config, &world, 6).0;
            let mut first = stepper(&config, &world);
            for step in 0..3 {
                take(&config, &mut first, step, world.as_ref());
            }
            let mut second = stepper(&config, &world);
            crate::train::toy_method::restore_from(&mut second, &first, 3, &world);
            let rest: Vec<f64> = (3..6).map(|step| take(&config, &mut second, step, world.as_ref())).collect();
            (whole, rest)
        });
        for (whole, rest) in pairs {
            assert_eq!(whole[3..], rest, "{name}");
        }
    }
    Ok(())
}

fn local_batch(config: &Config, stepper: &Stepper, step: u64, world: &dyn World) -> LocalBatch {
    let Batch { views, side, seed, .. } = local_rows(config, stepper, step, world);
    let keys = (0..BATCH).map(|row| SampleKey { id: step % 3 * 1000 + row, epoch: step / 3, repeat: 0 }).collect();
    LocalBatch { views, keys, side, seed, micro_batch: BATCH as usize }
}

fn a_pipelined_step_never_synchronizes() -> Outcome {
    for config in configs()? {
        let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
        let mut stepper = stepper(&config, &world);
        let mut pipeline = StepPipeline::new(BATCH, &stepper, &world)?;
        let locals: Vec<LocalBatch> = (0..5).map(|step| local_batch(&config, &stepper, step, world.as_ref())).collect();
        // The first step makes the constants of the device, as it does outside a captured graph.
        drop(pipeline.step(&mut stepper, &locals[4], rates(4))?);
        let steps = record_spans(|step| {
            drop(pipeline.step(&mut stepper, &locals[step as usize], rates(step)).expect("a step"));
        });
        println!("{}", config.method.name());
        assert_no_synchronization(&steps);
    }
    Ok(())
}

/// Returns the loss of a batch with weights in fp64, w + t · direction.
fn loss_along(method: &dyn Method, batch: &Batch, weights: &[Tensor], directions: &[Tensor], t: f64) -> f64 {
    let moved = weights.iter().zip(directions).map(|(w, d)| w + d * t).collect();
    objective(method, batch, &Weights::new(moved)).double_value(&[])
}

fn objective(method: &dyn Method, batch: &Batch, weights: &Weights) -> Tensor {
    let step = Step {
        buffers: occlude::part::buffers::Buffers::new(&method.buffers(), 3, Device::Cpu),
        scheduled: Tensor::from_slice(&method.scheduled(&Progress::default())),
        ..Step::with_weights(weights)
    };
    let counts = method.denominators(batch).expect("counts");
    let output = method.loss(&step, batch).expect("a loss");
    let means = output.terms.iter().map(|term| term.sum.to_kind(Kind::Double) / counts.get(term.per));
    means.reduce(|a, b| a + b).expect("a term")
}

fn gradients_are_finite_differences() -> Outcome {
    for config in configs()? {
        let name = config.method.name();
        let method = config.method.build(&config.input)?;
        let batch = synthetic_batch(&config, &method.grid(), 0, 0..4)?;
        // Initial biases of 0 would put rectifiers at their kink.
        let flat = crate::support::parity::perturbed_weights(method.as_ref())?;
        let weights: Vec<Tensor> = (0..flat.specs.len())
            .map(|index| flat.param_view(&flat.master, index).to_kind(Kind::Double).detach())
            .collect();
        let leaves: Vec<Tensor> = weights.iter().map(|w| w.copy().set_requires_grad(true)).collect();
        let loss =
            objective(method.as_ref(), &batch, &Weights::new(leaves.iter().map(Tensor::shallow_clone).collect()));
        loss.backward();
        for direction in 0..3 {
            let directions: Vec<Tensor> = weights
                .iter()
                .zip(100 * direction..)
                .map(|(w, seed)| crate::support::normal(seed, &w.size()).to_kind(Kind::Double))
                .collect();
            let along: f64 = leaves
                .iter()
                .zip(&directions)
                .filter(|(leaf, _)| leaf.grad().defined())
                .map(|(leaf, d)| (leaf.grad() * d).sum(Kind::Double).double_value(&[]))
                .sum();
            let h = 1e-5;
            let at = |t: f64| loss_along(method.as_ref(), &batch, &weights, &directions, t);
            // Fourth order, so that the error is that of rounding.
            let difference = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
            let error = (difference - along).abs();
            assert!(error <= 1e-4 * along.abs().max(1e-2), "{name}: {along} by backward, {difference} by differences");
        }
    }
    Ok(())
}
