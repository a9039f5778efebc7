//! The two-dimensional spectrum that masked frequency modelling predicts and filters by (Xie et al., 2023, §3.2).
//!
//! There is no kernel: cuFFT, which libtorch calls, is at the speed of memory for pictures of these sizes, is recorded by
//! graphs, and gives the gradient for the predicted picture too.

use tch::{Kind, Tensor};

/// x [.., Y, X] of any float dtype → fp32 [.., Y, X, 2], real and imaginary parts: orthonormal, and with the mean at
/// (Y / 2, X / 2). In fp32, whatever x is: half precision overflows in the mean.
pub fn spectrum(x: &Tensor) -> Tensor {
    let x = if x.kind() == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) };
    x.fft_fft2(None::<&[i64]>, [-2i64, -1].as_slice(), "ortho").fft_fftshift([-2i64, -1].as_slice()).view_as_real()
}
