//! Attention within windows by the cosine of query and key, which each head multiplies by a scale of its own, plus a bias
//! for each pair of places in a window (Swin Transformer V2, Liu et al., 2022, section 3.2, equation 2).

use super::short::{self, Given, Shape, takes_cosine};
use super::{Windows, joined, split};
use crate::bridge::{Forward, node};
use crate::fault::Result;
use crate::op::sizes;
use tch::{Kind, Tensor};

/// A query's or a key's length below this counts as this, so that a row of zeros has a direction to nowhere: none.
const SHORTEST: f64 = 1e-6;

/// qkv [B, S, 3·D] as [`super::windowed`] takes it; scale fp32 [H]; bias fp32 [H, T, T], from query to key, for windows of
/// T tokens → [B, S, D]: softmax(scale · cos(q, k) + bias) · v over the tokens of the query's window and region. (Swin's
/// codes lower the scores of other regions by 100 instead of striking them out, which fp32 cannot tell from it while the
/// scores of a window lie within 80 of each other.)
pub fn cosine(qkv: &Tensor, heads: i64, windows: &Windows, [scale, bias]: [&Tensor; 2]) -> Result<Tensor> {
    let [_, _, width] = sizes(qkv);
    if qkv.device().is_cuda() && takes_cosine(qkv.kind(), width / 3 / heads, windows.size()) {
        return kernel(qkv, heads, windows, [scale, bias]);
    }
    let [q, k, v] = split(&windows.gather(qkv), heads, 0); // [B · W, H, T, d]
    let q = unit(&q) * scale.view([heads, 1, 1]).to_kind(qkv.kind());
    let scores = q.matmul(&unit(&k).transpose(-2, -1));
    let tokens = windows.size();
    let by_window = [-1, windows.count(), heads, tokens, tokens];
    let bias = match windows.mask(1) {
        // [W, H, T, T]
        Some(mask) => bias.masked_fill(&mask.logical_not(), f64::NEG_INFINITY),
        None => bias.shallow_clone(),
    };
    let wide = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let weights = (scores.view(by_window) + bias).softmax(-1, wide).to_kind(qkv.kind());
    Ok(windows.scatter(&joined(&weights.view([-1, heads, tokens, tokens]).matmul(&v))))
}

/// x [.., d], its rows of length one.
fn unit(x: &Tensor) -> Tensor {
    let wide = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let length = x.norm_scalaropt_dim_dtype(2, [-1i64].as_slice(), true, wide);
    (x / length.clamp_min(SHORTEST)).to_kind(x.kind())
}

/// The reference: every query looks at every token, and what it may not see is struck out; softmax in fp32.
pub fn formula(qkv: &Tensor, heads: i64, windows: &Windows, [scale, bias]: [&Tensor; 2]) -> Tensor {
    let [q, k, v] = split(qkv, heads, 0); // [B, H, S, d]
    let wide = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let cosines = unit(&q).matmul(&unit(&k).transpose(-2, -1)).to_kind(wide);
    let place = windows.place();
    let bias = bias.index_select(1, &place).index_select(2, &place); // [H, S, S]
    let scores = cosines * scale.view([heads, 1, 1]) + bias;
    let scores = scores.masked_fill(&windows.sight().logical_not(), f64::NEG_INFINITY);
    joined(&scores.softmax(-1, wide).to_kind(qkv.kind()).matmul(&v))
}

/// The same by our kernels, for bf16 and f16, the head widths of [`super::takes`] and windows whose gradient of the bias
/// fits beside the rest; all are made contiguous. Gradients of scale and bias are summed over windows and samples in runs,
/// and the runs' sums in their order.
pub fn kernel(qkv: &Tensor, heads: i64, windows: &Windows, [scale, bias]: [&Tensor; 2]) -> Result<Tensor> {
    let [_, _, width] = sizes(qkv);
    let tokens = windows.size();
    let shape = Shape {
        heads,
        width: width / 3 / heads,
        windows: windows.count(),
        queries: tokens,
        from: 0,
        keys: tokens,
        causal: false,
    };
    let places = [windows.index.shallow_clone(), windows.region.shallow_clone()];
    let forward = |given: &[Tensor]| {
        let qkv = short::aligned(&given[0]);
        let terms = [&given[1], &given[2]].map(|term| term.to_kind(Kind::Float).contiguous());
        let places: Vec<Tensor> = places.into_iter().chain(terms).collect();
        let answer = short::forward(&Given { q: &qkv, kv: &qkv, places: &places }, &shape)?;
        let out = answer.out.shallow_clone();
        Ok(Forward { outputs: vec![out], saved: [qkv, answer.out, answer.lse].into_iter().chain(places).collect() })
    };
    let outputs = node(&[qkv, scale, bias], forward, move |saved, gradients, wanted| {
        let gqkv = Tensor::empty_like(&saved[0]);
        let given = Given { q: &saved[0], kv: &saved[0], places: &saved[3..] };
        let both = short::backward(&given, &shape, [&saved[1], &saved[2]], &gradients[0], [&gqkv, &gqkv])?;
        let both = both.expect("sums of bias and scale");
        let of_bias = both.narrow(0, 0, heads * tokens * tokens).view([heads, tokens, tokens]);
        let of_scale = both.narrow(0, heads * tokens * tokens, heads);
        Ok([gqkv, of_scale, of_bias].into_iter().zip(wanted).map(|(g, wanted)| wanted.then_some(g)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}
