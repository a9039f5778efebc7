//! Cross entropy: with labels, of the samples that have one; and of tokens.

use crate::op::at_least_float;
use crate::part::batch::NO_LABEL;
use tch::{Reduction, Tensor};

/// Sums `−log softmax(logits)[label]` over the samples with a label, fp32 []. logits [B, classes] of any float dtype,
/// labels int64 `[B]`; [`NO_LABEL`] has no part.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Tensor {
    at_least_float(logits).cross_entropy_loss(labels, None::<Tensor>, Reduction::Sum, NO_LABEL, 0.0)
}

/// The negative logarithm of the softmax at the color of each token, fp32 [B, N]. logits [B, N, V] of any float dtype, colors int64 [B, N].
pub fn token_cross_entropy(logits: &Tensor, colors: &Tensor) -> Tensor {
    let logits = at_least_float(logits).flatten(0, 1);
    let losses = logits.cross_entropy_loss(&colors.flatten(0, 1), None::<Tensor>, Reduction::None, NO_LABEL, 0.0);
    losses.view_as(colors)
}
