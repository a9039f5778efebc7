//! The classifier of the paper's linear probe: normalisation, linear layer, LARS.

use super::norm::Norm;
use super::ranks::Ranks;
use crate::fault::{Fault, Result};
use crate::optim::lars::{Lars, Numbers};
use crate::part::weights::{Init, Spec};
use tch::{Kind, Reduction, Tensor, no_grad};

/// LARS as `main_linprobe.py` runs it.
pub const LARS: Numbers = Numbers { momentum: 0.9, weight_decay: 0.0, trust: 0.001 };

pub struct Head {
    pub norm: Norm,
    /// [classes, D] and [classes].
    pub weights: [Tensor; 2],
    lars: Lars,
}

/// What a batch says: the same on every rank.
pub struct Found {
    /// The mean cross-entropy over the batch of all ranks.
    pub loss: f64,
    /// Of that mean, in the order of `Head::weights`.
    pub gradients: [Tensor; 2],
}

impl Head {
    /// Weights normal with deviation 0.01, drawn from `seed`; a bias of 0.
    pub fn new(width: i64, classes: i64, seed: u64) -> Head {
        let draw = |name: &str, shape: &[i64], init: Init| {
            let spec = Spec { name: name.into(), shape: shape.to_vec(), init, decays: false };
            Tensor::from_slice(&spec.draw(seed)).view(shape).set_requires_grad(true)
        };
        let weight = draw("probe.weight", &[classes, width], Init::Normal(0.01));
        let weights = [weight, draw("probe.bias", &[classes], Init::Zero)];
        Head { norm: Norm::new(width), lars: Lars::new(&weights, LARS), weights }
    }

    /// One update on this rank's rows x [R, D], classes [R], of a batch; collective. Returns the mean loss before it.
    pub fn step(&mut self, x: &Tensor, labels: &Tensor, lr: f64, ranks: &mut Ranks) -> Result<f64> {
        let found = self.gradients(x, labels, ranks)?;
        if !found.loss.is_finite() {
            return Err(Fault::failed(format!(
                "the probe's loss is {} at learning rate {lr}; lower --base-lr, or look for features that are not finite",
                found.loss
            )));
        }
        self.lars.update(&self.weights, &found.gradients, lr);
        Ok(found.loss)
    }

    /// Loss and gradients of a batch; its statistics enter the running ones; collective. Sums and the count travel,
    /// and are divided once, so that ranks with more rows weigh more.
    pub fn gradients(&mut self, x: &Tensor, labels: &Tensor, ranks: &mut Ranks) -> Result<Found> {
        let x = self.norm.train(x, ranks)?;
        self.weights.iter_mut().for_each(|weight| weight.zero_grad());
        let scores = x.f_linear(&self.weights[0], Some(&self.weights[1]))?;
        let loss = scores.f_cross_entropy_loss::<Tensor>(labels, None, Reduction::Sum, -100, 0.0)?;
        loss.backward();
        let sums = Tensor::from_slice(&[loss.double_value(&[]), labels.numel() as f64]);
        let [weight, bias] = self.weights.each_ref().map(Tensor::grad);
        ranks.sum(&[&weight, &bias, &sums])?;
        let count = sums.double_value(&[1]);
        Ok(Found { loss: sums.double_value(&[0]) / count, gradients: [weight / count, bias / count] })
    }

    /// Scores of x [R, D] under the running statistics, fp32 [R, classes].
    pub fn scores(&self, x: &Tensor) -> Tensor {
        no_grad(|| self.norm.evaluate(x).matmul(&self.weights[0].transpose(0, 1)) + &self.weights[1])
    }

    /// The `n` likeliest classes of x [R, D], the likeliest in front, int64 [R, n]; as many as there are classes where
    /// there are fewer.
    pub fn classes(&self, x: &Tensor, n: i64) -> Tensor {
        let scores = self.scores(x);
        scores.topk(n.min(scores.size()[1]), 1, true, true).1.to_kind(Kind::Int64)
    }
}
