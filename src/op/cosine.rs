//! The cosine distance between prediction and target, summed over rows.
//!
//! The sum is over 1 − cos. MILAN's loss, 2 − 2 cos, is twice that; EVA's, −cos, is that minus the number of rows;
//! SdAE's takes the cosine along tokens, for which both inputs are transposed.

use super::launch::{KernelSource, Launch, Variant, block_count, type_name};
use super::{scale, sum_partials};
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::Result;
use tch::{Kind, Tensor};

/// Lower bound of a row's norm (PyTorch's `cosine_similarity`).
pub const EPS: f64 = 1e-8;

/// x and y [.., D] → the sum over rows of 1 − x · y / (|x| |y|), fp32 []. y has no gradient. On a GPU in one pass,
/// which also computes the gradient of x and keeps only that.
pub fn cosine_distance(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) && KINDS.contains(&y.kind()) {
        return kernel(x, y);
    }
    let similarity = Tensor::cosine_similarity(&x.to_kind(Kind::Float), &y.detach().to_kind(Kind::Float), -1, EPS);
    Ok((1.0f64 - similarity).sum(Kind::Float))
}

/// The reference; in fp64 if x is.
pub fn formula(x: &Tensor, y: &Tensor) -> Tensor {
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let x = x.to_kind(kind);
    let y = y.detach().to_kind(kind);
    let dot = (&x * &y).sum_dim_intlist([-1i64].as_slice(), false, kind);
    (1.0f64 - dot / (row_norms(&x) * row_norms(&y))).sum(kind)
}

fn row_norms(x: &Tensor) -> Tensor {
    x.square().sum_dim_intlist([-1i64].as_slice(), false, x.kind()).sqrt().clamp_min(EPS)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "cosine",
    embedded: include_str!("../../kernels/cosine.cu"),
    variants: || {
        let pairs = KINDS.iter().flat_map(|&x| KINDS.map(|y| (x, y)));
        pairs.flat_map(|(x, y)| [1, 8].map(|width| variant(x, y, width))).collect()
    },
};

fn variant(x: Kind, y: Kind, width: i64) -> Variant {
    let max_width = if [x, y] == [Kind::BFloat16; 2] { 8 } else { 4 };
    let vector_width = if width % max_width == 0 { max_width } else { 1 };
    vec![("ELEMENT", type_name(x).into()), ("OTHER", type_name(y).into()), ("WIDE", vector_width.to_string())]
}

/// Maximum number of blocks: eight per multiprocessor of a Hopper, all resident at once.
const MAX_BLOCKS: u32 = 1056;

/// The same by the kernel. Makes x and y contiguous.
pub fn kernel(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let needs_gradient = x.requires_grad();
    let y = y.contiguous();
    let forward = |inputs: &[Tensor]| {
        let x = inputs[0].contiguous();
        let width = *x.size().last().expect("at least one dimension");
        let rows = x.numel() as i64 / width;
        let gradient = needs_gradient.then(|| Tensor::empty_like(&x));
        let grid = block_count(rows, 8).min(MAX_BLOCKS);
        let parts = Tensor::empty([i64::from(grid), 1], (Kind::Float, x.device()));
        let launch = Launch {
            source: &SOURCE,
            variant: variant(x.kind(), y.kind(), width),
            entry: "cosine",
            grid: [grid, 1, 1],
            threads: 256,
            shared_bytes: 4 * 8,
        };
        launch.run(&[
            (&x).into(),
            (&y).into(),
            gradient.as_ref().into(),
            (&parts).into(),
            (rows as i32).into(),
            (width as i32).into(),
        ])?;
        let sum = sum_partials::kernel(&parts, Kind::Float)?.view([]);
        Ok(ForwardOutput { outputs: vec![sum], saved: gradient.into_iter().collect() })
    };
    let backward =
        |saved: &[Tensor], gradients: &[Tensor], _: &[bool]| Ok(vec![Some(scale::kernel(&saved[0], &gradients[0])?)]);
    let outputs = apply_function(&[x], forward, backward)?;
    Ok(outputs.into_iter().next().expect("one output"))
}
