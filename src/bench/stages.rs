//! A training step with a timestamp after each stage: the trainer's operations, queued one by one without a CUDA graph.
//! Nothing is read back in between, so that timestamps on a GPU measure the GPU's own time.

use super::input::BenchBatch;
use crate::bridge::record::scope;
use crate::config::Config;
use crate::dist::World;
use crate::error::Result;
use crate::timing::timestamp::{Timestamp, synchronize_device};
use crate::train::controls::StepRates;
use crate::train::step::Stepper;
use std::time::Duration;

/// A stage of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepStage {
    /// Samples are copied to the device.
    Copy,
    Forward,
    Backward,
    /// The part of the gradient reduction that backward does not hide.
    Reduce,
    /// Zeroing the gradients, gradient norm, clipping and AdamW.
    Update,
}

impl StepStage {
    /// All stages, in the order of a step.
    pub const ALL: [StepStage; 5] =
        [StepStage::Copy, StepStage::Forward, StepStage::Backward, StepStage::Reduce, StepStage::Update];

    /// Returns the stage's name in a trace.
    const fn name(self) -> &'static str {
        match self {
            StepStage::Copy => "copy",
            StepStage::Forward => "forward",
            StepStage::Backward => "backward",
            StepStage::Reduce => "reduce",
            StepStage::Update => "update",
        }
    }
}

/// Timestamps at the end of each stage of one step.
pub struct StageTimes {
    start: Timestamp,
    ends: Vec<(StepStage, Timestamp)>,
}

impl StageTimes {
    /// Returns the seconds of each stage in the order of [`StepStage::ALL`]. Waits for the device.
    pub fn seconds(&self, world: &dyn World) -> Result<[f64; 5]> {
        synchronize_device(world.device())?;
        let mut seconds = [0.0; 5];
        let mut previous = &self.start;
        for (stage, end) in &self.ends {
            seconds[*stage as usize] += end.seconds_since(previous)?;
            previous = end;
        }
        Ok(seconds)
    }

    /// Runs `body` as part of `stage` and records its end.
    fn run<T>(&mut self, stage: StepStage, world: &dyn World, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let _scope = scope(stage.name());
        let result = body()?;
        self.ends.push((stage, Timestamp::now(world.device())?));
        Ok(result)
    }
}

/// Runs one step on `batch` stage by stage; the weights move as in [`Stepper::step`].
pub fn run_staged_step(
    stepper: &mut Stepper,
    batch: &BenchBatch,
    config: &Config,
    world: &dyn World,
    lr: f64,
    timeout: Duration,
) -> Result<StageTimes> {
    let mut times = StageTimes { start: Timestamp::now(world.device())?, ends: Vec::new() };
    let micro_batches = times.run(StepStage::Copy, world, || {
        let micro_batches = batch.local_batch(config)?.micro_batches(world.device())?;
        stepper.set_controls(&micro_batches, &StepRates::from(lr))?;
        Ok(micro_batches)
    })?;
    times.run(StepStage::Update, world, || {
        stepper.begin();
        Ok(())
    })?;
    for (index, batch) in micro_batches.iter().enumerate() {
        stepper.buckets.set_last_micro_batch(index + 1 == micro_batches.len());
        let loss = times.run(StepStage::Forward, world, || stepper.forward(batch))?;
        times.run(StepStage::Backward, world, || Ok(loss.f_backward()?))?;
    }
    times.run(StepStage::Reduce, world, || {
        stepper.buckets.finish_weight_gather(timeout)?;
        stepper.buckets.finish(timeout)
    })?;
    times.run(StepStage::Update, world, || {
        let square_sum = stepper.buckets.square_sum(&stepper.flat, timeout)?;
        let scale = match config.optim.clip_grad_norm {
            Some(_) => stepper.updater.clip_scale(f64::from(square_sum.double_value(&[]) as f32).sqrt()),
            None => 1.0,
        };
        let used = stepper.buckets.used_params();
        stepper.updater.update(&mut stepper.flat, &used, lr, scale)?;
        stepper.buckets.start_weight_gather();
        Ok(())
    })?;
    Ok(times)
}
