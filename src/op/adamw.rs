//! AdamW (Loshchilov and Hutter, 2019, algorithm 2) in the form and order of operations of PyTorch.

use crate::bridge;
pub use crate::bridge::AdamW;
use crate::fault::Result;
use tch::Tensor;

/// Updates weights and moments in place; one `steps` tensor [1] each counts its updates.
pub fn adamw(w: &[Tensor], g: &[Tensor], m: &[Tensor], v: &[Tensor], steps: &[Tensor], with: AdamW) -> Result<()> {
    bridge::adamw(w, g, m, v, steps, with)
}

/// The reference, for one tensor at its `step`-th update (from 1).
pub fn formula(w: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, step: i64, with: AdamW) {
    let AdamW { lr, betas: (beta1, beta2), weight_decay, eps } = with;
    let _ = w.g_mul_scalar_(1.0 - lr * weight_decay);
    let _ = m.lerp_(g, 1.0 - beta1);
    let _ = v.g_mul_scalar_(beta2);
    let _ = v.g_add_(&(g.square() * (1.0 - beta2)));
    let first = 1.0 - beta1.powi(step as i32);
    let second = 1.0 - beta2.powi(step as i32);
    let root = (&*v / second).sqrt() + eps;
    let _ = w.g_sub_(&(&*m / root * (lr / first)));
}
