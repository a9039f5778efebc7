//! Samples of the training set, for what a method learns from them before the first step.

use crate::error::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The samples of a training's first epoch as it will see them.
pub struct TrainingSamples<'a> {
    /// Views uint8 [R, C, T, Y, X] on the CPU, in the order of training on one rank.
    pub batches: &'a mut dyn Iterator<Item = Result<Tensor>>,
    /// Digest of the data set.
    pub data_set: String,
    pub channels: i64,
    /// The run's seed.
    pub seed: u64,
}

/// Values learned from a training set, as they are kept beside a run: `<buffer>.json`.
#[derive(Serialize, Deserialize)]
pub struct LearnedValues {
    /// Digest of the data set.
    pub data_set: String,
    /// Rows of the buffer.
    pub values: Vec<Vec<f32>>,
}
