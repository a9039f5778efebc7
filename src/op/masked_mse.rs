//! The squared error at the hidden patches.

use tch::{Kind, Tensor};

/// guess and truth [B, M, P] → the sum over patches of the mean over a patch's values, fp32 [].
pub fn masked_mse(guess: &Tensor, truth: &Tensor) -> Tensor {
    (guess.to_kind(Kind::Float) - truth).square().mean_dim(-1, false, Kind::Float).sum(Kind::Float)
}
