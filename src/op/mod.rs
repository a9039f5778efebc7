//! One operation per file: a plain `formula`, the reference that tests compare with, and a faster `kernel` of the same
//! signature. The function named after the operation chooses between them by the device and dtype of its inputs.

pub mod launch; // kernel sources, compilation and launches

pub mod adamw;
pub mod attention;
pub mod bias_gelu;
pub mod cosine;
pub mod hog;
pub mod info_nce;
pub mod k_means;
pub mod layer_norm;
pub mod lerp;
pub mod linear;
pub mod masked_mse;
pub mod noise;
pub mod patch;
pub mod rms_norm;
pub mod scale;
pub mod shuffle;
pub mod spectrum;
pub mod square_sum;
pub mod sum_partials;
pub mod tokens;

use launch::KernelSource;
use tch::{Kind, Tensor};

/// Returns every kernel source file.
pub fn kernel_sources() -> Vec<&'static KernelSource> {
    vec![
        &adamw::SOURCE,
        &attention::BACKWARD,
        &attention::FORWARD,
        &attention::class_row::SOURCE,
        &bias_gelu::SOURCE,
        &cosine::SOURCE,
        &hog::SOURCE,
        &info_nce::SOURCE,
        &layer_norm::SOURCE,
        &lerp::SOURCE,
        &masked_mse::SOURCE,
        &noise::SOURCE,
        &patch::SOURCE,
        &scale::SOURCE,
        &shuffle::SOURCE,
        &square_sum::SOURCE,
        &sum_partials::SOURCE,
        &tokens::SOURCE,
    ]
}

/// Returns x in fp32, or in fp64 if it is: losses and statistics are never computed in half precision.
pub fn at_least_float(x: &Tensor) -> Tensor {
    if x.kind() == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) }
}

/// Returns the sizes of a tensor of `R` dimensions. On the first line of a function it documents and checks the shape.
pub fn sizes<const R: usize>(tensor: &Tensor) -> [i64; R] {
    let size = tensor.size();
    size.as_slice().try_into().unwrap_or_else(|_| panic!("expected a tensor of {R} dimensions, got {size:?}"))
}
