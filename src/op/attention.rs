//! Softmax attention (Vaswani et al., 2017, equation 1) read from the packed projection. Short sequences have kernels of
//! their own, where one block holds the whole sequence of a head; long ones are the library's.

mod short; // our kernels: which sequences they take, and their launches
pub mod class_row; // the first query's probabilities
pub mod cosine; // windows of a grid, by the cosine, with a scale and a bias
pub mod cross; // queries of one sequence, keys and values of another
pub mod windows; // windows of a grid

pub use class_row::class_row;
pub use cosine::cosine;
pub use cross::cross;
pub use short::{BACKWARD, FORWARD, takes};
pub use windows::Windows;

use super::sizes;
use crate::bridge::{Forward, node};
use crate::fault::Result;
use short::{Given, Shape};
use tch::{Kind, Tensor};

/// Whom a query sees.
#[derive(Clone, Copy)]
pub enum Sight<'a> {
    /// Everyone. Only the queries from this token on are answered.
    All { from: i64 },
    /// Itself and what stands before it.
    Causal,
    /// The tokens of its window, and of its region where the window holds several.
    Windows(&'a Windows),
}

/// qkv [B, S, 3·D] as the projection wrote it: queries, keys and values one after the other, heads inside each.
/// Only the queries from token `from` on are answered → [B, S − from, D]. Scale is d^−½ for head width d = D / heads.
pub fn attention(qkv: &Tensor, heads: i64, from: i64) -> Result<Tensor> {
    packed(qkv, heads, Sight::All { from })
}

/// qkv [B, S, 3·D], where a token sees itself and those before it → [B, S, D].
pub fn causal(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    packed(qkv, heads, Sight::Causal)
}

/// qkv [B, S, 3·D], S the windows' tokens, which see those of their own window and region → [B, S, D], tokens in the
/// same order (Swin Transformer, Liu et al., 2021, section 3.2, without its partition, shift and reversal).
pub fn windowed(qkv: &Tensor, heads: i64, windows: &Windows) -> Result<Tensor> {
    packed(qkv, heads, Sight::Windows(windows))
}

fn packed(qkv: &Tensor, heads: i64, sight: Sight) -> Result<Tensor> {
    let [batch, tokens, width] = sizes(qkv);
    let (width, sequence) = (width / 3, if let Sight::Windows(windows) = sight { windows.size() } else { tokens });
    if qkv.device().is_cuda() && takes(qkv.kind(), width / heads, sequence, sequence) {
        return kernel(qkv, heads, sight);
    }
    match sight {
        Sight::All { from } => {
            let [q, k, v] = split(qkv, heads, from);
            Ok(joined(&library(&q, &k, &v, None, false)))
        }
        Sight::Causal => {
            let [q, k, v] = split(qkv, heads, 0);
            Ok(joined(&library(&q, &k, &v, None, true)))
        }
        Sight::Windows(windows) => {
            let [q, k, v] = split(&windows.gather(qkv), heads, 0);
            let mixed = joined(&library(&q, &k, &v, windows.mask(batch).as_ref(), false));
            Ok(windows.scatter(&mixed))
        }
    }
}

/// libtorch's attention on q [B, H, Sq, d], k and v [B, H, Sk, d].
fn library(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, false)
}

/// [B, H, S, d] → [B, S, D].
fn joined(mixed: &Tensor) -> Tensor {
    let [batch, heads, tokens, each] = sizes(mixed);
    mixed.transpose(1, 2).reshape([batch, tokens, heads * each])
}

/// The reference; softmax in fp32. Every query looks at every token, and what it may not see is struck out.
pub fn formula(qkv: &Tensor, heads: i64, sight: Sight) -> Tensor {
    let [_, tokens, _] = sizes(qkv);
    let from = if let Sight::All { from } = sight { from } else { 0 };
    let [q, k, v] = split(qkv, heads, from);
    let hidden = match sight {
        Sight::All { .. } => None,
        Sight::Causal => Some(Tensor::ones([tokens, tokens], (Kind::Bool, qkv.device())).triu(1)),
        Sight::Windows(windows) => Some(windows.sight().logical_not()),
    };
    plain(&q, &k, &v, hidden.as_ref())
}

/// Softmax(q·kᵀ·d^−½)·v [B, Sq, D], with weight zero where `hidden` [Sq, Sk].
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, hidden: Option<&Tensor>) -> Tensor {
    let [_, _, _, each] = sizes(q);
    let wide = if q.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let mut scores = q.matmul(&k.transpose(-2, -1)) * (each as f64).powf(-0.5); // [B, H, Sq, Sk]
    if let Some(hidden) = hidden {
        scores = scores.masked_fill(hidden, f64::NEG_INFINITY);
    }
    joined(&scores.softmax(-1, wide).to_kind(q.kind()).matmul(v))
}

/// q [B, H, S − from, d], k and v [B, H, S, d], as views.
fn split(qkv: &Tensor, heads: i64, from: i64) -> [Tensor; 3] {
    let [batch, tokens, width] = sizes(qkv);
    let packed = qkv.view([batch, tokens, 3, heads, width / 3 / heads]).permute([2, 0, 3, 1, 4]);
    let q = packed.get(0);
    [q.narrow(2, from, tokens - from), packed.get(1), packed.get(2)]
}

/// The same by our kernels, for what [`takes`] says; qkv is made contiguous.
pub fn kernel(qkv: &Tensor, heads: i64, sight: Sight) -> Result<Tensor> {
    let [_, tokens, width] = sizes(qkv);
    let from = if let Sight::All { from } = sight { from } else { 0 };
    let mut shape = Shape {
        heads,
        width: width / 3 / heads,
        windows: 1,
        queries: tokens - from,
        from,
        keys: tokens,
        causal: matches!(sight, Sight::Causal),
    };
    let places = if let Sight::Windows(windows) = sight {
        (shape.windows, shape.queries, shape.keys) = (windows.count(), windows.size(), windows.size());
        vec![windows.index.shallow_clone(), windows.region.shallow_clone()]
    } else {
        Vec::new()
    };
    let forward = |given: &[Tensor]| {
        let qkv = short::aligned(&given[0]);
        let answer = short::forward(&Given { q: &qkv, kv: &qkv, places: &places }, &shape)?;
        let out = answer.out.shallow_clone();
        let saved = [qkv, answer.out, answer.lse].into_iter().chain(places.iter().map(Tensor::shallow_clone));
        Ok(Forward { outputs: vec![out], saved: saved.collect() })
    };
    let outputs = node(&[qkv], forward, move |saved, gradients, _| {
        let gqkv = Tensor::empty_like(&saved[0]);
        let given = Given { q: &saved[0], kv: &saved[0], places: &saved[3..] };
        short::backward(&given, &shape, [&saved[1], &saved[2]], &gradients[0], [&gqkv, &gqkv])?;
        Ok(vec![Some(gqkv)])
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}
