//! Attention of one sequence's queries over another's keys and values.

use super::short::{self, Given, Shape};
use super::{joined, library, plain, takes};
use crate::bridge::{Forward, node};
use crate::fault::Result;
use crate::op::sizes;
use tch::Tensor;

/// q [B, Sq, D] and kv [B, Sk, 2·D], keys and then values, heads inside each → [B, Sq, D]. Scale is d^−½.
pub fn cross(q: &Tensor, kv: &Tensor, heads: i64) -> Result<Tensor> {
    let ([_, queries, width], [_, keys, _]) = (sizes(q), sizes(kv));
    if q.device().is_cuda() && takes(q.kind(), width / heads, queries, keys) {
        return kernel(q, kv, heads);
    }
    let [q, k, v] = split(q, kv, heads);
    Ok(joined(&library(&q, &k, &v, None, false)))
}

/// The reference; softmax in fp32.
pub fn formula(q: &Tensor, kv: &Tensor, heads: i64) -> Tensor {
    let [q, k, v] = split(q, kv, heads);
    plain(&q, &k, &v, None)
}

/// q [B, H, Sq, d], k and v [B, H, Sk, d], as views.
fn split(q: &Tensor, kv: &Tensor, heads: i64) -> [Tensor; 3] {
    let ([batch, queries, width], [_, keys, _]) = (sizes(q), sizes(kv));
    let packed = kv.view([batch, keys, 2, heads, width / heads]).permute([2, 0, 3, 1, 4]);
    let q = q.view([batch, queries, heads, width / heads]).transpose(1, 2);
    [q, packed.get(0), packed.get(1)]
}

/// The same by our kernels, for what [`takes`] says; q and kv are made contiguous.
pub fn kernel(q: &Tensor, kv: &Tensor, heads: i64) -> Result<Tensor> {
    let ([_, queries, width], [_, keys, _]) = (sizes(q), sizes(kv));
    let shape = Shape { heads, width: width / heads, windows: 1, queries, from: 0, keys, causal: false };
    let forward = |given: &[Tensor]| {
        let (q, kv) = (short::aligned(&given[0]), short::aligned(&given[1]));
        let answer = short::forward(&Given { q: &q, kv: &kv, places: &[] }, &shape)?;
        Ok(Forward { outputs: vec![answer.out.shallow_clone()], saved: vec![q, kv, answer.out, answer.lse] })
    };
    let outputs = node(&[q, kv], forward, move |saved, gradients, wanted| {
        let (gq, gkv) = (Tensor::empty_like(&saved[0]), Tensor::empty_like(&saved[1]));
        let given = Given { q: &saved[0], kv: &saved[1], places: &[] };
        short::backward(&given, &shape, [&saved[2], &saved[3]], &gradients[0], [&gq, &gkv])?;
        Ok([gq, gkv].into_iter().zip(wanted).map(|(gradient, wanted)| wanted.then_some(gradient)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}
