//! Learning rate over samples: linear warm-up, then half a cosine (official `lr_sched.py`, with its fraction of an epoch
//! counted in samples, so that the batch does not change the curve).

use crate::fault::{Fault, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A length of training, in the unit at hand.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Span {
    Epochs(f64),
    Steps(u64),
    Samples(u64),
}

impl Span {
    /// In samples.
    pub fn samples(&self, data_set: u64, global_batch: u64) -> f64 {
        match *self {
            Span::Epochs(epochs) => epochs * data_set as f64,
            Span::Steps(steps) => (steps * global_batch) as f64,
            Span::Samples(samples) => samples as f64,
        }
    }
    pub fn check(&self, at: &str) -> Result<()> {
        match *self {
            Span::Epochs(epochs) if !(0.0..=1e6).contains(&epochs) => {
                Err(Fault::usage(format!("{at}.epochs is {epochs}; it must lie in 0..=1000000")))
            }
            _ => Ok(()),
        }
    }
}

/// A resolved curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub peak: f64,
    pub least: f64,
    /// Samples.
    pub warmup: f64,
    /// Samples.
    pub total: f64,
}

impl Schedule {
    /// The learning rate of the step that begins after `samples` samples; the first one of a warm-up is 0.
    pub fn at(&self, samples: u64) -> f64 {
        let samples = samples as f64;
        if samples < self.warmup {
            return self.peak * samples / self.warmup;
        }
        let done = ((samples - self.warmup) / (self.total - self.warmup).max(1.0)).min(1.0);
        self.least + (self.peak - self.least) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }
}
