//! Our kernels of attention, where a block holds the whole sequence of a few heads: which sequences they take, and their
//! launches.

use crate::fault::Result;
use crate::op::launch::{Argument, Launch, Source, Variant, type_name};
use crate::op::sizes;
use tch::{Kind, Tensor};

const KINDS: [Kind; 2] = [Kind::BFloat16, Kind::Half];

/// Head widths: of MAE's small decoders, its decoders, its encoders, and those of ViT-H.
const WIDTHS: [i64; 4] = [24, 32, 64, 80];

/// The longest sequence. Below about 366 tokens attention on an H200 is bounded by reading queries, keys and values
/// once, which the whole sequence in one block does; above, by matrix products, in which the library is better. That is
/// arithmetic from the card's rates: where the two cross has not been measured yet.
const LONGEST: i64 = 320;

/// Bytes of shared memory that the least of our architectures, Ampere, gives a block. (Hopper and Blackwell give 227 KiB:
/// with those, backward would hold 320 tokens of heads of 80.)
const SHARED: i64 = 163 << 10;

/// Bytes of shared memory that a block is meant to stay below, so that a multiprocessor holds three or more, and one's
/// loads hide behind another's products. Not measured yet.
const FEW: i64 = 72 << 10;

/// Whether our kernels take these: bf16 or f16, a head width that they are compiled for, and sequences (the larger of
/// queries and keys) of at most 320 tokens, as far as backward's four matrices fit into shared memory: 320 tokens of
/// heads of 24 and 32, 272 of 64, 224 of 80. All others are the library's.
pub fn takes(kind: Kind, width: i64, queries: i64, keys: i64) -> bool {
    KINDS.contains(&kind)
        && WIDTHS.contains(&width)
        && queries.max(keys) <= LONGEST
        && Pass::Backward.bytes(width, queries, keys, 1) <= SHARED
}

pub const SOURCE: Source = Source {
    name: "attention",
    built_in: include_str!("../../../kernels/attention.cu"),
    variants: || KINDS.iter().flat_map(|kind| WIDTHS.map(|width| variant(*kind, width))).collect(),
};

fn variant(kind: Kind, width: i64) -> Variant {
    vec![("ELEMENT", type_name(kind).into()), ("HEAD", width.to_string())]
}

/// The sizes of one attention.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub heads: i64,
    /// Of a head.
    pub width: i64,
    /// Sequences of a sample: 1, or as many as there are windows.
    pub windows: i64,
    /// Of a window.
    pub queries: i64,
    /// Tokens of the queries' tensor before the first query.
    pub from: i64,
    /// Of a window.
    pub keys: i64,
    pub causal: bool,
}

/// What attention is computed from: queries in the first columns of q, keys and values in the last 2·D of kv, and of
/// windows the index and the regions. q and kv may be one tensor.
pub(super) struct Given<'a> {
    pub q: &'a Tensor,
    pub kv: &'a Tensor,
    pub places: &'a [Tensor],
}

pub(super) struct Answer {
    /// [B, windows · queries, D].
    pub out: Tensor,
    /// fp32 [B, H, windows · queries]: the base-2 logarithm of each query's sum of exponentials.
    pub lse: Tensor,
}

/// Contiguous, and on a boundary of 16 bytes as asynchronous copies want it.
pub(super) fn aligned(x: &Tensor) -> Tensor {
    let x = x.contiguous();
    if x.data_ptr() as usize % 16 == 0 { x } else { x.copy() }
}

pub(super) fn forward(given: &Given, shape: &Shape) -> Result<Answer> {
    let (batch, tokens) = (given.q.size()[0], shape.windows * shape.queries);
    let out = given.q.new_empty([batch, tokens, shape.heads * shape.width], (given.q.kind(), given.q.device()));
    let lse = Tensor::empty([batch, shape.heads, tokens], (Kind::Float, given.q.device()));
    let tensors: [Argument; 4] =
        [given.q.into(), given.kv.into(), given.places.first().into(), given.places.get(1).into()];
    let last = [(&out).into(), (&lse).into()];
    launch(Pass::Forward, shape, given, &[&tensors[..], &last].concat())?;
    Ok(Answer { out, lse })
}

/// Writes the gradients of q and kv, which may be one tensor as q and kv may, from `answer` (out and lse) and the
/// gradient of out.
pub(super) fn backward(
    given: &Given,
    shape: &Shape,
    answer: [&Tensor; 2],
    gradient: &Tensor,
    into: [&Tensor; 2],
) -> Result<()> {
    let gradient = aligned(gradient);
    let tensors: [Argument; 4] =
        [given.q.into(), given.kv.into(), given.places.first().into(), given.places.get(1).into()];
    let last = [answer[0].into(), (&gradient).into(), answer[1].into(), into[0].into(), into[1].into()];
    launch(Pass::Backward, shape, given, &[&tensors[..], &last].concat())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

impl Pass {
    /// Bytes of shared memory that a block of so many heads takes, as `kernels/attention.cu` lays it out.
    fn bytes(self, width: i64, queries: i64, keys: i64, heads: i64) -> i64 {
        let (row, whole) = ((up(width, 16) + 8) * 2, 16 * rows_at_once(width));
        let regions = up(keys, whole) * 4;
        regions
            + heads
                * match self {
                    Pass::Forward => 2 * up(keys, 16) * row,
                    Pass::Backward => 2 * (up(queries, whole) + up(keys, whole)) * row + 8 * up(queries, whole),
                }
    }

    /// What the warps of a block share out among them, for one head.
    fn jobs(self, shape: &Shape) -> i64 {
        let each = 16 * rows_at_once(shape.width);
        let of = |n: i64| up(n, each) / each;
        of(shape.queries) + if self == Pass::Backward { of(shape.keys) } else { 0 }
    }
}

fn up(n: i64, to: i64) -> i64 {
    (n + to - 1) / to * to
}

/// Tiles of 16 rows that a warp computes at once, as `kernels/attention.cu` has it.
fn rows_at_once(width: i64) -> i64 {
    if width <= 32 { 2 } else { 1 }
}

/// The most warps of a block, as the kernels are compiled for.
const WARPS: i64 = 8;

/// Heads of one block: enough that four warps have work and that a row's bytes fill lines of 128, as far as a block stays
/// small.
fn group(pass: Pass, shape: &Shape) -> i64 {
    let bytes = |heads| pass.bytes(shape.width, shape.queries, shape.keys, heads);
    let wanted = (4 / pass.jobs(shape)).max((64 + shape.width - 1) / shape.width).min(shape.heads);
    (1..=wanted).rev().find(|heads| bytes(*heads) <= FEW).unwrap_or(1)
}

fn launch(pass: Pass, shape: &Shape, given: &Given, tensors: &[Argument]) -> Result<()> {
    let ([batch, _, q_stride], [_, _, kv_stride]) = (sizes(given.q), sizes(given.kv));
    let group = group(pass, shape);
    let jobs = group * pass.jobs(shape);
    // As many warps as share out the jobs evenly.
    let warps = (jobs + up(jobs, WARPS) / WARPS - 1) / (up(jobs, WARPS) / WARPS);
    let launch = Launch {
        source: &SOURCE,
        variant: variant(given.q.kind(), shape.width),
        entry: if pass == Pass::Forward { "attention" } else { "attention_backward" },
        grid: [
            u32::try_from(batch * shape.windows * (up(shape.heads, group) / group)).expect("less than 2³² blocks"),
            1,
            1,
        ],
        threads: 32 * warps as u32,
        shared: pass.bytes(shape.width, shape.queries, shape.keys, group) as usize,
    };
    let &Shape { heads, windows, queries, from, keys, .. } = shape;
    let numbers = [heads, group, windows, queries, from, keys, q_stride, kv_stride, i64::from(shape.causal)];
    let numbers = numbers.map(|number| Argument::I32(number as i32));
    let scale = (shape.width as f32).powf(-0.5).into();
    launch.run(&[tensors, &numbers, &[scale]].concat())
}
