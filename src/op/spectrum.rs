//! The two-dimensional spectrum that masked frequency modeling predicts and filters by (Xie et al., 2023, §3.2).
//!
//! There is no kernel: cuFFT, which libtorch calls, runs at memory bandwidth for images of these sizes, can be captured
//! in CUDA graphs, and is differentiable.

use super::at_least_float;
use tch::Tensor;

/// x [.., Y, X] of any float dtype → fp32 [.., Y, X, 2], real and imaginary parts, orthonormal, with the zero frequency
/// at (Y / 2, X / 2). Computed in fp32 or higher, because the zero frequency overflows half precision.
pub fn spectrum(x: &Tensor) -> Tensor {
    at_least_float(x)
        .fft_fft2(None::<&[i64]>, [-2i64, -1].as_slice(), "ortho")
        .fft_fftshift([-2i64, -1].as_slice())
        .view_as_real()
}
