//! The classifier of the paper's linear probe: batch normalization, a linear layer, LARS.

use super::batch_norm::BatchNorm;
use super::features::dot_products;
use super::ranks::Ranks;
use crate::error::{Error, Result};
use crate::optim::lars::{Lars, LarsOptions};
use crate::part::params::{Init, ParamSpec};
use tch::{Kind, Reduction, Tensor, no_grad};

/// The LARS settings of the official `main_linprobe.py`.
pub const LARS: LarsOptions = LarsOptions { momentum: 0.9, weight_decay: 0.0, trust_coefficient: 0.001 };

/// A linear classifier behind a batch normalization, with its optimizer state.
pub struct ProbeHead {
    pub batch_norm: BatchNorm,
    /// Weight [classes, D] and bias `[classes]`.
    pub weights: [Tensor; 2],
    lars: Lars,
}

/// The loss and gradients of a global batch, equal on all ranks.
pub struct LossAndGradients {
    /// Mean cross-entropy.
    pub loss: f64,
    /// Gradients of the mean, in the order of [`ProbeHead::weights`].
    pub gradients: [Tensor; 2],
}

impl ProbeHead {
    /// Initializes the weight from N(0, 0.01²) by `seed`, and the bias with 0.
    pub fn new(width: i64, classes: i64, seed: u64) -> ProbeHead {
        let weights = [
            init_parameter("probe.weight", &[classes, width], Init::Normal(0.01), seed),
            init_parameter("probe.bias", &[classes], Init::Zero, seed),
        ];
        ProbeHead { batch_norm: BatchNorm::new(width), lars: Lars::new(&weights, LARS), weights }
    }

    /// Runs one update on this rank's rows of a batch, x [R, D] and labels `[R]`, and returns the mean loss before the
    /// update; collective.
    ///
    /// # Errors
    /// [`ExitCode::Failed`](crate::error::ExitCode::Failed) if the loss is not finite.
    pub fn step(&mut self, x: &Tensor, labels: &Tensor, lr: f64, ranks: &mut Ranks) -> Result<f64> {
        let LossAndGradients { loss, gradients } = self.loss_and_gradients(x, labels, ranks)?;
        if !loss.is_finite() {
            return Err(Error::failed(format!(
                "the probe's loss is {loss} at learning rate {lr}; lower --base-lr, or check the features for \
                 non-finite values"
            )));
        }
        self.lars.update(&self.weights, &gradients, lr);
        Ok(loss)
    }

    /// Computes loss and gradients of a batch and updates the running statistics; collective. Sums and the number of
    /// samples are reduced and divided once, so that every sample has the same weight, and are in fp64, so that the
    /// fp32 gradients do not depend on how ranks divide the batch.
    pub fn loss_and_gradients(&mut self, x: &Tensor, labels: &Tensor, ranks: &mut Ranks) -> Result<LossAndGradients> {
        let x = self.batch_norm.forward_train(x, ranks)?;
        let leaves = self.weights.each_ref().map(|w| w.detach().to_kind(Kind::Double).set_requires_grad(true));
        let logits = x.f_linear(&leaves[0], Some(&leaves[1]))?;
        let loss = logits.f_cross_entropy_loss::<Tensor>(labels, None, Reduction::Sum, -100, 0.0)?;
        loss.backward();
        let sums = Tensor::from_slice(&[loss.double_value(&[]), labels.numel() as f64]);
        let [weight, bias] = leaves.each_ref().map(Tensor::grad);
        ranks.all_reduce_sum(&[&weight, &bias, &sums])?;
        let count = sums.double_value(&[1]);
        let gradients = [weight, bias].map(|sum| (sum / count).to_kind(Kind::Float));
        Ok(LossAndGradients { loss: sums.double_value(&[0]) / count, gradients })
    }

    /// Returns the logits of x [R, D] under the running statistics, fp32 [R, classes].
    pub fn logits(&self, x: &Tensor) -> Tensor {
        no_grad(|| dot_products(&self.batch_norm.forward_eval(x), &self.weights[0]) + &self.weights[1])
    }

    /// Returns the `k` most likely classes of x [R, D], the most likely first, int64 [R, min(k, classes)].
    pub fn predict_topk(&self, x: &Tensor, k: i64) -> Tensor {
        let logits = self.logits(x);
        logits.topk(k.min(logits.size()[1]), 1, true, true).1.to_kind(Kind::Int64)
    }
}

fn init_parameter(name: &str, shape: &[i64], init: Init, seed: u64) -> Tensor {
    let spec = ParamSpec { name: name.into(), shape: shape.to_vec(), init, weight_decay: false };
    Tensor::from_slice(&spec.initial_values(seed)).view(shape).set_requires_grad(true)
}
