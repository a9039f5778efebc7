//! LARS (You, Gitman and Ginsburg, "Large batch training of convolutional networks", 2017) as the linear probes of
//! MoCo v3 and MAE state it: the rate of each matrix is adapted to its own norms, momentum gathers the adapted
//! gradients, and the learning rate is applied last.

use tch::{Kind, Tensor, no_grad};

/// The numbers of LARS.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numbers {
    pub momentum: f64,
    /// λ, added to the gradient before the norms are taken.
    pub weight_decay: f64,
    /// η, the trust coefficient.
    pub trust: f64,
}

/// The state of the update for a list of tensors.
pub struct Lars {
    numbers: Numbers,
    /// One for each tensor, in its shape.
    velocity: Vec<Tensor>,
}

impl Lars {
    /// At rest, for tensors of these shapes.
    pub fn new(weights: &[Tensor], numbers: Numbers) -> Lars {
        Lars { numbers, velocity: weights.iter().map(|w| w.detach().zeros_like()).collect() }
    }

    /// One update in place; `gradients` in the order of `weights`. For a matrix
    /// d = (g + λw) · η‖w‖ / ‖g + λw‖, with 1 in place of the ratio where a norm is 0; for a vector (a bias) d = g,
    /// neither adapted nor decayed. Then v ← μv + d and w ← w − lr · v.
    pub fn update(&mut self, weights: &[Tensor], gradients: &[Tensor], lr: f64) {
        assert!(weights.len() == self.velocity.len() && gradients.len() == weights.len(), "lists of one length");
        let Numbers { momentum, .. } = self.numbers;
        no_grad(|| {
            for ((weight, gradient), velocity) in weights.iter().zip(gradients).zip(&mut self.velocity) {
                let mut weight = weight.detach();
                let direction = self.numbers.adapted(&weight, gradient);
                let _ = velocity.g_mul_scalar_(momentum);
                let _ = velocity.g_add_(&direction);
                let _ = weight.g_sub_(&(&*velocity * lr));
            }
        });
    }
}

impl Numbers {
    fn adapted(&self, weight: &Tensor, gradient: &Tensor) -> Tensor {
        if weight.dim() <= 1 {
            return gradient.shallow_clone();
        }
        let direction = gradient + weight * self.weight_decay;
        let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
        let (own, step) = (norm(weight), norm(&direction));
        let ratio = if own > 0.0 && step > 0.0 { self.trust * own / step } else { 1.0 };
        direction * ratio
    }
}
