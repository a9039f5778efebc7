//! Gathers patches from pixels and normalizes only the patches that are needed.

use super::launch::{Argument, KernelSource, Launch, Variant, block_count, type_name};
use super::sizes;
use crate::error::Result;
use crate::grid::Grid;
use tch::{Device, Kind, Tensor};

/// Mean and standard deviation of each channel of a data set, for pixels in 0..1.
#[derive(Clone, Debug)]
pub struct ChannelStats {
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
}

impl ChannelStats {
    /// Converts normalized pixels [B, C, T, Y, X] to 0..1, clamped.
    pub fn denormalize(&self, x: &Tensor) -> Tensor {
        let broadcast = |values: &[f64]| channel_tensor(values, x.device()).view([1, -1, 1, 1, 1]);
        (x * broadcast(&self.std) + broadcast(&self.mean)).clamp(0.0, 1.0)
    }
}

/// Returns fp32 `[C]`. Fills the tensor on the device value by value, because a captured step copies nothing from the
/// host.
pub fn channel_tensor(values: &[f64], device: Device) -> Tensor {
    let fill = |value: &f64| Tensor::full([1], *value, (Kind::Float, device));
    Tensor::cat(&values.iter().map(fill).collect::<Vec<_>>(), 0)
}

/// x uint8 or fp32 [B, C, T, Y, X] → [B, N, P] of the same dtype. The values of a patch are ordered by frame, row,
/// column and channel (channel last, as in the official code).
pub fn patchify(x: &Tensor, grid: &Grid) -> Tensor {
    let [batch, channels, ..] = sizes::<5>(x);
    let Grid { frames, rows, cols, patch_frames: f, patch: p, .. } = *grid;
    x.view([batch, channels, frames, f, rows, p, cols, p].as_slice())
        .permute([0, 2, 4, 6, 3, 5, 7, 1]) // [B, frames, rows, cols, f, p, p, C]
        .reshape([batch, grid.tokens(), grid.patch_values()])
}

/// The inverse of [`patchify`]: [B, N, P] → [B, C, T, Y, X].
pub fn unpatchify(patches: &Tensor, grid: &Grid) -> Tensor {
    let [batch, ..] = sizes::<3>(patches);
    let Grid { frames, rows, cols, channels, patch_frames: f, patch: p } = *grid;
    let [c, t, y, x] = grid.pixel_shape();
    patches
        .view([batch, frames, rows, cols, f, p, p, channels].as_slice())
        .permute([0, 7, 1, 4, 2, 5, 3, 6])
        .reshape([batch, c, t, y, x])
}

/// Gathers the rows of x [B, N, P] at `index` int64 [B, K] → [B, K, P].
pub fn gather(x: &Tensor, index: &Tensor) -> Tensor {
    let [_, _, width] = sizes(x);
    let [batch, count] = sizes(index);
    x.gather(1, &index.unsqueeze(-1).expand([batch, count, width], false), false)
}

/// How the patches of a target are normalized. The kernel uses the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchNorm {
    /// Not at all.
    Raw,
    /// Each patch minus its mean, over √(variance + 1e-6), over all its values (MAE's `norm_pix_loss`).
    PerPatch,
    /// Each channel of a patch minus its mean, over √variance + 1e-6 (VideoMAE). The variance is that of the pixels as
    /// `ChannelStats` normalizes them; VideoMAE takes pixels in 0..1.
    PerChannel,
    /// The same over √(variance + 1e-6) (OmniMAE), which distinguishes flat patches from noise.
    PerChannelEpsInside,
}

/// Gathers the patches of x uint8 or fp32 [B, C, T, Y, X] at `index` int64 [B, K] and normalizes them by the data set's
/// mean and standard deviation → [B, K, P] of the given dtype. fp32 pixels are assumed to be normalized already. uint8
/// is gathered before it is converted, so that a full float image never exists; on a GPU all is done in one pass.
pub fn gather_patches(x: &Tensor, grid: &Grid, stats: &ChannelStats, index: &Tensor, kind: Kind) -> Result<Tensor> {
    gather_normalized(x, grid, stats, index, PatchNorm::Raw, kind)
}

/// The same as [`gather_patches`], with each patch normalized → fp32 [B, M, P].
pub fn gather_target(x: &Tensor, grid: &Grid, stats: &ChannelStats, index: &Tensor, norm: PatchNorm) -> Result<Tensor> {
    gather_normalized(x, grid, stats, index, norm, Kind::Float)
}

fn gather_normalized(
    x: &Tensor,
    grid: &Grid,
    stats: &ChannelStats,
    index: &Tensor,
    norm: PatchNorm,
    kind: Kind,
) -> Result<Tensor> {
    let is_supported = INPUT_KINDS.contains(&x.kind())
        && OUTPUT_KINDS.contains(&kind)
        && grid.channels <= MAX_CHANNELS
        && grid.patch_values() <= MAX_PATCH_VALUES;
    if x.device().is_cuda() && is_supported {
        return kernel(x, grid, stats, index, norm, kind);
    }
    Ok(formula(x, grid, stats, index, norm, kind))
}

/// The reference of [`gather_patches`] and [`gather_target`].
pub fn formula(x: &Tensor, grid: &Grid, stats: &ChannelStats, index: &Tensor, norm: PatchNorm, kind: Kind) -> Tensor {
    let rows = normalize_rows(&gather(&patchify(x, grid), index), stats);
    let rows = match norm {
        PatchNorm::Raw => rows,
        PatchNorm::PerPatch => {
            let variance = rows.var_dim(-1, true, true);
            (&rows - rows.mean_dim(-1, true, rows.kind())) / (variance + 1e-6).sqrt()
        }
        PatchNorm::PerChannel | PatchNorm::PerChannelEpsInside => {
            let [batch, count, values] = sizes(&rows);
            let by_pixel = rows.view([batch, count, values / grid.channels, grid.channels]);
            let variance = by_pixel.var_dim(2, true, true);
            let mean = by_pixel.mean_dim(2, true, rows.kind());
            let std = if norm == PatchNorm::PerChannel { variance.sqrt() + 1e-6 } else { (variance + 1e-6).sqrt() };
            ((by_pixel - mean) / std).view([batch, count, values])
        }
    };
    rows.to_kind(kind)
}

/// Normalizes rows [.., P] with the channel last → fp32. Float rows are assumed to be normalized already.
fn normalize_rows(rows: &Tensor, stats: &ChannelStats) -> Tensor {
    match rows.kind() {
        Kind::Uint8 => {}
        Kind::Double => return rows.shallow_clone(),
        _ => return rows.to_kind(Kind::Float),
    }
    let repeats = rows.size()[2] / stats.mean.len() as i64;
    let constants = |values: Vec<f64>| channel_tensor(&values, rows.device()).repeat([repeats]);
    let factor = constants(stats.std.iter().map(|std| byte_factor(*std)).collect());
    let offset = constants(stats.mean.iter().zip(&stats.std).map(|(mean, std)| byte_offset(*mean, *std)).collect());
    offset.addcmul(&rows.to_kind(Kind::Float), &factor)
}

/// A byte b is normalized as b · factor + offset.
fn byte_factor(std: f64) -> f64 {
    1.0 / (255.0 * std)
}

fn byte_offset(mean: f64, std: f64) -> f64 {
    -mean / std
}

const INPUT_KINDS: [Kind; 2] = [Kind::Uint8, Kind::Float];
const OUTPUT_KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];
/// Maximum number of channels that the kernel supports.
const MAX_CHANNELS: i64 = 4;
/// Maximum number of values of a patch, which must fit in shared memory.
const MAX_PATCH_VALUES: i64 = 12 * 1024 - 4;

/// Kernel source.
pub const SOURCE: KernelSource = KernelSource {
    name: "patch",
    embedded: include_str!("../../kernels/patch.cu"),
    variants: || {
        let pairs = INPUT_KINDS.iter().flat_map(|&input| OUTPUT_KINDS.map(|output| (input, output)));
        pairs.flat_map(|(input, output)| [1, 2, 4].map(|patch| variant(input, output, patch))).collect()
    },
};

/// `VEC` is the number of pixels per load: the largest of 4, 2 and 1 that divides the side of a patch.
fn variant(input: Kind, output: Kind, patch: i64) -> Variant {
    let vec = [4, 2, 1].into_iter().find(|vec| patch % vec == 0).expect("1 divides every side");
    vec![("FROM", type_name(input).into()), ("INTO", type_name(output).into()), ("VEC", vec.to_string())]
}

/// Maximum number of blocks: 32 per multiprocessor of a Hopper, all resident at once.
const MAX_BLOCKS: u32 = 32 * 132;

/// The same by the kernel, for at most four channels and 12,284 values per patch. Makes x and index contiguous.
pub fn kernel(
    x: &Tensor,
    grid: &Grid,
    stats: &ChannelStats,
    index: &Tensor,
    norm: PatchNorm,
    kind: Kind,
) -> Result<Tensor> {
    let x = x.contiguous();
    let index = index.contiguous();
    let [batch, count] = sizes(&index);
    let values = grid.patch_values();
    let out = Tensor::empty([batch, count, values], (kind, x.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: variant(x.kind(), kind, grid.patch),
        entry: "patch",
        grid: [block_count(batch * count, 1).min(MAX_BLOCKS), 1, 1],
        threads: 64,
        shared_bytes: 16 + 4 * values as usize,
    };
    let Grid { frames, rows, cols, channels, patch_frames, patch } = *grid;
    let integers = [batch * count, count, channels, frames, rows, cols, patch_frames, patch, norm as i64];
    // Unused channels, and float pixels, keep factor 1 and offset 0.
    let mut factors = [1.0f32; MAX_CHANNELS as usize];
    let mut offsets = [0.0f32; MAX_CHANNELS as usize];
    if x.kind() == Kind::Uint8 {
        for (channel, (mean, std)) in stats.mean.iter().zip(&stats.std).take(factors.len()).enumerate() {
            factors[channel] = byte_factor(*std) as f32;
            offsets[channel] = byte_offset(*mean, *std) as f32;
        }
    }
    let mut arguments = vec![Argument::from(&x), (&index).into(), (&out).into()];
    arguments.extend(integers.map(|n| Argument::from(n as i32)));
    arguments.extend(factors.iter().chain(&offsets).map(|value| Argument::from(*value)));
    launch.run(&arguments)?;
    Ok(out)
}
