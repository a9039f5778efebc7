//! Mean squared error between two predictions.

use crate::op::at_least_float;
use tch::Tensor;

/// a and b [.., P] → the sum over tokens of the mean over a token's values of (a − b)², fp32 []. Gradients reach both.
pub fn mse_between(a: &Tensor, b: &Tensor) -> Tensor {
    let squares = (at_least_float(a) - at_least_float(b)).square();
    squares.mean_dim(-1, false, None).sum(squares.kind())
}
