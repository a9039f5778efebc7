//! How the class token looks at all others.

use super::{short, split};
use crate::fault::Result;
use crate::op::launch::{Launch, Source, blocks, by_type, type_name};
use crate::op::sizes;
use tch::{Kind, Tensor};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

pub const SOURCE: Source = Source {
    name: "attention_class_row",
    built_in: include_str!("../../../kernels/attention_class_row.cu"),
    variants: || by_type(&KINDS),
};

/// qkv [B, S, 3·D] as [`super::attention`] takes it → the probabilities of the first query, fp32 [B, H, S], which sum to
/// one over S. Nobody differentiates them: they choose what is hidden.
pub fn class_row(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    let [_, tokens, width] = sizes(qkv);
    if qkv.device().is_cuda() && takes(qkv.kind(), tokens, width / 3 / heads) {
        kernel(qkv, heads)
    } else {
        Ok(formula(qkv, heads))
    }
}

/// The reference.
pub fn formula(qkv: &Tensor, heads: i64) -> Tensor {
    let qkv = qkv.detach();
    let [q, k, _] = split(&qkv, heads, 0);
    let [batch, heads, tokens, each] = sizes(&k);
    let wide = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let [q, k] = [q.narrow(2, 0, 1), k].map(|x| x.to_kind(wide));
    let scores = q.matmul(&k.transpose(-2, -1)) * (each as f64).powf(-0.5);
    scores.softmax(-1, wide).view([batch, heads, tokens])
}

/// Whether our kernel takes these: rows of whole 16 bytes, and scores that fit into a block's shared memory as every card
/// gives it.
fn takes(kind: Kind, tokens: i64, width: i64) -> bool {
    KINDS.contains(&kind) && width * kind.elt_size_in_bytes() as i64 % 16 == 0 && bytes(tokens, width) <= 48 << 10
}

fn bytes(tokens: i64, width: i64) -> i64 {
    4 * (tokens + width + 4)
}

/// The same by our kernel; qkv is made contiguous.
pub fn kernel(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    let qkv = short::aligned(&qkv.detach());
    let [batch, tokens, width] = sizes(&qkv);
    let width = width / 3 / heads;
    let out = Tensor::empty([batch, heads, tokens], (Kind::Float, qkv.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(qkv.kind()).into())],
        entry: "attention_class_row",
        grid: [blocks(batch * heads, 1), 1, 1],
        threads: 128,
        shared: bytes(tokens, width) as usize,
    };
    let c = ((width as f64).powf(-0.5) * std::f64::consts::LOG2_E) as f32;
    let [heads, tokens, width] = [heads, tokens, width].map(|n| (n as i32).into());
    launch.run(&[(&qkv).into(), (&out).into(), heads, tokens, width, c.into()])?;
    Ok(out)
}
