//! y = x · wᵀ + b, the product that takes four fifths of a step.

use crate::bridge;
use crate::fault::Result;
use tch::{Device, Tensor};

/// x [.., K], w [N, K], b [N] → [.., N]. On a CPU the products of forward and backward go through oneDNN, which
/// generates code for the processor it finds; libtorch's own choice, MKL, reaches half of that on processors of other
/// makers.
pub fn linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    match x.device() {
        Device::Cpu => bridge::linear(x, w, b),
        _ => Ok(formula(x, w, b)),
    }
}

/// The reference.
pub fn formula(x: &Tensor, w: &Tensor, b: &Tensor) -> Tensor {
    x.matmul(&w.transpose(0, 1)) + b
}
