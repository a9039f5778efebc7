//! The cosine distance between what is predicted and what is wanted, row by row.
//!
//! 1 − cos is summed. MILAN's loss, 2 − 2 cos, is twice it; EVA's, −cos, is it less the number of rows; SdAE's takes the
//! cosine along tokens, for which both are handed over transposed.

use super::launch::{Launch, Source, Variant, blocks, type_name};
use super::{fold, scale};
use crate::bridge::{Forward, node};
use crate::fault::Result;
use tch::{Kind, Tensor};

/// A row's length is taken to be at least this (PyTorch's `cosine_similarity`).
pub const EPS: f64 = 1e-8;

/// x and y [.., D] → the sum over rows of 1 − x · y / (|x| |y|), fp32 []. y has no gradient. On a GPU in one pass, which
/// also makes the gradient of x and keeps that alone.
pub fn cosine(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) && KINDS.contains(&y.kind()) {
        return kernel(x, y);
    }
    let similar = Tensor::cosine_similarity(&x.to_kind(Kind::Float), &y.detach().to_kind(Kind::Float), -1, EPS);
    Ok((1.0f64 - similar).sum(Kind::Float))
}

/// The reference; in fp64 where x is.
pub fn formula(x: &Tensor, y: &Tensor) -> Tensor {
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let (x, y) = (x.to_kind(kind), y.detach().to_kind(kind));
    let length = |of: &Tensor| of.square().sum_dim_intlist([-1i64].as_slice(), false, kind).sqrt().clamp_min(EPS);
    let product = (&x * &y).sum_dim_intlist([-1i64].as_slice(), false, kind);
    (1.0f64 - product / (length(&x) * length(&y))).sum(kind)
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

pub const SOURCE: Source = Source {
    name: "cosine",
    built_in: include_str!("../../kernels/cosine.cu"),
    variants: || {
        let pairs = KINDS.iter().flat_map(|&x| KINDS.map(|y| (x, y)));
        pairs.flat_map(|(x, y)| [1, 8].map(|width| variant(x, y, width))).collect()
    },
};

fn variant(x: Kind, y: Kind, width: i64) -> Variant {
    let most = if [x, y] == [Kind::BFloat16; 2] { 8 } else { 4 };
    let wide = if width % most == 0 { most } else { 1 };
    vec![("ELEMENT", type_name(x).into()), ("OTHER", type_name(y).into()), ("WIDE", wide.to_string())]
}

/// Blocks at most: eight for each multiprocessor of a Hopper, all of them at work at once.
const MOST: u32 = 1056;

/// The same by our kernel; x and y are made contiguous.
pub fn kernel(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let trained = x.requires_grad();
    let y = y.contiguous();
    let run = |given: &[Tensor]| {
        let x = given[0].contiguous();
        let width = *x.size().last().expect("a dimension");
        let rows = x.numel() as i64 / width;
        let gradient = trained.then(|| Tensor::empty_like(&x));
        let grid = blocks(rows, 8).min(MOST);
        let parts = Tensor::empty([i64::from(grid), 1], (Kind::Float, x.device()));
        let launch = Launch {
            source: &SOURCE,
            variant: variant(x.kind(), y.kind(), width),
            entry: "cosine",
            grid: [grid, 1, 1],
            threads: 256,
            shared: 4 * 8,
        };
        let tensors = [(&x).into(), (&y).into(), gradient.as_ref().into(), (&parts).into()];
        launch.run(&[&tensors[..], &[(rows as i32).into(), (width as i32).into()]].concat())?;
        let sum = fold::kernel(&parts, Kind::Float)?.view([]);
        Ok(Forward { outputs: vec![sum], saved: gradient.into_iter().collect() })
    };
    let outputs = node(&[x], run, |saved, gradients, _| Ok(vec![Some(scale::kernel(&saved[0], &gradients[0])?)]))?;
    Ok(outputs.into_iter().next().expect("one output"))
}
