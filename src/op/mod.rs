//! One operation a file: a plain formula (the reference, public so that tests and readers can call it) and, where one
//! exists, a faster form of the same name and signature. An operation looks at where its tensors live and chooses.

pub mod launch; // from a kernel's source to its launch

pub mod adamw;
pub mod attention;
pub mod bias_gelu;
pub mod cosine;
pub mod fill;
pub mod fold;
pub mod hog;
pub mod info_nce;
pub mod layer_norm;
pub mod lerp;
pub mod linear;
pub mod masked_mse;
pub mod patch;
pub mod scale;
pub mod shuffle;
pub mod spectrum;
pub mod square_sum;

use launch::Source;
use tch::Tensor;

/// Every file of kernels.
pub fn sources() -> Vec<&'static Source> {
    vec![
        &adamw::SOURCE,
        &attention::BACKWARD,
        &attention::FORWARD,
        &attention::class_row::SOURCE,
        &bias_gelu::SOURCE,
        &cosine::SOURCE,
        &fill::SOURCE,
        &fold::SOURCE,
        &hog::SOURCE,
        &info_nce::SOURCE,
        &layer_norm::SOURCE,
        &lerp::SOURCE,
        &masked_mse::SOURCE,
        &patch::SOURCE,
        &scale::SOURCE,
        &shuffle::SOURCE,
        &square_sum::SOURCE,
    ]
}

/// The sizes of a tensor of `R` dimensions; naming them on a function's first line documents and checks the shape.
pub fn sizes<const R: usize>(tensor: &Tensor) -> [i64; R] {
    let size = tensor.size();
    size.as_slice().try_into().unwrap_or_else(|_| panic!("a tensor of {R} dimensions is wanted, got {size:?}"))
}
