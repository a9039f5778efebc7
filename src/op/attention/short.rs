//! Attention kernels in which a block processes the whole sequence of a few heads: what they support, and their
//! launches.

use crate::error::Result;
use crate::op::launch::{Argument, KernelSource, Launch, Variant, block_count, type_name};
use crate::op::sizes;
use crate::op::sum_partials;
use tch::{Kind, Tensor};

const KINDS: [Kind; 2] = [Kind::BFloat16, Kind::Half];

/// Head widths: 64 of most encoders, 80 of ViT-H, 32 of MAE's decoder, 24 of narrower ones.
const HEAD_WIDTHS: [i64; 4] = [24, 32, 64, 80];

/// Maximum sequence length. Below about 366 tokens, attention on an H200 is bound by reading queries, keys and values
/// once, which the whole sequence in one block achieves; above, by matrix products, where the library is better. This
/// is arithmetic from the card's rates; the crossover has not been measured yet.
const MAX_TOKENS: i64 = 320;

/// Bytes of shared memory per block on Ampere, the smallest of our architectures. (Hopper and Blackwell have 227 KiB,
/// which would fit the backward pass of 320 tokens with heads of 80.)
const MAX_SHARED_BYTES: i64 = 163 << 10;

/// Target for the shared memory of a block in bytes, so that a multiprocessor holds three or more blocks and the loads
/// of one hide behind the products of another. Not measured yet.
const TARGET_SHARED_BYTES: i64 = 72 << 10;

/// Bytes of shared memory per multiprocessor on Hopper.
const HOPPER_SHARED_BYTES: i64 = 227 << 10;

/// The kind of scores, which selects the kernel variant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scores {
    /// Dot products over a whole sequence.
    Whole,
    /// Dot products within windows.
    Windowed,
    /// Cosines within windows, with scale and bias.
    Cosine,
}

/// Returns true if the kernels support these inputs: bf16 or f16, a compiled head width, and sequences (the longer of
/// queries and keys) of at most 320 tokens whose backward pass fits in shared memory: 320 tokens with heads of 24 and
/// 32, 272 with 64, 224 with 80. Everything else is left to the library.
pub fn is_supported(kind: Kind, head_width: i64, queries: i64, keys: i64) -> bool {
    fits(kind, head_width, queries, keys, Scores::Windowed)
}

/// The same for cosine attention within windows of `tokens` tokens, whose backward pass also holds the gradient of the
/// bias: at most 160 tokens with heads of 24 and 32, 128 with 64 and 80.
pub(super) fn is_cosine_supported(kind: Kind, head_width: i64, tokens: i64) -> bool {
    fits(kind, head_width, tokens, tokens, Scores::Cosine)
}

fn fits(kind: Kind, head_width: i64, queries: i64, keys: i64, scores: Scores) -> bool {
    KINDS.contains(&kind)
        && HEAD_WIDTHS.contains(&head_width)
        && queries.max(keys) <= MAX_TOKENS
        && Pass::Backward.shared_bytes(head_width, queries, keys, 1, scores) <= MAX_SHARED_BYTES
}

/// Kernel source of the forward pass.
pub const FORWARD: KernelSource =
    KernelSource { name: "attention", embedded: include_str!("../../../kernels/attention.cu"), variants };

/// Kernel source of the backward pass.
pub const BACKWARD: KernelSource = KernelSource {
    name: "attention_backward",
    embedded: include_str!("../../../kernels/attention_backward.cu"),
    variants,
};

fn variants() -> Vec<Variant> {
    let all = [Scores::Whole, Scores::Windowed, Scores::Cosine];
    let by_kind = |kind: &Kind| HEAD_WIDTHS.map(|head_width| all.map(|scores| variant(*kind, head_width, scores)));
    KINDS.iter().flat_map(by_kind).flatten().collect()
}

fn variant(kind: Kind, head_width: i64, scores: Scores) -> Variant {
    let flag = |value: bool| i32::from(value).to_string();
    vec![
        ("ELEMENT", type_name(kind).into()),
        ("HEAD", head_width.to_string()),
        ("WINDOWED", flag(scores != Scores::Whole)),
        ("COSINE", flag(scores == Scores::Cosine)),
    ]
}

/// The sizes of one attention.
#[derive(Clone, Copy)]
pub(super) struct AttentionShape {
    pub heads: i64,
    pub head_width: i64,
    /// Sequences per sample: the number of windows, or 1.
    pub windows: i64,
    /// Queries per sequence.
    pub queries: i64,
    /// Tokens of the tensor of queries before the first query.
    pub first_query: i64,
    /// Keys per sequence.
    pub keys: i64,
    pub causal: bool,
}

/// The inputs of attention: queries in the first columns of q, keys and values in the last 2·D columns of kv, which may
/// be the same tensor. `extras` is empty for whole sequences; for windows it has index and regions; for cosine
/// attention also the scales fp32 `[H]` and the bias fp32 [H, T, T].
pub(super) struct AttentionInputs<'a> {
    pub q: &'a Tensor,
    pub kv: &'a Tensor,
    pub extras: &'a [Tensor],
}

impl<'a> AttentionInputs<'a> {
    fn scores(&self) -> Scores {
        match self.extras.len() {
            0 => Scores::Whole,
            2 => Scores::Windowed,
            _ => Scores::Cosine,
        }
    }

    /// The first arguments of both kernels.
    fn arguments(&self) -> [Argument<'a>; 6] {
        let extra = |i: usize| self.extras.get(i).into();
        [self.q.into(), self.kv.into(), extra(0), extra(1), extra(2), extra(3)]
    }
}

/// The outputs of the forward pass.
pub(super) struct AttentionOutput {
    /// [B, windows · queries, D].
    pub out: Tensor,
    /// Base-2 logarithm of each query's sum of exponentials, fp32 [B, H, windows · queries].
    pub lse: Tensor,
}

/// The tensors of the backward pass besides the inputs.
pub(super) struct BackwardTensors<'a> {
    /// [`AttentionOutput::out`].
    pub out: &'a Tensor,
    /// [`AttentionOutput::lse`].
    pub lse: &'a Tensor,
    /// Gradient of `out`.
    pub g_out: &'a Tensor,
    /// Receives the gradient of q.
    pub g_q: &'a Tensor,
    /// Receives the gradient of kv; the same tensor as `g_q` if q and kv are the same.
    pub g_kv: &'a Tensor,
}

/// Returns x contiguous and 16-byte aligned, as asynchronous copies require.
pub(super) fn to_aligned(x: &Tensor) -> Tensor {
    let x = x.contiguous();
    if (x.data_ptr() as usize).is_multiple_of(16) { x } else { x.copy() }
}

/// Launches the forward kernel.
pub(super) fn forward(inputs: &AttentionInputs, shape: &AttentionShape) -> Result<AttentionOutput> {
    let batch = inputs.q.size()[0];
    let tokens = shape.windows * shape.queries;
    let width = shape.heads * shape.head_width;
    let out = inputs.q.new_empty([batch, tokens, width], (inputs.q.kind(), inputs.q.device()));
    let lse = Tensor::empty([batch, shape.heads, tokens], (Kind::Float, inputs.q.device()));
    let outputs = [(&out).into(), (&lse).into()];
    launch(Pass::Forward, shape, inputs, &[&inputs.arguments()[..], &outputs].concat(), None)?;
    Ok(AttentionOutput { out, lse })
}

/// Launches the backward kernel, which writes the gradients of q and kv. Returns, for cosine attention, the gradients
/// of bias and scales in one tensor [H · T · T + H].
pub(super) fn backward(
    inputs: &AttentionInputs,
    shape: &AttentionShape,
    tensors: &BackwardTensors,
) -> Result<Option<Tensor>> {
    let g_out = to_aligned(tensors.g_out);
    let sequences = inputs.q.size()[0] * shape.windows;
    let is_cosine = inputs.scores() == Scores::Cosine;
    let sequences_per_block = if is_cosine { (sequences + MAX_RUNS - 1) / MAX_RUNS } else { 1 };
    let runs = (sequences + sequences_per_block - 1) / sequences_per_block;
    let row = shape.heads * (shape.keys * shape.keys + 1);
    let parts = is_cosine.then(|| Tensor::empty([runs, row], (Kind::Float, inputs.q.device())));
    let gradients = [
        tensors.out.into(),
        (&g_out).into(),
        tensors.lse.into(),
        tensors.g_q.into(),
        tensors.g_kv.into(),
        parts.as_ref().into(),
    ];
    let arguments = [&inputs.arguments()[..], &gradients].concat();
    launch(Pass::Backward, shape, inputs, &arguments, Some(SequenceRuns { sequences, sequences_per_block }))?;
    parts.map(|parts| sum_partials::kernel(&parts, Kind::Float)).transpose()
}

/// Maximum number of runs of sequences in the backward pass of cosine attention; each run is the work of one block per
/// group of heads. With 16 heads of 32, which make eight groups, these are five waves of the three blocks that each
/// multiprocessor of a Hopper holds.
const MAX_RUNS: i64 = 264;

/// How the backward pass divides sequences among blocks.
#[derive(Clone, Copy)]
struct SequenceRuns {
    sequences: i64,
    sequences_per_block: i64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

impl Pass {
    /// Bytes of shared memory of a block of `heads` heads, as the kernels assign it.
    fn shared_bytes(self, head_width: i64, queries: i64, keys: i64, heads: i64, scores: Scores) -> i64 {
        let row = (round_up(head_width, 16) + 8) * 2;
        let queries = round_up(queries, 16);
        let keys = round_up(keys, 16);
        let per_head = match self {
            Pass::Forward => 2 * keys * row,
            Pass::Backward => 2 * (queries + keys) * row + 8 * queries,
        };
        let gradient_sums = match (self, scores) {
            (Pass::Backward, Scores::Cosine) => 4 * (queries + keys + queries * (keys + 8) + queries / 16),
            _ => 0,
        };
        heads * (per_head + gradient_sums) + 4 * keys
    }

    /// Number of jobs per head, which the warps of a block share.
    fn jobs(self, shape: &AttentionShape, is_windowed: bool) -> i64 {
        let is_narrow = shape.head_width <= 32;
        match self {
            Pass::Forward => {
                let rows = if is_narrow && !is_windowed { 32 } else { 16 };
                (shape.queries + rows - 1) / rows
            }
            Pass::Backward => {
                let jobs_per_key_tile = if is_narrow { 1 } else { 2 };
                (shape.queries + 15) / 16 + (shape.keys + 15) / 16 * jobs_per_key_tile
            }
        }
    }
}

fn round_up(n: i64, multiple: i64) -> i64 {
    (n + multiple - 1) / multiple * multiple
}

/// Returns the heads per block: enough that four warps have work and that a row's bytes fill lines of 128 bytes, as
/// long as the block stays below [`TARGET_SHARED_BYTES`].
fn heads_per_block(shape: &AttentionShape, jobs: i64, shared_bytes: impl Fn(i64) -> i64) -> i64 {
    let target = (4 / jobs).max((64 + shape.head_width - 1) / shape.head_width).min(shape.heads);
    (1..=target).rev().find(|heads| shared_bytes(*heads) <= TARGET_SHARED_BYTES).unwrap_or(1)
}

/// Returns the warps of a block, from four to `max_warps`, that keep most of a multiprocessor's warps busy. The
/// registers of a multiprocessor hold 16 warps.
fn warps_per_block(jobs: i64, shared_bytes: i64, max_warps: i64) -> i64 {
    let utilization = |warps: i64| {
        let blocks = (16 / warps).min(HOPPER_SHARED_BYTES / (shared_bytes + (1 << 10))).max(1);
        1000 * blocks * jobs / ((jobs + warps - 1) / warps)
    };
    (jobs.min(4)..=jobs.min(max_warps)).rev().max_by_key(|warps| utilization(*warps)).expect("at least one job")
}

fn launch(
    pass: Pass,
    shape: &AttentionShape,
    inputs: &AttentionInputs,
    tensors: &[Argument],
    runs: Option<SequenceRuns>,
) -> Result<()> {
    let [batch, _, q_stride] = sizes(inputs.q);
    let [_, _, kv_stride] = sizes(inputs.kv);
    let source = if pass == Pass::Forward { &FORWARD } else { &BACKWARD };
    let scores = inputs.scores();
    let jobs = pass.jobs(shape, scores != Scores::Whole);
    let shared_bytes = |heads| pass.shared_bytes(shape.head_width, shape.queries, shape.keys, heads, scores);
    let group_size = heads_per_block(shape, jobs, shared_bytes);
    let sequences_per_block = runs.map_or(1, |runs| runs.sequences_per_block);
    let max_warps = if (pass, scores) == (Pass::Backward, Scores::Cosine) { 4 } else { 8 };
    let groups = block_count(shape.heads, group_size);
    let launch = Launch {
        source,
        variant: variant(inputs.q.kind(), shape.head_width, scores),
        entry: source.name,
        grid: [groups * block_count(batch * shape.windows, sequences_per_block), 1, 1],
        threads: 32 * warps_per_block(group_size * jobs, shared_bytes(group_size), max_warps) as u32,
        shared_bytes: shared_bytes(group_size) as usize,
    };
    let &AttentionShape { heads, windows, queries, first_query, keys, causal, .. } = shape;
    let integers = [heads, group_size, windows, queries, first_query, keys, q_stride, kv_stride, i64::from(causal)];
    let mut arguments = tensors.to_vec();
    arguments.extend(integers.map(|n| Argument::I32(n as i32)));
    arguments.push((shape.head_width as f32).powf(-0.5).into());
    if let Some(SequenceRuns { sequences, sequences_per_block }) = runs {
        arguments.extend([sequences, sequences_per_block].map(|n| Argument::I32(n as i32)));
    }
    launch.run(&arguments)
}
