//! Softmax attention (Vaswani et al., 2017, equation 1) on the packed projection of queries, keys and values. Short
//! sequences have their own kernels, where one block processes the whole sequence of a head; long ones use libtorch.

mod short; // kernels for short sequences: what they support, and their launches
pub mod class_row; // attention probabilities of the class token
pub mod cosine; // cosine attention within windows (Swin Transformer V2)
pub mod cross; // cross attention
mod next_token; // one token after the other, with the keys and values before it
pub mod windows; // windows of a grid

pub use class_row::class_token_attention;
pub use cosine::cosine_attention;
pub use cross::cross_attention;
pub use next_token::KeyValueCache;
pub use short::{BACKWARD, FORWARD, is_supported};
pub use windows::Windows;

use super::sizes;
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::Result;
use short::{AttentionInputs, AttentionShape, BackwardTensors};
use tch::{Kind, Tensor};

/// Which tokens a query attends to.
#[derive(Clone, Copy)]
pub enum AttentionMask<'a> {
    /// All tokens. Outputs are computed for the queries from token `from` on.
    Full { from: i64 },
    /// The query itself and the tokens before it.
    Causal,
    /// The tokens of the query's window, restricted to its region if the window has several.
    Windows(&'a Windows),
}

/// Full self-attention. qkv [B, S, 3·D] as the projection writes it: queries, keys and values one after the other, the
/// heads inside each → [B, S − from, D], for the queries from token `from` on. The scale is d^−½ for head width
/// d = D / heads.
pub fn attention(qkv: &Tensor, heads: i64, from: i64) -> Result<Tensor> {
    self_attention(qkv, heads, AttentionMask::Full { from })
}

/// Causal self-attention, qkv [B, S, 3·D] → [B, S, D].
pub fn causal_attention(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    self_attention(qkv, heads, AttentionMask::Causal)
}

/// Self-attention within windows and their regions, qkv [B, S, 3·D] → [B, S, D], in the token order of the grid (Swin
/// Transformer, Liu et al., 2021, section 3.2, without its partition, shift and reversal).
pub fn windowed_attention(qkv: &Tensor, heads: i64, windows: &Windows) -> Result<Tensor> {
    self_attention(qkv, heads, AttentionMask::Windows(windows))
}

fn self_attention(qkv: &Tensor, heads: i64, mask: AttentionMask) -> Result<Tensor> {
    let [batch, tokens, packed_width] = sizes(qkv);
    let width = packed_width / 3;
    let sequence = if let AttentionMask::Windows(windows) = mask { windows.size() } else { tokens };
    if qkv.device().is_cuda() && is_supported(qkv.kind(), width / heads, sequence, sequence) {
        return kernel(qkv, heads, mask);
    }
    match mask {
        AttentionMask::Full { from } => {
            let [q, k, v] = split_heads(qkv, heads, from);
            Ok(merge_heads(&sdpa(&q, &k, &v, None, false)))
        }
        AttentionMask::Causal => {
            let [q, k, v] = split_heads(qkv, heads, 0);
            Ok(merge_heads(&sdpa(&q, &k, &v, None, true)))
        }
        AttentionMask::Windows(windows) => {
            let [q, k, v] = split_heads(&windows.gather(qkv), heads, 0);
            let output = merge_heads(&sdpa(&q, &k, &v, windows.attention_mask(batch).as_ref(), false));
            Ok(windows.scatter(&output))
        }
    }
}

/// Calls libtorch's scaled dot-product attention on q [B, H, Sq, d], k and v [B, H, Sk, d].
fn sdpa(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, false)
}

/// [B, H, S, d] → [B, S, D].
fn merge_heads(output: &Tensor) -> Tensor {
    let [batch, heads, tokens, head_width] = sizes(output);
    output.transpose(1, 2).reshape([batch, tokens, heads * head_width])
}

/// The reference: computes all scores, masks them, and applies softmax in fp32.
pub fn formula(qkv: &Tensor, heads: i64, mask: AttentionMask) -> Tensor {
    let [_, tokens, _] = sizes(qkv);
    let from = if let AttentionMask::Full { from } = mask { from } else { 0 };
    let [q, k, v] = split_heads(qkv, heads, from);
    let masked = match mask {
        AttentionMask::Full { .. } => None,
        AttentionMask::Causal => Some(Tensor::ones([tokens, tokens], (Kind::Bool, qkv.device())).triu(1)),
        AttentionMask::Windows(windows) => Some(windows.visibility().logical_not()),
    };
    attention_formula(&q, &k, &v, masked.as_ref())
}

/// softmax(q·kᵀ·d^−½)·v [B, Sq, D], with weight 0 where `masked` [Sq, Sk] is true.
fn attention_formula(q: &Tensor, k: &Tensor, v: &Tensor, masked: Option<&Tensor>) -> Tensor {
    let [_, _, _, head_width] = sizes(q);
    let softmax_kind = if q.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let mut scores = q.matmul(&k.transpose(-2, -1)) * (head_width as f64).powf(-0.5); // [B, H, Sq, Sk]
    if let Some(masked) = masked {
        scores = scores.masked_fill(masked, f64::NEG_INFINITY);
    }
    merge_heads(&scores.softmax(-1, softmax_kind).to_kind(q.kind()).matmul(v))
}

/// Returns q [B, H, S − from, d], k and v [B, H, S, d] as views.
fn split_heads(qkv: &Tensor, heads: i64, from: i64) -> [Tensor; 3] {
    let [batch, tokens, width] = sizes(qkv);
    let packed = qkv.view([batch, tokens, 3, heads, width / 3 / heads]).permute([2, 0, 3, 1, 4]);
    let q = packed.get(0);
    [q.narrow(2, from, tokens - from), packed.get(1), packed.get(2)]
}

/// Self-attention by the kernels, for inputs that [`is_supported`] accepts. Makes qkv contiguous.
pub fn kernel(qkv: &Tensor, heads: i64, mask: AttentionMask) -> Result<Tensor> {
    let [_, tokens, width] = sizes(qkv);
    let from = if let AttentionMask::Full { from } = mask { from } else { 0 };
    let mut shape = AttentionShape {
        heads,
        head_width: width / 3 / heads,
        windows: 1,
        queries: tokens - from,
        first_query: from,
        keys: tokens,
        causal: matches!(mask, AttentionMask::Causal),
    };
    let mut extras = Vec::new();
    if let AttentionMask::Windows(windows) = mask {
        shape.windows = windows.count();
        shape.queries = windows.size();
        shape.keys = windows.size();
        extras = vec![windows.index.shallow_clone(), windows.region.shallow_clone()];
    }
    let forward = |inputs: &[Tensor]| {
        let qkv = short::to_aligned(&inputs[0]);
        let output = short::forward(&AttentionInputs { q: &qkv, kv: &qkv, extras: &extras }, &shape)?;
        let out = output.out.shallow_clone();
        let saved = [qkv, output.out, output.lse].into_iter().chain(extras.iter().map(Tensor::shallow_clone));
        Ok(ForwardOutput { outputs: vec![out], saved: saved.collect() })
    };
    let outputs = apply_function(&[qkv], forward, move |saved, gradients, _| {
        let g_qkv = Tensor::empty_like(&saved[0]);
        let inputs = AttentionInputs { q: &saved[0], kv: &saved[0], extras: &saved[3..] };
        let tensors =
            BackwardTensors { out: &saved[1], lse: &saved[2], g_out: &gradients[0], g_q: &g_qkv, g_kv: &g_qkv };
        short::backward(&inputs, &shape, &tensors)?;
        Ok(vec![Some(g_qkv)])
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}
