//! Attention within windows by the cosine of query and key, times a scale per head, plus a bias per pair of positions
//! in the window (Swin Transformer V2, Liu et al., 2022, section 3.2, equation 2).

use super::short::{self, AttentionInputs, AttentionShape, BackwardTensors, is_cosine_supported};
use super::{Windows, merge_heads, split_heads};
use crate::bridge::{ForwardOutput, apply_function};
use crate::error::Result;
use crate::op::sizes;
use tch::{Kind, Tensor};

/// Lower bound of the norm of a query or key, so that a zero row stays zero.
const MIN_NORM: f64 = 1e-6;

/// qkv [B, S, 3·D] as in [`super::windowed_attention`]; scale fp32 `[H]`; bias fp32 [H, T, T], from query to key, for
/// windows of T tokens → [B, S, D]: softmax(scale · cos(q, k) + bias) · v over the tokens of the query's window and
/// region. (Swin's code subtracts 100 from the scores of other regions instead of masking them, which is the same in
/// fp32 as long as the scores of a window are within 80 of each other.)
pub fn cosine_attention(qkv: &Tensor, heads: i64, windows: &Windows, [scale, bias]: [&Tensor; 2]) -> Result<Tensor> {
    let [_, _, width] = sizes(qkv);
    if qkv.device().is_cuda() && is_cosine_supported(qkv.kind(), width / 3 / heads, windows.size()) {
        return kernel(qkv, heads, windows, [scale, bias]);
    }
    let [q, k, v] = split_heads(&windows.gather(qkv), heads, 0); // [B · W, H, T, d]
    let q = normalize(&q) * scale.view([heads, 1, 1]).to_kind(qkv.kind());
    let scores = q.matmul(&normalize(&k).transpose(-2, -1));
    let tokens = windows.size();
    let by_window = [-1, windows.count(), heads, tokens, tokens];
    let bias = match windows.attention_mask(1) {
        // [W, H, T, T]
        Some(mask) => bias.masked_fill(&mask.logical_not(), f64::NEG_INFINITY),
        None => bias.shallow_clone(),
    };
    let softmax_kind = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let probabilities = (scores.view(by_window) + bias).softmax(-1, softmax_kind).to_kind(qkv.kind());
    Ok(windows.scatter(&merge_heads(&probabilities.view([-1, heads, tokens, tokens]).matmul(&v))))
}

/// Normalizes the rows of x [.., d] to unit length.
fn normalize(x: &Tensor) -> Tensor {
    let norm_kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let norm = x.norm_scalaropt_dim_dtype(2, [-1i64].as_slice(), true, norm_kind);
    (x / norm.clamp_min(MIN_NORM)).to_kind(x.kind())
}

/// The reference: computes all scores, masks them, and applies softmax in fp32.
pub fn formula(qkv: &Tensor, heads: i64, windows: &Windows, [scale, bias]: [&Tensor; 2]) -> Tensor {
    let [q, k, v] = split_heads(qkv, heads, 0); // [B, H, S, d]
    let softmax_kind = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let cosines = normalize(&q).matmul(&normalize(&k).transpose(-2, -1)).to_kind(softmax_kind);
    let position = windows.position_in_window();
    let bias = bias.index_select(1, &position).index_select(2, &position); // [H, S, S]
    let scores = cosines * scale.view([heads, 1, 1]) + bias;
    let scores = scores.masked_fill(&windows.visibility().logical_not(), f64::NEG_INFINITY);
    merge_heads(&scores.softmax(-1, softmax_kind).to_kind(qkv.kind()).matmul(&v))
}

/// The same by the kernels, for bf16 and f16, the head widths of [`super::is_supported`] and windows whose bias
/// gradient fits in shared memory. Makes all inputs contiguous. Gradients of scale and bias are summed over runs of
/// windows and samples, then over the runs in order.
pub fn kernel(qkv: &Tensor, heads: i64, windows: &Windows, [scale, bias]: [&Tensor; 2]) -> Result<Tensor> {
    let [_, _, width] = sizes(qkv);
    let tokens = windows.size();
    let shape = AttentionShape {
        heads,
        head_width: width / 3 / heads,
        windows: windows.count(),
        queries: tokens,
        first_query: 0,
        keys: tokens,
        causal: false,
    };
    let window_tensors = [windows.index.shallow_clone(), windows.region.shallow_clone()];
    let forward = |inputs: &[Tensor]| {
        let qkv = short::to_aligned(&inputs[0]);
        let score_tensors = [&inputs[1], &inputs[2]].map(|x| x.to_kind(Kind::Float).contiguous());
        let extras: Vec<Tensor> = window_tensors.into_iter().chain(score_tensors).collect();
        let output = short::forward(&AttentionInputs { q: &qkv, kv: &qkv, extras: &extras }, &shape)?;
        let out = output.out.shallow_clone();
        let saved = [qkv, output.out, output.lse].into_iter().chain(extras).collect();
        Ok(ForwardOutput { outputs: vec![out], saved })
    };
    let outputs = apply_function(&[qkv, scale, bias], forward, move |saved, gradients, needed| {
        let g_qkv = Tensor::empty_like(&saved[0]);
        let inputs = AttentionInputs { q: &saved[0], kv: &saved[0], extras: &saved[3..] };
        let tensors =
            BackwardTensors { out: &saved[1], lse: &saved[2], g_out: &gradients[0], g_q: &g_qkv, g_kv: &g_qkv };
        let sums = short::backward(&inputs, &shape, &tensors)?.expect("gradients of bias and scale");
        let pairs = heads * tokens * tokens;
        let g_bias = sums.narrow(0, 0, pairs).view([heads, tokens, tokens]);
        let g_scale = sums.narrow(0, pairs, heads);
        Ok([g_qkv, g_scale, g_bias].into_iter().zip(needed).map(|(g, needed)| needed.then_some(g)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}
