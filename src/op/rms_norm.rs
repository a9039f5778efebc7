//! Normalization by the root mean square over the last dimension (Zhang and Sennrich, 2019), as iGPT's code has it.
//!
//! There is no kernel: of the methods here only iGPT uses it, whose time is in the products of its long sequences.

use super::at_least_float;
use tch::Tensor;

/// Added to the mean square (official iGPT code).
pub const EPS: f64 = 1e-5;

/// x [.., D], scale `[D]` → x / √(mean x² + ε) · scale, with the statistics in fp32 or higher.
pub fn rms_norm(x: &Tensor, scale: &Tensor) -> Tensor {
    let kind = x.kind();
    let wide = at_least_float(x);
    let mean_square = wide.square().mean_dim(-1, true, None);
    (wide * (mean_square + EPS).rsqrt() * scale).to_kind(kind)
}
