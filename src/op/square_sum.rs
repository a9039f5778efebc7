//! The squared norm of a flat buffer: not finite if any value is not.

use tch::{Kind, Tensor};

/// Σ x² of any shape → fp32 [].
pub fn square_sum(x: &Tensor) -> Tensor {
    let flat = x.view(-1);
    flat.dot(&flat).to_kind(Kind::Float)
}
