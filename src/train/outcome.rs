//! The result of a step, and the vector that it is read from.

use crate::error::{Error, Result};
use std::time::Duration;
use tch::{Device, Tensor};

/// Most terms of a loss: ranks exchange a message of fixed size, whether or not they have samples.
pub const MAX_TERMS: usize = 8;

/// The result of a step, the same on every rank but for `local_loss` and `comm_wait`.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Sum of the terms' means over the global batch.
    pub loss: f64,
    pub terms: Vec<(&'static str, f64)>,
    /// The loss over this rank's samples; not a number if it has none.
    pub local_loss: f64,
    pub grad_norm: f64,
    pub clip_scale: f64,
    /// Ranks whose loss was not finite, or all of them if only the reduced gradient is not. If there are any, nothing
    /// has moved.
    pub bad_ranks: Vec<usize>,
    /// How long the host waited for other ranks' gradients and weights; 0 where the device decides.
    pub comm_wait: Duration,
}

/// Length of a report of a world of this size.
pub const fn report_len(ranks: usize) -> i64 {
    (4 * MAX_TERMS + ranks + 1) as i64
}

impl Outcome {
    /// Reads a report, f64: sums and counts of the terms over this rank's samples [2 · MAX_TERMS], those over all ranks
    /// [2 · MAX_TERMS], 1 for each rank whose loss is not finite `[W]`, and the squared norm of the gradient `[1]`.
    pub fn decode(report: &[f64], names: &[&'static str], clip_scale: impl Fn(f64) -> f64) -> Outcome {
        let (local, rest) = report.split_at(2 * MAX_TERMS);
        let (global, rest) = rest.split_at(2 * MAX_TERMS);
        let (square, bad) = rest.split_last().expect("a norm");
        let grad_norm = square.sqrt();
        let mut bad_ranks: Vec<usize> = (0..bad.len()).filter(|&rank| bad[rank] > 0.0).collect();
        if bad_ranks.is_empty() && !grad_norm.is_finite() {
            // Every rank holds the same sum, so every rank decides the same.
            bad_ranks = (0..bad.len()).collect();
        }
        let has_samples = local[MAX_TERMS..].iter().any(|count| *count > 0.0);
        Outcome {
            loss: means(global).sum(),
            terms: names.iter().copied().zip(means(global)).collect(),
            local_loss: if has_samples { means(local).sum() } else { f64::NAN },
            grad_norm,
            clip_scale: clip_scale(grad_norm),
            bad_ranks,
            comm_wait: Duration::ZERO,
        }
    }
}

/// The means of the terms; 0 of a term that nothing counts for, such as one of labels where no sample has one.
fn means(sums_and_counts: &[f64]) -> impl Iterator<Item = f64> {
    let (sums, counts) = sums_and_counts.split_at(MAX_TERMS);
    sums.iter().zip(counts).map(|(sum, count)| sum / count.max(1.0))
}

/// Returns the values of an f64 tensor `[n]`; waits for them.
pub fn to_f64_vec(tensor: &Tensor) -> Result<Vec<f64>> {
    Vec::<f64>::try_from(&tensor.to_device(Device::Cpu)).map_err(Error::from)
}
