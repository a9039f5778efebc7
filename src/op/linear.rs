//! y = x · wᵀ + b, the matrix product that takes four fifths of a step.
//!
//! On a GPU the bias needs no pass of its own: libtorch 2.11 passes `addmm` with a one-dimensional bias to cuBLASLt with
//! the epilogue BIAS (`isInputCompliesAddmmCudaLt` and `launchGemmAndBiasCublasLt` in aten/src/ATen/native/cuda/Blas.cpp)
//! if beta is 1, the bias is contiguous and of the result's width, the result is contiguous, all sides of both matrices
//! are greater than 1 and the dtype is fp64, fp32, f16 or bf16; otherwise it copies the bias to the result first. This
//! file therefore makes x a matrix and calls `addmm`, so that the choice does not depend on x's dimensions or strides.
//!
//! libtorch uses two other epilogues of cuBLASLt, RELU_BIAS and GELU_BIAS (`GEMMAndBiasActivationEpilogue` in
//! ATen/cuda/CUDABlas.h: None, RELU, GELU) through `_addmm_activation`, which has no derivative. The epilogues that keep
//! the product for backward (GELU_AUX) or compute a part of backward (DGELU, BGRADA, BGRADB) are not reachable. Hence:
//!
//! - queries, keys and values, the projection after attention, the second layer of an MLP, embeddings and predictions use
//!   `addmm` with the bias in the epilogue; the gradient of the bias is libtorch's sum over rows.
//! - the first layer of an MLP uses a product without bias, followed by bias and activation in one pass of
//!   [`super::bias_gelu`], which keeps the product for backward and computes the gradients of bias and product in one pass.
//!   The exact GELU leaves no choice: GELU_BIAS is the tanh form. For the tanh form, the epilogue would save a write and a
//!   read of the hidden layer, 16·D bytes per token, at the cost of one more product of 8·D² operations in backward: at
//!   788 TFLOP/s and 4.3 TB/s that pays below D = 366, and no layer with the tanh form is that narrow. Without gradients it
//!   would pay, but `_addmm_activation` is the tanh form only on a GPU and the exact form on a CPU, so that no CPU test
//!   could check it; and tch 0.24 passes its `use_gelu` in the place of beta, so that its call computes a ReLU.

use super::sizes;
use crate::bridge;
use crate::error::Result;
use tch::{Device, Kind, Tensor};

/// x [.., K], w [N, K], b `[N]` → [.., N]. On a CPU the fp32 products of forward and backward use oneDNN, which
/// generates code for the processor it runs on; MKL, libtorch's default, reaches half of its speed on processors not
/// made by Intel.
pub fn linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    if (x.device(), x.kind()) == (Device::Cpu, Kind::Float) {
        return bridge::linear(x, w, b);
    }
    let [outputs, inputs] = sizes(w);
    let mut size = x.size();
    *size.last_mut().expect("at least one dimension") = outputs;
    Ok(b.addmm(&x.reshape([-1, inputs]), &w.tr()).view(size.as_slice()))
}

/// The reference.
pub fn formula(x: &Tensor, w: &Tensor, b: &Tensor) -> Tensor {
    x.matmul(&w.transpose(0, 1)) + b
}
