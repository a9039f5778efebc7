//! The contrastive loss on a CPU where the matrix of logits would be large: a strip of queries at a time, worked out
//! once more on the way back instead of kept.

use super::{formula, strips};
use crate::bridge::{Forward, node};
use crate::fault::Result;
use tch::{Kind, Tensor};

/// As [`formula`], never with more than `strip` queries' logits in memory.
pub fn by_strips(queries: &Tensor, keys: &Tensor, scale: &Tensor, offset: i64, strip: i64) -> Result<Tensor> {
    let shape = scale.size();
    let forward = |given: &[Tensor]| {
        let [queries, keys, scale] = given else { unreachable!("three were given") };
        let loss = |(begin, rows)| formula(&queries.narrow(0, begin, rows), keys, scale, offset + begin);
        let sum = strips(queries.size()[0], strip).map(loss).reduce(|a, b| a + b);
        let sum = sum.unwrap_or_else(|| Tensor::zeros([], (Kind::Float, queries.device())));
        Ok(Forward { outputs: vec![sum], saved: given.iter().map(Tensor::shallow_clone).collect() })
    };
    let outputs = node(&[queries, keys, scale], forward, move |saved, gradients, wanted| {
        let [queries, keys, scale] = saved else { unreachable!("three were saved") };
        let kind = if queries.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let (keys, factor) = (keys.to_kind(kind), scale.to_kind(kind).view([]));
        let (mut by_query, mut by_key) = (Vec::new(), keys.zeros_like());
        let mut by_scale = Tensor::zeros([], (kind, keys.device()));
        for (begin, rows) in strips(queries.size()[0], strip) {
            let part = queries.narrow(0, begin, rows).to_kind(kind);
            let dots = part.mm(&keys.transpose(0, 1));
            let own = Tensor::arange_start(offset + begin, offset + begin + rows, (Kind::Int64, keys.device()));
            let once = Tensor::full([rows, 1], -1.0, (kind, keys.device()));
            let slopes = (&dots * &factor).softmax(1, kind).scatter_add(1, &own.unsqueeze(1), &once) * &gradients[0];
            by_scale += (&slopes * &dots).sum(kind);
            let slopes = slopes * &factor;
            by_query.push(slopes.mm(&keys));
            by_key += slopes.transpose(0, 1).mm(&part);
        }
        let all = [Tensor::cat(&by_query, 0), by_key, by_scale.view(shape.as_slice())];
        Ok(all.into_iter().zip(wanted).map(|(gradient, wanted)| wanted.then_some(gradient)).collect())
    })?;
    Ok(outputs.into_iter().next().expect("one output"))
}
