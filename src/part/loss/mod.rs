//! Losses: pure functions of tensors that return sums; the step divides them once by counts over the whole batch.

mod contrastive; // each image is to find its caption among those of all ranks, and each caption its image
pub mod gather; // the rows of all ranks, differentiable

pub use crate::op::masked_mse::masked_mse;
pub use contrastive::contrastive;
