//! Steps in flight, and how many steps in a row were refused.
//!
//! Every rank learns the outcome of a step after the same step, that one or the next, and so every rank ends the
//! training at the same place.

use super::outcome::Outcome;
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A step that was started and has no outcome yet.
#[derive(Clone, Copy, Debug)]
pub struct InFlight {
    pub step: u64,
    pub lr: f64,
    pub start: Instant,
    /// How long the step waited for its samples.
    pub data_wait: Duration,
    /// Frames of its samples.
    pub frames: i64,
}

/// Matches outcomes with their steps and ends a training that makes no progress.
pub struct StepTracker {
    in_flight: VecDeque<InFlight>,
    max_refused: u64,
    /// Steps refused in a row.
    refused: u64,
    /// This rank logs refused steps.
    logs: bool,
    last_outcome: Option<Instant>,
}

impl StepTracker {
    /// Ends the training at `max_refused` refused steps in a row.
    pub fn new(max_refused: u64, logs: bool) -> StepTracker {
        StepTracker {
            in_flight: VecDeque::new(),
            max_refused: max_refused.max(1),
            refused: 0,
            logs,
            last_outcome: None,
        }
    }

    /// Adds a step whose results have not been read yet.
    pub fn push(&mut self, step: InFlight) {
        self.in_flight.push_back(step);
    }

    /// Takes the outcome of the oldest step in flight and returns that step and how long it took. Where steps overlap,
    /// a step takes the time since the outcome before.
    ///
    /// # Errors
    /// ExitCode::Failed if too many steps in a row were refused.
    pub fn complete(&mut self, outcome: &Outcome) -> Result<(InFlight, Duration)> {
        let step = self.in_flight.pop_front().expect("a step for every outcome");
        let now = Instant::now();
        let start = self.last_outcome.replace(now).map_or(step.start, |last| last.max(step.start));
        self.check(outcome, step.step)?;
        Ok((step, now - start))
    }

    fn check(&mut self, outcome: &Outcome, step: u64) -> Result<()> {
        if outcome.bad_ranks.is_empty() {
            self.refused = 0;
            return Ok(());
        }
        self.refused += 1;
        if self.logs {
            tracing::warn!(
                "step {step} was refused: loss or gradient not finite on rank {:?} (loss {}, gradient norm {}); the \
                 weights stay as they were",
                outcome.bad_ranks,
                outcome.loss,
                outcome.grad_norm
            );
        }
        if self.refused < self.max_refused {
            return Ok(());
        }
        Err(Error::failed(format!(
            "{} steps in a row were refused, the last one step {step}: loss or gradient not finite on rank {:?}. The \
             weights are those of the last good step. Lower the learning rate, set optim.clip_grad_norm, or train in fp32.",
            self.refused, outcome.bad_ranks
        )))
    }
}
