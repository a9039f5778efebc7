//! A tensor times one number on the same device. Losses work out their gradient in the forward pass and keep it; this is
//! their backward pass.

use super::launch::{Launch, Source, blocks, by_width, wide};
use crate::fault::Result;
use tch::{Kind, Tensor};

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

pub const SOURCE: Source = Source {
    name: "scale",
    built_in: include_str!("../../kernels/scale.cu"),
    variants: || KINDS.iter().flat_map(|&kind| [1, 8].map(|numel| by_width(kind, numel))).collect(),
};

/// x of any shape, contiguous, times `by` fp32 [] → the shape and kind of x; the product is rounded once.
pub fn kernel(x: &Tensor, by: &Tensor) -> Result<Tensor> {
    let (y, numel) = (Tensor::empty_like(x), x.numel() as i64);
    let launch = Launch {
        source: &SOURCE,
        variant: by_width(x.kind(), numel),
        entry: "scale",
        grid: [blocks(numel / wide(x.kind(), numel), 256), 1, 1],
        threads: 256,
        shared: 0,
    };
    launch.run(&[x.into(), by.into(), (&y).into(), numel.into()])?;
    Ok(y)
}

/// The reference.
pub fn formula(x: &Tensor, by: &Tensor) -> Tensor {
    (x.to_kind(by.kind()) * by).to_kind(x.kind())
}
