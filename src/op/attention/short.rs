//! Our kernels of attention, where a block holds the whole sequence of a few heads: which sequences they take, and their
//! launches.

use crate::fault::Result;
use crate::op::fold;
use crate::op::launch::{Argument, Launch, Source, Variant, blocks, type_name};
use crate::op::sizes;
use tch::{Kind, Tensor};

const KINDS: [Kind; 2] = [Kind::BFloat16, Kind::Half];

/// Head widths: 64 of most encoders, 80 of ViT-H, 32 of MAE's decoder, 24 of narrower ones.
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

/// How scores are made, and of whom.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scores {
    /// Of a whole sequence.
    Whole,
    /// Of windows.
    Windowed,
    /// Of windows, by the cosine, with a scale and a bias.
    Cosine,
}

/// Whether our kernels take these: bf16 or f16, a head width that they are compiled for, and sequences (the larger of
/// queries and keys) of at most 320 tokens, as far as backward's four matrices fit into shared memory: 320 tokens of
/// heads of 24 and 32, 272 of 64, 224 of 80. All others are the library's.
pub fn takes(kind: Kind, width: i64, queries: i64, keys: i64) -> bool {
    fit(kind, width, queries, keys, Scores::Windowed)
}

/// The same of windows of so many tokens by the cosine, whose backward also holds the gradient of the bias: 160 tokens of
/// heads of 24 and 32, 128 of 64 and 80.
pub(super) fn takes_cosine(kind: Kind, width: i64, tokens: i64) -> bool {
    fit(kind, width, tokens, tokens, Scores::Cosine)
}

fn fit(kind: Kind, width: i64, queries: i64, keys: i64, scores: Scores) -> bool {
    KINDS.contains(&kind)
        && WIDTHS.contains(&width)
        && queries.max(keys) <= LONGEST
        && Pass::Backward.bytes(width, queries, keys, 1, scores) <= SHARED
}

pub const FORWARD: Source =
    Source { name: "attention", built_in: include_str!("../../../kernels/attention.cu"), variants };

pub const BACKWARD: Source =
    Source { name: "attention_backward", built_in: include_str!("../../../kernels/attention_backward.cu"), variants };

fn variants() -> Vec<Variant> {
    let all = [Scores::Whole, Scores::Windowed, Scores::Cosine];
    let of_kind = |kind: &Kind| WIDTHS.map(|width| all.map(|scores| variant(*kind, width, scores)));
    KINDS.iter().flat_map(of_kind).flatten().collect()
}

fn variant(kind: Kind, width: i64, scores: Scores) -> Variant {
    let [windowed, cosine] = [scores != Scores::Whole, scores == Scores::Cosine].map(|is| i32::from(is).to_string());
    vec![("ELEMENT", type_name(kind).into()), ("HEAD", width.to_string()), ("WINDOWED", windowed), ("COSINE", cosine)]
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
/// windows the index and the regions; of cosines behind those the scales fp32 [H] and the bias fp32 [H, T, T]. q and kv
/// may be one tensor.
pub(super) struct Given<'a> {
    pub q: &'a Tensor,
    pub kv: &'a Tensor,
    pub places: &'a [Tensor],
}

impl<'a> Given<'a> {
    fn scores(&self) -> Scores {
        match self.places.len() {
            0 => Scores::Whole,
            2 => Scores::Windowed,
            _ => Scores::Cosine,
        }
    }

    /// What both passes take first.
    fn arguments(&self) -> [Argument<'a>; 6] {
        let place = |i: usize| self.places.get(i).into();
        [self.q.into(), self.kv.into(), place(0), place(1), place(2), place(3)]
    }
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
    if (x.data_ptr() as usize).is_multiple_of(16) { x } else { x.copy() }
}

pub(super) fn forward(given: &Given, shape: &Shape) -> Result<Answer> {
    let (batch, tokens) = (given.q.size()[0], shape.windows * shape.queries);
    let out = given.q.new_empty([batch, tokens, shape.heads * shape.width], (given.q.kind(), given.q.device()));
    let lse = Tensor::empty([batch, shape.heads, tokens], (Kind::Float, given.q.device()));
    let last = [(&out).into(), (&lse).into()];
    launch(Pass::Forward, shape, given, &[&given.arguments()[..], &last].concat(), &[])?;
    Ok(Answer { out, lse })
}

/// Writes the gradients of q and kv, which may be one tensor as q and kv may, from `answer` (out and lse) and the
/// gradient of out. Returns, of cosines, the gradients of bias and scales in one [H · T · T + H].
pub(super) fn backward(
    given: &Given,
    shape: &Shape,
    answer: [&Tensor; 2],
    gradient: &Tensor,
    into: [&Tensor; 2],
) -> Result<Option<Tensor>> {
    let gradient = aligned(gradient);
    let sequences = given.q.size()[0] * shape.windows;
    let cosine = given.scores() == Scores::Cosine;
    let each = if cosine { (sequences + RUNS - 1) / RUNS } else { 1 };
    let row = shape.heads * (shape.keys * shape.keys + 1);
    let parts = cosine.then(|| Tensor::empty([(sequences + each - 1) / each, row], (Kind::Float, given.q.device())));
    let last = [answer[0].into(), (&gradient).into(), answer[1].into(), into[0].into(), into[1].into()];
    let tensors = [&given.arguments()[..], &last, &[parts.as_ref().into()]].concat();
    launch(Pass::Backward, shape, given, &tensors, &[sequences, each])?;
    parts.map(|parts| fold::kernel(&parts, Kind::Float)).transpose()
}

/// Runs of sequences, each the work of one block for each group of heads, into which cosines' backward is cut: with 16 heads
/// of 32, which make eight groups, five turns of the three blocks that each multiprocessor of a Hopper holds.
const RUNS: i64 = 264;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

impl Pass {
    /// Bytes of shared memory that a block of so many heads takes, as the kernels lay it out.
    fn bytes(self, width: i64, queries: i64, keys: i64, heads: i64, scores: Scores) -> i64 {
        let row = (up(width, 16) + 8) * 2;
        let (queries, keys) = (up(queries, 16), up(keys, 16));
        let of_head = match self {
            Pass::Forward => 2 * keys * row,
            Pass::Backward => 2 * (queries + keys) * row + 8 * queries,
        };
        let of_sums = match (self, scores) {
            (Pass::Backward, Scores::Cosine) => 4 * (queries + keys + queries * (keys + 8) + queries / 16),
            _ => 0,
        };
        heads * (of_head + of_sums) + 4 * keys
    }

    /// What the warps of a block share out among them, for one head.
    fn jobs(self, shape: &Shape, windowed: bool) -> i64 {
        let (narrow, of) = (shape.width <= 32, |n: i64, each: i64| (n + each - 1) / each);
        match self {
            Pass::Forward => of(shape.queries, if narrow && !windowed { 32 } else { 16 }),
            Pass::Backward => of(shape.queries, 16) + of(shape.keys, 16) * if narrow { 1 } else { 2 },
        }
    }
}

fn up(n: i64, to: i64) -> i64 {
    (n + to - 1) / to * to
}

/// Heads of one block: enough that four warps have work and that a row's bytes fill lines of 128, as far as a block stays
/// small.
fn group(shape: &Shape, jobs: i64, bytes: impl Fn(i64) -> i64) -> i64 {
    let wanted = (4 / jobs).max((64 + shape.width - 1) / shape.width).min(shape.heads);
    (1..=wanted).rev().find(|heads| bytes(*heads) <= FEW).unwrap_or(1)
}

/// Warps of a block with so many jobs and bytes: of four to the most that the kernel is compiled for, as many as keep
/// most of a multiprocessor's warps busy, whose registers hold 16 and whose shared memory is 227 KiB on Hopper.
fn warps(jobs: i64, bytes: i64, most: i64) -> i64 {
    let busy = |warps: i64| {
        let blocks = (16 / warps).min((227 << 10) / (bytes + (1 << 10))).max(1);
        1000 * blocks * jobs / ((jobs + warps - 1) / warps)
    };
    (jobs.min(4)..=jobs.min(most)).rev().max_by_key(|warps| busy(*warps)).expect("a job")
}

fn launch(pass: Pass, shape: &Shape, given: &Given, tensors: &[Argument], more: &[i64]) -> Result<()> {
    let ([batch, _, q_stride], [_, _, kv_stride]) = (sizes(given.q), sizes(given.kv));
    let source = if pass == Pass::Forward { &FORWARD } else { &BACKWARD };
    let scores = given.scores();
    let jobs = pass.jobs(shape, scores != Scores::Whole);
    let bytes = |heads| pass.bytes(shape.width, shape.queries, shape.keys, heads, scores);
    let group = group(shape, jobs, bytes);
    let each = more.get(1).copied().unwrap_or(1);
    let most = if (pass, scores) == (Pass::Backward, Scores::Cosine) { 4 } else { 8 };
    let launch = Launch {
        source,
        variant: variant(given.q.kind(), shape.width, scores),
        entry: source.name,
        grid: [blocks(shape.heads, group) * blocks(batch * shape.windows, each), 1, 1],
        threads: 32 * warps(group * jobs, bytes(group), most) as u32,
        shared: bytes(group) as usize,
    };
    let &Shape { heads, windows, queries, from, keys, .. } = shape;
    let numbers = [heads, group, windows, queries, from, keys, q_stride, kv_stride, i64::from(shape.causal)];
    let integers = |numbers: &[i64]| numbers.iter().map(|&n| Argument::I32(n as i32)).collect::<Vec<_>>();
    let scale = (shape.width as f32).powf(-0.5).into();
    launch.run(&[tensors, &integers(&numbers), &[scale], &integers(more)].concat())
}
