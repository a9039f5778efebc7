//! Attention probabilities of the class token.

use super::{short, split_heads};
use crate::error::Result;
use crate::op::launch::{KernelSource, Launch, block_count, type_name, variants_by_type};
use crate::op::sizes;
use tch::{Kind, Tensor};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "attention_class_row",
    embedded: include_str!("../../../kernels/attention_class_row.cu"),
    variants: || variants_by_type(&KINDS),
};

/// Shared memory that every GPU grants a block, in bytes.
const MAX_SHARED_BYTES: i64 = 48 << 10;

/// qkv [B, S, 3·D] as in [`super::attention()`] → the attention probabilities of the first query, fp32 [B, H, S], whose
/// sum over S is 1. Without gradient: masking policies read them.
pub fn class_token_attention(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    let [_, tokens, width] = sizes(qkv);
    if qkv.device().is_cuda() && is_supported(qkv.kind(), tokens, width / 3 / heads) {
        kernel(qkv, heads)
    } else {
        Ok(formula(qkv, heads))
    }
}

/// The reference.
pub fn formula(qkv: &Tensor, heads: i64) -> Tensor {
    let qkv = qkv.detach();
    let [q, k, _] = split_heads(&qkv, heads, 0);
    let [batch, heads, tokens, head_width] = sizes(&k);
    let softmax_kind = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let q = q.narrow(2, 0, 1).to_kind(softmax_kind);
    let k = k.to_kind(softmax_kind);
    let scores = q.matmul(&k.transpose(-2, -1)) * (head_width as f64).powf(-0.5);
    scores.softmax(-1, softmax_kind).view([batch, heads, tokens])
}

/// The kernel needs rows of whole 16 bytes, and scores that fit in shared memory.
fn is_supported(kind: Kind, tokens: i64, head_width: i64) -> bool {
    KINDS.contains(&kind)
        && head_width * kind.elt_size_in_bytes() as i64 % 16 == 0
        && shared_bytes(tokens, head_width) <= MAX_SHARED_BYTES
}

fn shared_bytes(tokens: i64, head_width: i64) -> i64 {
    4 * (tokens + head_width + 4)
}

/// The same by the kernel. Makes qkv contiguous.
pub fn kernel(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    let qkv = short::to_aligned(&qkv.detach());
    let [batch, tokens, width] = sizes(&qkv);
    let head_width = width / 3 / heads;
    let out = Tensor::empty([batch, heads, tokens], (Kind::Float, qkv.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(qkv.kind()).into())],
        entry: "attention_class_row",
        grid: [block_count(batch * heads, 1), 1, 1],
        threads: 128,
        shared_bytes: shared_bytes(tokens, head_width) as usize,
    };
    // The kernel computes powers of two.
    let scale = ((head_width as f64).powf(-0.5) * std::f64::consts::LOG2_E) as f32;
    let [heads, tokens, head_width] = [heads, tokens, head_width].map(|n| (n as i32).into());
    launch.run(&[(&qkv).into(), (&out).into(), heads, tokens, head_width, scale.into()])?;
    Ok(out)
}
