//! Attention of the queries of one sequence to the keys and values of another.

use super::short::{self, AttentionInputs, AttentionShape, BackwardTensors};
use super::{attention_formula, is_supported, merge_heads, sdpa};
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::Result;
use crate::op::sizes;
use tch::Tensor;

/// q [B, Sq, D] and kv [B, Sk, 2·D], keys and then values, the heads inside each → [B, Sq, D]. The scale is d^−½.
pub fn cross_attention(q: &Tensor, kv: &Tensor, heads: i64) -> Result<Tensor> {
    let [_, queries, width] = sizes(q);
    let [_, keys, _] = sizes(kv);
    if q.device().is_cuda() && is_supported(q.kind(), width / heads, queries, keys) {
        return kernel(q, kv, heads);
    }
    let [q, k, v] = split(q, kv, heads);
    Ok(merge_heads(&sdpa(&q, &k, &v, None, false)))
}

/// The reference; softmax in fp32.
pub fn formula(q: &Tensor, kv: &Tensor, heads: i64) -> Tensor {
    let [q, k, v] = split(q, kv, heads);
    attention_formula(&q, &k, &v, None)
}

/// Returns q [B, H, Sq, d], k and v [B, H, Sk, d] as views.
fn split(q: &Tensor, kv: &Tensor, heads: i64) -> [Tensor; 3] {
    let [batch, queries, width] = sizes(q);
    let [_, keys, _] = sizes(kv);
    let packed = kv.view([batch, keys, 2, heads, width / heads]).permute([2, 0, 3, 1, 4]);
    let q = q.view([batch, queries, heads, width / heads]).transpose(1, 2);
    [q, packed.get(0), packed.get(1)]
}

/// The same by the kernels, for inputs that [`is_supported`] accepts. Makes q and kv contiguous.
pub fn kernel(q: &Tensor, kv: &Tensor, heads: i64) -> Result<Tensor> {
    let [_, queries, width] = sizes(q);
    let [_, keys, _] = sizes(kv);
    let shape =
        AttentionShape { heads, head_width: width / heads, windows: 1, queries, first_query: 0, keys, causal: false };
    let forward = |inputs: &[Tensor]| {
        let q = short::to_aligned(&inputs[0]);
        let kv = short::to_aligned(&inputs[1]);
        let output = short::forward(&AttentionInputs { q: &q, kv: &kv, extras: &[] }, &shape)?;
        Ok(ForwardOutput { outputs: vec![output.out.shallow_clone()], saved: vec![q, kv, output.out, output.lse] })
    };
    let outputs = apply_function(&[q, kv], forward, move |saved, gradients, needed| {
        let g_q = Tensor::empty_like(&saved[0]);
        let g_kv = Tensor::empty_like(&saved[1]);
        let inputs = AttentionInputs { q: &saved[0], kv: &saved[1], extras: &[] };
        let tensors = BackwardTensors { out: &saved[2], lse: &saved[3], g_out: &gradients[0], g_q: &g_q, g_kv: &g_kv };
        short::backward(&inputs, &shape, &tensors)?;
        Ok([g_q, g_kv].into_iter().zip(needed).map(|(gradient, needed)| needed.then_some(gradient)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}
