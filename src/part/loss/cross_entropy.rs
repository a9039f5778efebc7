//! Cross entropy with labels, of the samples that have one.

use crate::op::at_least_float;
use crate::part::batch::NO_LABEL;
use tch::{Reduction, Tensor};

/// Sums `−log softmax(logits)[label]` over the samples with a label, fp32 []. logits [B, classes] of any float dtype,
/// labels int64 `[B]`; [`NO_LABEL`] has no part.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Tensor {
    at_least_float(logits).cross_entropy_loss(labels, None::<Tensor>, Reduction::Sum, NO_LABEL, 0.0)
}
