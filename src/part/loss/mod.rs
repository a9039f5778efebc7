//! Losses: pure functions of tensors that return sums; the step divides them once by counts over the whole batch.

pub use crate::op::masked_mse::masked_mse;
