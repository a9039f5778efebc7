//! The learning-rate schedule: linear warm-up, then half a cosine (MAE's official `lr_sched.py`). It counts samples,
//! where the official code counts fractions of an epoch, so that the batch size does not change the curve.

use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A length of training, in the unit of the variant.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainingLength {
    Epochs(f64),
    Steps(u64),
    Samples(u64),
}

impl TrainingLength {
    /// Converts to samples.
    pub fn to_samples(self, data_set: u64, global_batch: u64) -> f64 {
        match self {
            TrainingLength::Epochs(epochs) => epochs * data_set as f64,
            TrainingLength::Steps(steps) => (steps * global_batch) as f64,
            TrainingLength::Samples(samples) => samples as f64,
        }
    }

    /// Refuses epochs out of range; `key` is the config key for the message.
    pub fn check(&self, key: &str) -> Result<()> {
        match *self {
            TrainingLength::Epochs(epochs) if !(0.0..=1e6).contains(&epochs) => {
                Err(Error::usage(format!("{key}.epochs is {epochs}; it must lie in 0..=1000000")))
            }
            _ => Ok(()),
        }
    }
}

/// A schedule in samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub peak_lr: f64,
    pub min_lr: f64,
    /// Learning rate of the first warm-up step.
    pub warmup_lr: f64,
    pub warmup_samples: f64,
    pub total_samples: f64,
}

impl Schedule {
    /// Returns the learning rate of the step that begins after `samples` samples.
    pub fn lr_at(&self, samples: u64) -> f64 {
        let samples = samples as f64;
        if samples < self.warmup_samples {
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * samples / self.warmup_samples;
        }
        let decay_samples = (self.total_samples - self.warmup_samples).max(1.0);
        let fraction = ((samples - self.warmup_samples) / decay_samples).min(1.0);
        self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + (std::f64::consts::PI * fraction).cos())
    }
}
