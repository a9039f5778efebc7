//! Tests of training on a CUDA device, compared with the CPU, and of captured graphs, compared with eager steps.

use crate::method::flip;
use crate::support::child_process::run_case;
use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, skipped, trial_name};
use crate::train::step::{BATCH, BUCKET, LR, Trajectory, input, optim, pipelined_batch, state_bytes, stepper};
use crate::view::log_mel;
use libtest_mimic::{Failed, Trial};
use occlude::bridge::cuda;
use occlude::dist::World;
use occlude::dist::solo::SoloWorld;
use occlude::error::{Error, Result};
use occlude::method::mae;
use occlude::optim::flat::{FlatOptions, FlatParams, ShardOptions};
use occlude::optim::update::Updater;
use occlude::train::outcome;
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepPipeline};
use serde_json::json;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path as File;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor, no_grad};

type OnDevice = fn() -> Result<()>;

/// Tests that need a device, each in its own process: test name, case name, body.
const ON_A_DEVICE: [(&str, &str, OnDevice); 10] = [
    ("training_on_a_gpu_matches_the_cpu", "gpu-path", path),
    ("captured_steps_match_the_cpu_with_ragged_micro_batches", "gpu-captured", captured),
    ("captured_steps_with_captions_match_the_cpu", "gpu-captions", captions),
    ("captured_steps_on_waveforms_match_the_cpu_on_spectrograms", "gpu-sounds", sounds),
    ("captured_steps_match_eager_steps_bit_for_bit", "gpu-equal", equal),
    ("captured_sharded_steps_match_full_ones_bit_for_bit", "gpu-shards", shards),
    ("a_resumed_training_matches_an_uninterrupted_one_bit_for_bit", "gpu-resumed", resumed_training),
    ("a_non_finite_step_is_rejected_inside_a_graph", "gpu-refused", rejected_step),
    ("captured_steps_allocate_no_more_memory", "gpu-memory", memory),
    ("a_loss_with_a_host_sync_fails_instead_of_being_captured", "gpu-curious", host_sync_in_loss),
];

pub fn trials() -> Vec<Trial> {
    let trial = |(name, case, _): (&str, &'static str, OnDevice)| {
        let name = trial_name(module_path!(), name);
        if File::new("/dev/nvidiactl").exists() {
            Trial::test(name, move || -> Outcome {
                let (code, output, why) = run_case(case)?;
                if code == Some(0) { Ok(()) } else { Err(Failed::from(format!("{code:?}\n{output}{why}"))) }
            })
        } else {
            skipped(&name, "no CUDA device here")
        }
    };
    ON_A_DEVICE.into_iter().map(trial).collect()
}

/// Runs a case. Returns the exit code.
pub fn case(name: &str) -> i32 {
    let (_, _, case) = ON_A_DEVICE.into_iter().find(|(_, case, _)| *case == name).expect("a case");
    occlude::bridge::load_cuda();
    match case() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

fn gpu() -> Arc<dyn World> {
    Arc::new(SoloWorld::new(Device::Cuda(0)))
}

fn path() -> Result<()> {
    for micro in [BATCH, 3] {
        Trajectory::train(gpu(), 30, BATCH, micro).assert_matches(&Trajectory::train_solo(30, BATCH), "on a GPU");
    }
    Ok(())
}

fn captured() -> Result<()> {
    for (micro, parts) in [(BATCH, 1), (5, 2), (3, 2)] {
        let (path, captured) = Trajectory::train_pipelined(gpu(), 20, BATCH, micro);
        path.assert_matches(&Trajectory::train_solo(20, BATCH), &format!("captured, micro-batches of {micro}"));
        assert_eq!(
            captured, parts,
            "micro-batches of {micro}: one part that accumulates if there are several, and the last"
        );
    }
    Ok(())
}

/// Heads of 32 and 24 in bf16: our own kernels, which sum in a fixed order.
fn exact() -> mae::Mae {
    let config = json!({
        "encoder": {"width": 64, "depth": 2, "heads": 2}, "decoder": {"width": 48, "depth": 1, "heads": 2},
        "mask": {"ratio": 0.75},
    });
    mae::Mae::new(&serde_json::from_value(config).expect("numbers"), &input()).expect("a method")
}

/// A pipelined training on the device.
struct PipelinedRun {
    // Dropped before the buffers that its graphs read and write.
    pipeline: StepPipeline,
    stepper: Stepper,
}

impl PipelinedRun {
    fn new() -> Result<PipelinedRun> {
        PipelinedRun::build(false)
    }

    fn build(sharded: bool) -> Result<PipelinedRun> {
        let method = exact();
        let world = gpu();
        let config = optim();
        let kind_and_device = (Kind::BFloat16, world.device());
        let flat = if sharded {
            FlatParams::new_sharded(
                method.params(),
                FlatOptions { seed: 7, kind: kind_and_device.0, device: kind_and_device.1 },
                ShardOptions { bucket_bytes: BUCKET, rank: 0, world_size: 1 },
            )?
        } else {
            FlatParams::new(method.params(), 7, kind_and_device.0, kind_and_device.1)?
        };
        let updater = Updater::new(&flat, &config);
        let stepper = Stepper::new(Box::new(method), flat, updater, world.clone(), BUCKET, Duration::from_secs(60))?;
        Ok(PipelinedRun { pipeline: StepPipeline::new(BATCH, &stepper, &world)?, stepper })
    }

    /// Runs steps and returns their losses.
    fn run_steps(&mut self, steps: std::ops::Range<u64>) -> Result<Vec<f64>> {
        let mut output: Vec<outcome::Outcome> = Vec::new();
        for step in steps {
            output.extend(self.pipeline.step(
                &mut self.stepper,
                &pipelined_batch(step, BATCH, gpu().as_ref(), 4),
                LR,
            )?);
        }
        output.extend(self.pipeline.flush(&self.stepper)?);
        assert!(output.iter().all(|outcome| outcome.bad_ranks.is_empty()));
        Ok(output.iter().map(|outcome| outcome.loss).collect())
    }
}

/// Returns the losses of ten steps of two towers, and the number of captured parts.
fn pairs(towers: &'static str, world: &Arc<dyn World>) -> Result<(Vec<f64>, usize)> {
    let mut stepper = flip::stepper(towers, world.clone());
    let mut pipeline = StepPipeline::new(flip::PAIRS, &stepper, world)?;
    let mut output: Vec<outcome::Outcome> = Vec::new();
    for step in 0..10 {
        output.extend(pipeline.step(&mut stepper, &flip::local_batch(step, world.as_ref()), LR)?);
    }
    output.extend(pipeline.flush(&stepper)?);
    Ok((output.iter().map(|outcome| outcome.loss).collect(), pipeline.captured_parts()))
}

/// Similarities are multiplied by 14 before the exponential, which amplifies rounding: 1e-4.
fn captions() -> Result<()> {
    let cpu: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    for towers in ["flip", "clip"] {
        let (expected, _) = pairs(towers, &cpu)?;
        let (losses, captured) = pairs(towers, &gpu())?;
        assert_eq!((losses.len(), captured), (10, 1));
        let difference = losses
            .iter()
            .zip(&expected)
            .map(|(ours, reference)| (ours - reference).abs() / reference)
            .fold(0.0, f64::max);
        assert!(difference <= 1e-4, "{towers}: off by {difference:e}: {losses:?} for {expected:?}");
    }
    Ok(())
}

fn sounds() -> Result<()> {
    let (losses, captured) = log_mel::pipelined_losses(&gpu());
    log_mel::assert_losses_match(&losses).map_err(|failed| Error::failed(failed.message().unwrap_or("they differ")))?;
    assert_eq!(captured, 2, "micro-batches of four, and one of the last two");
    Ok(())
}

fn equal() -> Result<()> {
    let mut run = PipelinedRun::new()?;
    let losses = run.run_steps(0..20)?;
    assert_eq!(run.pipeline.captured_parts(), 2);
    // The same parts, never captured.
    let mut plain = PipelinedRun::new()?.stepper;
    for step in 0..20 {
        let batches = pipelined_batch(step, BATCH, gpu().as_ref(), 4).micro_batches(Device::Cuda(0))?;
        plain.set_controls(&batches, &LR.into())?;
        plain.begin();
        for (index, batch) in batches.iter().enumerate() {
            plain.accumulate(batch, index + 1 == batches.len())?;
        }
        let report = Vec::<f64>::try_from(&plain.finish()?.to_device(Device::Cpu))?;
        let loss = plain.decode_report(&report).loss;
        assert_eq!(
            loss.to_bits(),
            losses[step as usize].to_bits(),
            "step {step}: {loss} for {}",
            losses[step as usize]
        );
    }
    assert!(state_bytes(&run.stepper) == state_bytes(&plain), "the weights differ");
    assert!(losses[19] < losses[0], "nothing is learned: {losses:?}");
    Ok(())
}

/// The first part also gathers, so it differs from the second of the same number of samples.
fn shards() -> Result<()> {
    let mut full = PipelinedRun::new()?;
    let mut shards = PipelinedRun::build(true)?;
    let [ours, reference] = [shards.run_steps(0..12)?, full.run_steps(0..12)?];
    assert!(ours.iter().zip(&reference).all(|(a, b)| a.to_bits() == b.to_bits()), "{ours:?}\n{reference:?}");
    assert_eq!((shards.pipeline.captured_parts(), full.pipeline.captured_parts()), (3, 2));
    Ok(())
}

fn resumed_training() -> Result<()> {
    let mut full = PipelinedRun::new()?;
    let losses = full.run_steps(0..12)?;
    let mut first = PipelinedRun::new()?;
    let start = first.run_steps(0..6)?;
    let mut second = PipelinedRun::new()?;
    let parts = |run: &PipelinedRun| {
        let flat = &run.stepper.flat;
        let average = run.stepper.updater.ema.as_ref().expect("an average");
        [&flat.master, &flat.compute, &flat.exp_avg, &flat.exp_avg_sq, &flat.steps, average].map(Tensor::shallow_clone)
    };
    no_grad(|| parts(&second).iter_mut().zip(parts(&first)).for_each(|(to, from)| to.copy_(&from)));
    cuda::synchronize(0)?;
    let ended = second.run_steps(6..12)?;
    let resumed = [start, ended].concat();
    assert!(resumed.iter().zip(&losses).all(|(a, b)| a.to_bits() == b.to_bits()), "{resumed:?}\n{losses:?}");
    assert!(state_bytes(&second.stepper) == state_bytes(&full.stepper), "the weights differ");
    Ok(())
}

fn rejected_step() -> Result<()> {
    let mut run = PipelinedRun::new()?;
    let floats = |step, bad: bool| {
        let batch = pipelined_batch(step, BATCH, gpu().as_ref(), 4);
        let pixels = batch.views[0].to_kind(Kind::Float) / 64.0 - 2.0;
        if bad {
            let _ = pixels.get(0).get(0).get(0).get(9).get(5).fill_(f64::NAN);
        }
        LocalBatch { views: vec![pixels], ..batch }
    };
    for step in 0..6 {
        run.pipeline.step(&mut run.stepper, &floats(step, false), LR)?;
    }
    run.pipeline.flush(&run.stepper)?;
    assert_eq!(run.pipeline.captured_parts(), 2);
    let before = state_bytes(&run.stepper);
    assert!(run.pipeline.step(&mut run.stepper, &floats(6, true), LR)?.is_none());
    let bad = run.pipeline.flush(&run.stepper)?.expect("its outcome");
    assert!(bad.bad_ranks == [0] && !bad.loss.is_finite(), "{bad:?}");
    assert!(state_bytes(&run.stepper) == before, "a rejected step has changed something");
    run.pipeline.step(&mut run.stepper, &floats(7, false), LR)?;
    let good = run.pipeline.flush(&run.stepper)?.expect("its outcome");
    assert!(good.bad_ranks.is_empty() && good.loss.is_finite() && state_bytes(&run.stepper) != before, "{good:?}");
    Ok(())
}

fn memory() -> Result<()> {
    let mut run = PipelinedRun::new()?;
    run.run_steps(0..6)?;
    let after = cuda::memory_stats(0)?;
    run.run_steps(6..20)?;
    let later = cuda::memory_stats(0)?;
    assert_eq!((later.allocated, later.reserved), (after.allocated, after.reserved));
    Ok(())
}

/// A loss that reads a number on the host runs eagerly, and ends the training where it would be captured.
fn host_sync_in_loss() -> Result<()> {
    let world = gpu();
    let mut stepper = stepper(crate::train::step_mode::synchronizing_loss(), world.clone(), Kind::Float, BUCKET);
    let mut pipeline = StepPipeline::new(BATCH, &stepper, &world)?;
    let mut step = |step| {
        let batch = pipelined_batch(step, BATCH, world.as_ref(), BATCH);
        catch_unwind(AssertUnwindSafe(|| pipeline.step(&mut stepper, &batch, LR))).is_ok_and(|output| output.is_ok())
    };
    assert_eq!([0, 1, 2, 3].map(&mut step), [true, true, true, false]);
    // The allocator of libtorch is unreliable after this.
    std::process::exit(0)
}
