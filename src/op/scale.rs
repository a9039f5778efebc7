//! A tensor times one number on the same device: the backward pass of losses that compute their gradient in the forward
//! pass and keep it.

use super::launch::{KernelSource, Launch, block_count, variant_by_width, vector_width};
use crate::error::Result;
use tch::{Kind, Tensor};

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "scale",
    embedded: include_str!("../../kernels/scale.cu"),
    variants: || KINDS.iter().flat_map(|&kind| [1, 8].map(|numel| variant_by_width(kind, numel))).collect(),
};

/// x of any shape, contiguous, times `factor` fp32 [] → the shape and dtype of x; the product is rounded once.
pub fn kernel(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    let y = Tensor::empty_like(x);
    let numel = x.numel() as i64;
    let launch = Launch {
        source: &SOURCE,
        variant: variant_by_width(x.kind(), numel),
        entry: "scale",
        grid: [block_count(numel / vector_width(x.kind(), numel), 256), 1, 1],
        threads: 256,
        shared_bytes: 0,
    };
    launch.run(&[x.into(), factor.into(), (&y).into(), numel.into()])?;
    Ok(y)
}

/// The reference.
pub fn formula(x: &Tensor, factor: &Tensor) -> Tensor {
    (x.to_kind(factor.kind()) * factor).to_kind(x.kind())
}
