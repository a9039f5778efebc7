//! Sums of partial sums, one row per block of the kernel that computed them, in an order that depends only on their
//! number.

use super::launch::{KernelSource, Launch, block_count, type_name, variants_by_type};
use super::sizes;
use crate::error::Result;
use tch::{Kind, Tensor};

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "sum_partials",
    embedded: include_str!("../../kernels/sum_partials.cu"),
    variants: || variants_by_type(&[Kind::Float, Kind::BFloat16, Kind::Half]),
};

/// parts fp32 [N, D] → `[D]` of the given dtype.
pub fn kernel(parts: &Tensor, kind: Kind) -> Result<Tensor> {
    let [n, width] = sizes(parts);
    let out = Tensor::empty([width], (kind, parts.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(kind).into())],
        entry: "sum_partials",
        grid: [block_count(width, 32), 1, 1],
        threads: 512,
        shared_bytes: 4 * 512,
    };
    launch.run(&[parts.into(), (&out).into(), (n as i32).into(), (width as i32).into()])?;
    Ok(out)
}

/// The reference.
pub fn formula(parts: &Tensor, kind: Kind) -> Tensor {
    parts.sum_dim_intlist([0i64].as_slice(), false, parts.kind()).to_kind(kind)
}
