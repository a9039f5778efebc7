//! Squared norm of a flat buffer, which is not finite if any value is not.

use super::launch::{KernelSource, Launch, type_name, variants_by_type};
use crate::error::Result;
use tch::{Kind, Tensor};

/// Σ x² of any shape → fp32 [].
pub fn square_sum(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) {
        return kernel(x);
    }
    let flat = x.view(-1);
    Ok(flat.dot(&flat).to_kind(Kind::Float))
}

/// The reference, in fp64 if x is, else in fp32.
pub fn formula(x: &Tensor) -> Tensor {
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    x.to_kind(kind).square().sum(kind)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "square_sum",
    embedded: include_str!("../../kernels/square_sum.cu"),
    variants: || variants_by_type(&KINDS),
};

/// Maximum number of blocks: eight per multiprocessor of the largest GPUs. A constant, so that the order of summation
/// depends only on the length.
const MAX_BLOCKS: i64 = 132 * 8;

/// The same by the kernels, for fp32 and bf16, with the same bits on every run and every GPU.
pub fn kernel(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous();
    // A slice of a buffer may not be 16-byte aligned.
    let x = if (x.data_ptr() as usize).is_multiple_of(16) { x } else { x.copy() };
    let n = x.numel() as i64;
    let elements_per_block = 256 * 4 * 16 / x.kind().elt_size_in_bytes() as i64;
    let runs = ((n + elements_per_block - 1) / elements_per_block).clamp(1, MAX_BLOCKS);
    let parts = Tensor::empty([runs], (Kind::Float, x.device()));
    let out = Tensor::empty([], (Kind::Float, x.device()));
    let launch = |entry, grid| Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(x.kind()).into())],
        entry,
        grid: [grid, 1, 1],
        threads: 256,
        shared_bytes: 8 * 4,
    };
    launch("square_sum", runs as u32).run(&[(&x).into(), (&parts).into(), n.into()])?;
    launch("square_sum_final", 1).run(&[(&parts).into(), (&out).into(), (runs as i32).into()])?;
    Ok(out)
}
