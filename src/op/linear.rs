//! y = x · wᵀ + b, the product that takes four fifths of a step.
//!
//! On a GPU the bias costs no pass of its own: libtorch 2.11 hands `addmm` with a one-dimensional bias to cuBLASLt with
//! the epilogue BIAS (`isInputCompliesAddmmCudaLt` and `launchGemmAndBiasCublasLt` in aten/src/ATen/native/cuda/Blas.cpp)
//! where beta is 1, the bias contiguous and of the result's width, the result contiguous, every side of both matrices
//! greater than 1 and the dtype fp64, fp32, f16 or bf16; else it copies the bias into the result first. So x is made a
//! matrix and `addmm` called here, which leaves none of that to the number of x's dimensions or to its strides.
//!
//! Of cuBLASLt's other epilogues libtorch knows RELU_BIAS and GELU_BIAS (`GEMMAndBiasActivationEpilogue` in
//! ATen/cuda/CUDABlas.h: None, RELU, GELU) behind `_addmm_activation`, which has no derivative; none of those that keep the
//! product for backward (GELU_AUX) or that do backward's part (DGELU, BGRADA, BGRADB) can be reached. Hence, use by use:
//!
//! - queries, keys and values, the projection behind attention, the second layer of a perceptron, embeddings and
//!   predictions: `addmm`, bias in the epilogue; their bias's gradient is libtorch's sum over rows.
//! - the first layer of a perceptron: the bare product, and bias and unit in one pass of [`super::bias_gelu`], which keeps
//!   the product for backward and sums up the bias's gradient in the same pass that makes the product's. With the exact
//!   unit there is no choice: GELU_BIAS is the tanh form. With the tanh form, the epilogue would spare a write and a read of
//!   the hidden layer, 16·D bytes a token, for one more product of 8·D² operations in backward: at 788 TFLOP/s and 4.3 TB/s
//!   that pays below D = 366, and no layer with the tanh form is that narrow. Where nothing is recorded it would pay, but
//!   `_addmm_activation` is the tanh form on a GPU alone and the exact one on a CPU, so that no CPU could stand for it in a
//!   test; and tch 0.24 hands its `use_gelu` over in the place of beta, so that its call computes a ReLU.

use super::sizes;
use crate::bridge;
use crate::fault::Result;
use tch::{Device, Kind, Tensor};

/// x [.., K], w [N, K], b [N] → [.., N]. On a CPU the fp32 products of forward and backward go through oneDNN, which
/// generates code for the processor it finds; libtorch's own choice for them, MKL, reaches half of that on processors of
/// other makers. Everywhere else libtorch's `addmm` is right.
pub fn linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    if (x.device(), x.kind()) == (Device::Cpu, Kind::Float) {
        return bridge::linear(x, w, b);
    }
    let (mut size, [outputs, inputs]) = (x.size(), sizes(w));
    *size.last_mut().expect("a dimension") = outputs;
    Ok(b.addmm(&x.reshape([-1, inputs]), &w.tr()).view(size.as_slice()))
}

/// The reference.
pub fn formula(x: &Tensor, w: &Tensor, b: &Tensor) -> Tensor {
    x.matmul(&w.transpose(0, 1)) + b
}
