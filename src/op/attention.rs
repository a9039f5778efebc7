//! Softmax attention read from the packed projection.

use super::sizes;
use tch::{Kind, Tensor};

/// qkv [B, S, 3·D] as the projection wrote it: queries, keys and values one after the other, heads inside each.
/// Only the queries from token `from` on are answered → [B, S − from, D]. Scale is d^−½ for head width d = D / heads.
pub fn attention(qkv: &Tensor, heads: i64, from: i64) -> Tensor {
    let [batch, tokens, width] = sizes(qkv);
    let [q, k, v] = split(qkv, heads, from);
    Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, false, None, false).transpose(1, 2).reshape([
        batch,
        tokens - from,
        width / 3,
    ])
}

/// The reference; softmax in fp32.
pub fn formula(qkv: &Tensor, heads: i64, from: i64) -> Tensor {
    let [batch, tokens, width] = sizes(qkv);
    let [q, k, v] = split(qkv, heads, from);
    let scale = ((width / 3 / heads) as f64).powf(-0.5);
    let wide = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let scores = q.matmul(&k.transpose(-2, -1)) * scale; // [B, H, S − from, S]
    let weights = scores.softmax(-1, wide).to_kind(qkv.kind());
    weights.matmul(&v).transpose(1, 2).reshape([batch, tokens - from, width / 3])
}

/// q [B, H, S − from, d], k and v [B, H, S, d], as views.
fn split(qkv: &Tensor, heads: i64, from: i64) -> [Tensor; 3] {
    let [batch, tokens, width] = sizes(qkv);
    let packed = qkv.view([batch, tokens, 3, heads, width / 3 / heads]).permute([2, 0, 3, 1, 4]);
    let q = packed.get(0);
    [q.narrow(2, from, tokens - from), packed.get(1), packed.get(2)]
}
