//! A step like the trainer's, one operation queued after the other and no graph, with a point in time between its stages.
//! Nothing is read back in between, so that a GPU's points tell its own time.

use super::input::Given;
use super::point::{Point, rest};
use crate::bridge::record::scope;
use crate::config::Config;
use crate::device::World;
use crate::fault::Result;
use crate::run::step::Stepper;
use std::time::Duration;
use tch::{Kind, Tensor};

/// What a step spends its time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Samples to the device.
    Copy,
    Forward,
    Backward,
    /// What is left of the reduction when backward is over.
    Reduce,
    /// Norm, clipping and AdamW; and zeroing the gradients, which is its other half.
    Update,
}

impl Stage {
    pub const ALL: [Stage; 5] = [Stage::Copy, Stage::Forward, Stage::Backward, Stage::Reduce, Stage::Update];

    /// As a trace calls it.
    const fn name(self) -> &'static str {
        match self {
            Stage::Copy => "copy",
            Stage::Forward => "forward",
            Stage::Backward => "backward",
            Stage::Reduce => "reduce",
            Stage::Update => "update",
        }
    }
}

/// The stages of one step as they came, each with the point at its end.
pub struct Course {
    begin: Point,
    ends: Vec<(Stage, Point)>,
}

impl Course {
    /// Seconds of each stage, in the order of [`Stage::ALL`]; waits for the device.
    pub fn seconds(&self, world: &dyn World) -> Result<[f64; 5]> {
        rest(world.device())?;
        let mut seconds = [0.0; 5];
        let mut before = &self.begin;
        for (stage, end) in &self.ends {
            seconds[*stage as usize] += end.since(before)?;
            before = end;
        }
        Ok(seconds)
    }

    fn of<T>(&mut self, stage: Stage, world: &dyn World, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let _scope = scope(stage.name());
        let done = work()?;
        self.ends.push((stage, Point::now(world.device())?));
        Ok(done)
    }
}

/// One step on what was given; the weights move as in [`Stepper::step`].
pub fn staged(
    stepper: &mut Stepper,
    given: &Given,
    config: &Config,
    world: &dyn World,
    (lr, deadline): (f64, Duration),
) -> Result<Course> {
    let mut course = Course { begin: Point::now(world.device())?, ends: Vec::new() };
    let micro = course.of(Stage::Copy, world, || given.share(config).batches(world.device()))?;
    let counts = stepper.method.counts(config.train.global_batch as i64);
    course.of(Stage::Update, world, || {
        stepper.flat.zero_gradient();
        Ok(())
    })?;
    stepper.buckets.begin();
    for (index, batch) in micro.iter().enumerate() {
        stepper.buckets.arm(index + 1 == micro.len());
        let objective = course.of(Stage::Forward, world, || {
            let mut objective = Tensor::zeros([], (Kind::Float, world.device()));
            for (term, (_, count)) in stepper.method.loss(&stepper.flat.leaves, batch)?.iter().zip(&counts) {
                objective += &term.sum / *count;
            }
            Ok(objective)
        })?;
        course.of(Stage::Backward, world, || Ok(objective.f_backward()?))?;
    }
    course.of(Stage::Reduce, world, || {
        stepper.buckets.gathered(deadline)?;
        stepper.buckets.finish(deadline)
    })?;
    course.of(Stage::Update, world, || {
        let norm = stepper.buckets.square_sum(&stepper.flat, deadline)?;
        let scale = match config.optim.clip {
            Some(_) => stepper.updater.clip_scale(f64::from(norm.double_value(&[]) as f32).sqrt()),
            None => 1.0,
        };
        let used = stepper.buckets.used();
        stepper.updater.update(&mut stepper.flat, &used, lr, scale)?;
        stepper.buckets.spread();
        Ok(())
    })?;
    Ok(course)
}
