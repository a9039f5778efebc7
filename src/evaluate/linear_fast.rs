//! The fast linear probe: a classifier on features that are computed once, without augmentation.

use super::features::{FeatureSet, dot_products};
use super::progress::ProgressReporter;
use super::ranks::Ranks;
use crate::error::Result;
use crate::op::adamw::{AdamWOptions, adamw};
use crate::rng::{Philox, Purpose};
use tch::{Device, Kind, Tensor, no_grad};

/// Epochs over the training set.
pub const EPOCHS: u64 = 100;
const BATCH: usize = 256;
const PEAK_LR: f64 = 0.01;

/// A linear classifier behind a fixed normalization.
pub struct LinearProbe {
    /// Mean of the training features, [1, D].
    mean: Tensor,
    /// Standard deviation of the training features, [1, D].
    std: Tensor,
    /// Weight [classes, D] and bias `[classes]`.
    weights: [Tensor; 2],
}

impl LinearProbe {
    /// Trains on rank 0 and broadcasts the result, so that all ranks predict with the same bits; collective. `train` is
    /// the whole training set on every rank.
    pub fn fit(train: &FeatureSet, seed: u64, ranks: &mut Ranks) -> Result<LinearProbe> {
        let width = train.features.size()[1];
        let classes = train.labels.max().int64_value(&[]) + 1;
        let probe = if ranks.is_rank0() {
            LinearProbe::train(train, classes, seed, ranks)?
        } else {
            LinearProbe { mean: zeros(&[1, width]), std: zeros(&[1, width]), weights: zero_weights(classes, width) }
        };
        ranks.broadcast(&[&probe.mean, &probe.std, &probe.weights[0], &probe.weights[1]])?;
        Ok(probe)
    }

    /// Trains with AdamW without weight decay and a cosine schedule, on features normalized to mean 0 and standard
    /// deviation 1 over the training set (as the official probe's batch normalization without an affine part).
    fn train(train: &FeatureSet, classes: i64, seed: u64, ranks: &mut Ranks) -> Result<LinearProbe> {
        let samples = train.features.size()[0];
        let width = train.features.size()[1];
        let mean = train.features.mean_dim(0, true, Kind::Float);
        // The unbiased standard deviation of one sample is NaN, the biased one is 0.
        let std = train.features.std_dim(0, samples > 1, true).clamp_min(1e-6);
        let features = (&train.features - &mean) / &std;
        let mut weights = zero_weights(classes, width).map(|weight| weight.set_requires_grad(true));
        let exp_avg = weights.each_ref().map(Tensor::zeros_like);
        let exp_avg_sq = weights.each_ref().map(Tensor::zeros_like);
        let step_counts = [zeros(&[]), zeros(&[])];
        let total_steps = EPOCHS * (samples as u64).div_ceil(BATCH as u64);
        let mut step = 0;
        let mut progress = ProgressReporter::new("linear classifier", EPOCHS, true);
        for epoch in 0..EPOCHS {
            let order = Philox::new(seed, 0, epoch, Purpose::Probe, 0).permutation(samples as usize);
            let order: Vec<i64> = order.into_iter().map(i64::from).collect();
            for rows in order.chunks(BATCH) {
                let rows = Tensor::from_slice(rows);
                let logits = features.index_select(0, &rows).matmul(&weights[0].transpose(0, 1)) + &weights[1];
                let loss = logits.cross_entropy_for_logits(&train.labels.index_select(0, &rows));
                weights.iter_mut().for_each(|weight| weight.zero_grad());
                loss.backward();
                let lr = 0.5 * PEAK_LR * (1.0 + (std::f64::consts::PI * step as f64 / total_steps as f64).cos());
                let gradients = weights.each_ref().map(Tensor::grad);
                let options = AdamWOptions { lr, betas: [0.9, 0.999], weight_decay: 0.0, eps: 1e-8 };
                let detached = weights.each_ref().map(Tensor::detach);
                adamw(&detached, &gradients, &exp_avg, &exp_avg_sq, &step_counts, options)?;
                step += 1;
            }
            ranks.mark_progress();
            progress.update(epoch + 1, "");
        }
        Ok(LinearProbe { mean, std, weights: weights.map(|weight| weight.detach()) })
    }

    /// Predicts the classes of x [R, D] → int64 `[R]`.
    pub fn predict(&self, x: &Tensor) -> Tensor {
        let x = (x - &self.mean) / &self.std;
        no_grad(|| (dot_products(&x, &self.weights[0]) + &self.weights[1]).argmax(1, false))
    }
}

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

/// Returns a zero weight [classes, width] and a zero bias `[classes]`.
fn zero_weights(classes: i64, width: i64) -> [Tensor; 2] {
    [zeros(&[classes, width]), zeros(&[classes])]
}
