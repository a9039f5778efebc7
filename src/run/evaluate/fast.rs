//! The fast linear probe: a classifier on features of unaugmented samples, which are worked out once.

use super::features::Set;
use super::progress::Progress;
use super::ranks::Ranks;
use crate::fault::Result;
use crate::op::adamw::{AdamW, adamw};
use crate::rng::{Draw, Purpose};
use tch::{Device, Kind, Tensor, no_grad};

/// Passes over the training set.
pub const PASSES: u64 = 100;
const BATCH: usize = 256;

/// A linear classifier behind a fixed normalisation.
pub struct Linear {
    /// Mean and deviation of the training set's features, [1, D] each.
    mean: Tensor,
    deviation: Tensor,
    /// [classes, D] and [classes].
    w: [Tensor; 2],
}

impl Linear {
    /// Trained on rank 0 and handed to the others, so that all judge with the same bits; collective. `train` is the
    /// whole training set, on every rank.
    pub fn fit(train: &Set, seed: u64, ranks: &mut Ranks) -> Result<Linear> {
        let width = train.x.size()[1];
        let classes = train.labels.max().int64_value(&[]) + 1;
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let fitted = match ranks.first() {
            true => Linear::train(train, classes, seed, ranks)?,
            false => {
                let (mean, deviation) = (zeros(&[1, width]), zeros(&[1, width]));
                Linear { mean, deviation, w: [zeros(&[classes, width]), zeros(&[classes])] }
            }
        };
        ranks.take_from_first(&[&fitted.mean, &fitted.deviation, &fitted.w[0], &fitted.w[1]])?;
        Ok(fitted)
    }

    /// Features with mean 0 and deviation 1 over the training set (the official probe's batch normalisation without
    /// affine part); AdamW without decay, 100 passes in batches of 256, learning rate 0.01 falling along half a
    /// cosine.
    fn train(train: &Set, classes: i64, seed: u64, ranks: &mut Ranks) -> Result<Linear> {
        let (samples, width) = (train.x.size()[0], train.x.size()[1]);
        let mean = train.x.mean_dim(0, true, Kind::Float);
        // The biased deviation of one sample is 0, where the unbiased one would be no number.
        let deviation = train.x.std_dim(0, samples > 1, true).clamp_min(1e-6);
        let features = (&train.x - &mean) / &deviation;
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let mut w = [zeros(&[classes, width]), zeros(&[classes])].map(|t| t.set_requires_grad(true));
        let (first, second) = (w.each_ref().map(Tensor::zeros_like), w.each_ref().map(Tensor::zeros_like));
        let counts = [zeros(&[]), zeros(&[])];
        let steps = PASSES * (samples as u64).div_ceil(BATCH as u64);
        let mut step = 0;
        let mut progress = Progress::begin("linear classifier", PASSES, true);
        for pass in 0..PASSES {
            let order = Draw::new(seed, 0, pass, Purpose::Probe, 0).order(samples as usize);
            let order: Vec<i64> = order.into_iter().map(i64::from).collect();
            for rows in order.chunks(BATCH) {
                let at = Tensor::from_slice(rows);
                let scores = features.index_select(0, &at).matmul(&w[0].transpose(0, 1)) + &w[1];
                let loss = scores.cross_entropy_for_logits(&train.labels.index_select(0, &at));
                w.iter_mut().for_each(|t| t.zero_grad());
                loss.backward();
                let lr = 0.005 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
                let gradients = w.each_ref().map(Tensor::grad);
                let with = AdamW { lr, betas: (0.9, 0.999), weight_decay: 0.0, eps: 1e-8 };
                adamw(&w.each_ref().map(Tensor::detach), &gradients, &first, &second, &counts, with)?;
                step += 1;
            }
            ranks.beat();
            progress.at(pass + 1, "");
        }
        Ok(Linear { mean, deviation, w: w.map(|t| t.detach()) })
    }

    /// The classes of x [R, D] → int64 [R].
    pub fn classes(&self, x: &Tensor) -> Tensor {
        let x = (x - &self.mean) / &self.deviation;
        no_grad(|| (x.matmul(&self.w[0].transpose(0, 1)) + &self.w[1]).argmax(1, false))
    }
}
