//! The squared norm of a flat buffer: not finite if any value is not.

use super::launch::{Launch, Source, by_type, type_name};
use crate::fault::Result;
use tch::{Kind, Tensor};

/// Σ x² of any shape → fp32 [].
pub fn square_sum(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) {
        return kernel(x);
    }
    let flat = x.view(-1);
    Ok(flat.dot(&flat).to_kind(Kind::Float))
}

/// The reference, in x's own dtype or, for halves, in fp32.
pub fn formula(x: &Tensor) -> Tensor {
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    x.to_kind(kind).square().sum(kind)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

pub const SOURCE: Source =
    Source { name: "square_sum", built_in: include_str!("../../kernels/square_sum.cu"), variants: || by_type(&KINDS) };

/// Eight blocks for each multiprocessor of the largest GPUs; a constant, so that the order of summation is one.
const BLOCKS: i64 = 132 * 8;

/// The same by our kernels, for fp32 and bf16: the same bits on every run and every GPU.
pub fn kernel(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous();
    // A part of a buffer may begin where 16 bytes cannot be read at a time.
    let x = if (x.data_ptr() as usize).is_multiple_of(16) { x } else { x.copy() };
    let n = x.numel() as i64;
    let each = 256 * 4 * 16 / x.kind().elt_size_in_bytes() as i64;
    let runs = ((n + each - 1) / each).clamp(1, BLOCKS);
    let parts = Tensor::empty([runs], (Kind::Float, x.device()));
    let out = Tensor::empty([], (Kind::Float, x.device()));
    let launch = |entry, grid| Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(x.kind()).into())],
        entry,
        grid: [grid, 1, 1],
        threads: 256,
        shared: 8 * 4,
    };
    launch("square_sum", runs as u32).run(&[(&x).into(), (&parts).into(), n.into()])?;
    launch("square_sum_end", 1).run(&[(&parts).into(), (&out).into(), (runs as i32).into()])?;
    Ok(out)
}
