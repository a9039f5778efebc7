//! LARS (You, Gitman and Ginsburg, "Large batch training of convolutional networks", 2017) as the linear probes of
//! MoCo v3 and MAE use it: the gradient of each matrix is scaled by the ratio of norms, momentum accumulates the scaled
//! gradients, and the learning rate is applied last.

use tch::{Kind, Tensor, no_grad};

/// Hyperparameters of LARS.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LarsOptions {
    pub momentum: f64,
    /// λ, added to the gradient before the norms are taken.
    pub weight_decay: f64,
    /// η.
    pub trust_coefficient: f64,
}

/// A LARS optimizer for a list of tensors.
pub struct Lars {
    options: LarsOptions,
    /// One momentum buffer per tensor, in its shape.
    velocity: Vec<Tensor>,
}

impl Lars {
    /// Makes an optimizer with zero momentum for tensors of these shapes.
    pub fn new(weights: &[Tensor], options: LarsOptions) -> Lars {
        Lars { options, velocity: weights.iter().map(|w| w.detach().zeros_like()).collect() }
    }

    /// Updates the weights in place; `gradients` are in the order of `weights`. For a matrix
    /// d = (g + λw) · η‖w‖ / ‖g + λw‖, where a norm of 0 makes the factor 1; for a vector (a bias) d = g, neither
    /// scaled nor decayed. Then v ← μv + d and w ← w − lr · v.
    pub fn update(&mut self, weights: &[Tensor], gradients: &[Tensor], lr: f64) {
        assert!(
            weights.len() == self.velocity.len() && gradients.len() == weights.len(),
            "{} weights, {} gradients, {} momentum buffers; their numbers must be equal",
            weights.len(),
            gradients.len(),
            self.velocity.len()
        );
        let momentum = self.options.momentum;
        no_grad(|| {
            for ((weight, gradient), velocity) in weights.iter().zip(gradients).zip(&mut self.velocity) {
                let mut weight = weight.detach();
                let direction = self.options.direction(&weight, gradient);
                let _ = velocity.g_mul_scalar_(momentum);
                let _ = velocity.g_add_(&direction);
                let _ = weight.g_sub_(&(&*velocity * lr));
            }
        });
    }
}

impl LarsOptions {
    /// Returns the decayed and scaled gradient d of [`Lars::update`].
    fn direction(&self, weight: &Tensor, gradient: &Tensor) -> Tensor {
        if weight.dim() <= 1 {
            return gradient.shallow_clone();
        }
        let direction = gradient + weight * self.weight_decay;
        let weight_norm = norm(weight);
        let direction_norm = norm(&direction);
        let ratio = if weight_norm > 0.0 && direction_norm > 0.0 {
            self.trust_coefficient * weight_norm / direction_norm
        } else {
            1.0
        };
        direction * ratio
    }
}

fn norm(x: &Tensor) -> f64 {
    x.square().sum(Kind::Double).sqrt().double_value(&[])
}
