//! y = x · wᵀ + b, the product that takes four fifths of a step.

use crate::bridge;
use crate::fault::Result;
use tch::{Device, Kind, Tensor};

/// x [.., K], w [N, K], b [N] → [.., N]. On a CPU the fp32 products of forward and backward go through oneDNN, which
/// generates code for the processor it finds; libtorch's own choice for them, MKL, reaches half of that on processors of
/// other makers. Everywhere else libtorch's choice is right.
pub fn linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    match (x.device(), x.kind()) {
        (Device::Cpu, Kind::Float) => bridge::linear(x, w, b),
        _ => Ok(x.linear(w, Some(b))),
    }
}

/// The reference.
pub fn formula(x: &Tensor, w: &Tensor, b: &Tensor) -> Tensor {
    x.matmul(&w.transpose(0, 1)) + b
}
