//! Steps that were taken and whose outcome is still to come, and what the outcomes before have led to.
//!
//! Every rank learns the outcome of a step after the same step, be it that one or the next, and so every rank ends the
//! training at the same place.

use super::step::Outcome;
use crate::fault::{Fault, Result};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A step that was taken.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    pub step: u64,
    pub lr: f64,
    pub began: Instant,
    /// How long it had to wait for its samples.
    pub waited: Duration,
    /// Frames of its samples.
    pub frames: i64,
}

pub struct Ledger {
    open: VecDeque<Taken>,
    /// Steps in a row that may be refused, and those that have been.
    allowed: u64,
    refused: u64,
    /// Whether this rank tells of refused steps.
    speaks: bool,
    /// When the last outcome came.
    last: Option<Instant>,
}

impl Ledger {
    /// Ends the training at so many refused steps in a row.
    pub fn new(bad_steps: u64, speaks: bool) -> Ledger {
        Ledger { open: VecDeque::new(), allowed: bad_steps.max(1), refused: 0, speaks, last: None }
    }

    pub fn taken(&mut self, step: Taken) {
        self.open.push_back(step);
    }

    /// The outcome of the oldest step that has none yet: which step that was, and how long it took. Where steps overlap,
    /// one takes as long as its outcome comes after the one before.
    ///
    /// # Errors
    /// Code::Failed where too many steps in a row have been refused.
    pub fn told(&mut self, outcome: &Outcome) -> Result<(Taken, Duration)> {
        let taken = self.open.pop_front().expect("a step for every outcome");
        let now = Instant::now();
        let took = now - self.last.replace(now).map_or(taken.began, |last| last.max(taken.began));
        self.judge(outcome, taken.step)?;
        Ok((taken, took))
    }

    fn judge(&mut self, outcome: &Outcome, step: u64) -> Result<()> {
        if outcome.bad_ranks.is_empty() {
            self.refused = 0;
            return Ok(());
        }
        self.refused += 1;
        if self.speaks {
            tracing::warn!(
                "step {step} was refused: loss or gradient not finite on rank {:?} (loss {}, gradient norm {}); the \
                 weights stay as they were",
                outcome.bad_ranks,
                outcome.loss,
                outcome.grad_norm
            );
        }
        if self.refused < self.allowed {
            return Ok(());
        }
        Err(Fault::failed(format!(
            "{} steps in a row were refused, the last one step {step}: loss or gradient not finite on rank {:?}. The \
             weights are those of the last good step. Lower the learning rate, set optim.clip, or train in fp32.",
            self.refused, outcome.bad_ranks
        )))
    }
}
