//! Partial sums, one row a block of the kernel that made them, added up in an order that their number alone decides.

use super::launch::{Launch, Source, blocks, by_type, type_name};
use super::sizes;
use crate::fault::Result;
use tch::{Kind, Tensor};

pub const SOURCE: Source = Source {
    name: "fold",
    built_in: include_str!("../../kernels/fold.cu"),
    variants: || by_type(&[Kind::Float, Kind::BFloat16, Kind::Half]),
};

/// parts fp32 [N, D] → [D] of the kind asked for.
pub fn kernel(parts: &Tensor, kind: Kind) -> Result<Tensor> {
    let [n, width] = sizes(parts);
    let out = Tensor::empty([width], (kind, parts.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(kind).into())],
        entry: "fold",
        grid: [blocks(width, 32), 1, 1],
        threads: 512,
        shared: 4 * 512,
    };
    launch.run(&[parts.into(), (&out).into(), (n as i32).into(), (width as i32).into()])?;
    Ok(out)
}

/// The reference.
pub fn formula(parts: &Tensor, kind: Kind) -> Tensor {
    parts.sum_dim_intlist([0i64].as_slice(), false, parts.kind()).to_kind(kind)
}
