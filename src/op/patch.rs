//! Pixels become rows of patches, normalised, only where they are asked for.

use super::launch::{Argument, Launch, Source, Variant, blocks, type_name};
use super::sizes;
use crate::fault::Result;
use crate::grid::Grid;
use tch::{Device, Kind, Tensor};

/// Per-channel constants of a data set; pixels are read as 0..1.
#[derive(Clone, Debug)]
pub struct Scale {
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
}

impl Scale {
    /// Normalised pixels [B, C, T, Y, X] back to 0..1, clamped.
    pub fn to_unit(&self, x: &Tensor) -> Tensor {
        let constants = |values: &[f64]| by_channel(values, x.device()).view([1, -1, 1, 1, 1]);
        (x * constants(&self.std) + constants(&self.mean)).clamp(0.0, 1.0)
    }
}

/// fp32 [C], made on the device number by number: nothing is copied there, which a captured step could not do.
pub fn by_channel(values: &[f64], device: Device) -> Tensor {
    let number = |value: &f64| Tensor::full([1], *value, (Kind::Float, device));
    Tensor::cat(&values.iter().map(number).collect::<Vec<_>>(), 0)
}

/// x uint8 or fp32 [B, C, T, Y, X] → [B, N, P] of the same dtype; values in the order (frame, row, column, channel),
/// the channel last as the official code has it.
pub fn patches(x: &Tensor, grid: &Grid) -> Tensor {
    let [batch, channels, ..] = sizes::<5>(x);
    let Grid { frames, rows, cols, patch_frames: f, patch: p, .. } = *grid;
    x.view([batch, channels, frames, f, rows, p, cols, p].as_slice())
        .permute([0, 2, 4, 6, 3, 5, 7, 1]) // [B, frames, rows, cols, f, p, p, C]
        .reshape([batch, grid.tokens(), grid.values()])
}

/// The inverse: [B, N, P] → [B, C, T, Y, X].
pub fn pixels(patches: &Tensor, grid: &Grid) -> Tensor {
    let [batch, ..] = sizes::<3>(patches);
    let Grid { frames, rows, cols, channels, patch_frames: f, patch: p } = *grid;
    let [c, t, y, x] = grid.pixels();
    patches
        .view([batch, frames, rows, cols, f, p, p, channels].as_slice())
        .permute([0, 7, 1, 4, 2, 5, 3, 6])
        .reshape([batch, c, t, y, x])
}

/// The rows of x [B, N, P] at `index` int64 [B, K] → [B, K, P].
pub fn gather(x: &Tensor, index: &Tensor) -> Tensor {
    let [_, _, width] = sizes(x);
    let [batch, kept] = sizes(index);
    x.gather(1, &index.unsqueeze(-1).expand([batch, kept, width], false), false)
}

/// How the values of a target are levelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// They are left as they are.
    Raw,
    /// Each patch less its mean, over √(variance + 1e-6), all its values together (MAE's `norm_pix_loss`).
    Patch,
    /// Each channel of a patch less its mean, over √variance + 1e-6 (VideoMAE). The variance is that of the values as
    /// `Scale` gives them; VideoMAE takes it of pixels in 0..1.
    Channel,
    /// The same over √(variance + 1e-6) (OmniMAE), which tells flat patches apart from noise.
    ChannelInside,
}

/// The patches of x uint8 or fp32 [B, C, T, Y, X] at `index` int64 [B, K], with the data set's mean and deviation taken
/// out → [B, K, P] of the kind asked for. fp32 pixels are taken as normalised already. uint8 is gathered before it is
/// widened, so a full float image never exists; on a GPU all is done in one pass.
pub fn patch(x: &Tensor, grid: &Grid, scale: &Scale, index: &Tensor, kind: Kind) -> Result<Tensor> {
    choose(x, grid, scale, index, Level::Raw, kind)
}

/// As `patch`, levelled → fp32 [B, M, P].
pub fn target(x: &Tensor, grid: &Grid, scale: &Scale, index: &Tensor, level: Level) -> Result<Tensor> {
    choose(x, grid, scale, index, level, Kind::Float)
}

fn choose(x: &Tensor, grid: &Grid, scale: &Scale, index: &Tensor, level: Level, kind: Kind) -> Result<Tensor> {
    let fits = FROM.contains(&x.kind()) && INTO.contains(&kind) && grid.channels <= CHANNELS && grid.values() <= VALUES;
    if x.device().is_cuda() && fits {
        return kernel(x, grid, scale, index, level, kind);
    }
    Ok(formula(x, grid, scale, index, level, kind))
}

/// The reference of both.
pub fn formula(x: &Tensor, grid: &Grid, scale: &Scale, index: &Tensor, level: Level, kind: Kind) -> Tensor {
    let rows = normalised(&gather(&patches(x, grid), index), scale);
    match level {
        Level::Raw => rows,
        Level::Patch => {
            let variance = rows.var_dim(-1, true, true);
            (&rows - rows.mean_dim(-1, true, rows.kind())) / (variance + 1e-6).sqrt()
        }
        Level::Channel | Level::ChannelInside => {
            let [batch, count, values] = sizes(&rows);
            let by_pixel = rows.view([batch, count, values / grid.channels, grid.channels]);
            let variance = by_pixel.var_dim(2, true, true);
            let mean = by_pixel.mean_dim(2, true, rows.kind());
            let deviation = match level {
                Level::Channel => variance.sqrt() + 1e-6,
                _ => (variance + 1e-6).sqrt(),
            };
            ((by_pixel - mean) / deviation).view([batch, count, values])
        }
    }
    .to_kind(kind)
}

/// rows [.., P] with the channel last → fp32, normalised. Rows of floats are taken as normalised already.
fn normalised(rows: &Tensor, scale: &Scale) -> Tensor {
    if rows.kind() != Kind::Uint8 {
        return if rows.kind() == Kind::Double { rows.shallow_clone() } else { rows.to_kind(Kind::Float) };
    }
    let repeats = rows.size()[2] / scale.mean.len() as i64;
    let constants = |values: Vec<f64>| by_channel(&values, rows.device()).repeat([repeats]);
    let factor = constants(scale.std.iter().map(|std| 1.0 / (255.0 * std)).collect());
    let offset = constants(scale.mean.iter().zip(&scale.std).map(|(mean, std)| -mean / std).collect());
    offset.addcmul(&rows.to_kind(Kind::Float), &factor)
}

const FROM: [Kind; 2] = [Kind::Uint8, Kind::Float];
const INTO: [Kind; 2] = [Kind::Float, Kind::BFloat16];
/// What the kernel takes at most: channels, and values of a patch that fit on chip.
const CHANNELS: i64 = 4;
const VALUES: i64 = 12 * 1024 - 4;

pub const SOURCE: Source = Source {
    name: "patch",
    built_in: include_str!("../../kernels/patch.cu"),
    variants: || {
        let pairs = FROM.iter().flat_map(|&from| INTO.map(|into| (from, into)));
        pairs.flat_map(|(from, into)| [1, 2, 4].map(|patch| variant(from, into, patch))).collect()
    },
};

/// Pixels read at a time: as many as divide a patch's side, at most four.
fn variant(from: Kind, into: Kind, patch: i64) -> Variant {
    let vec = [4, 2, 1].into_iter().find(|vec| patch % vec == 0).expect("one");
    vec![("FROM", type_name(from).into()), ("INTO", type_name(into).into()), ("VEC", vec.to_string())]
}

/// Blocks at most: 32 for each multiprocessor of a Hopper, all of them at work at once.
const MOST: u32 = 32 * 132;

/// The same by our kernel, for at most four channels and 12,284 values a patch; x and index are made contiguous.
pub fn kernel(x: &Tensor, grid: &Grid, scale: &Scale, index: &Tensor, level: Level, kind: Kind) -> Result<Tensor> {
    let (x, index) = (x.contiguous(), index.contiguous());
    let ([batch, kept], values) = (sizes(&index), grid.values());
    let out = Tensor::empty([batch, kept, values], (kind, x.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: variant(x.kind(), kind, grid.patch),
        entry: "patch",
        grid: [blocks(batch * kept, 1).min(MOST), 1, 1],
        threads: 64,
        shared: 16 + 4 * values as usize,
    };
    let Grid { frames, rows, cols, channels, patch_frames, patch } = *grid;
    let numbers = [batch * kept, kept, channels, frames, rows, cols, patch_frames, patch, level as i64];
    let bytes = x.kind() == Kind::Uint8;
    // Unused channels, and floats, stay as they are.
    let constant = |of: &dyn Fn(f64, f64) -> f64, otherwise: f32| {
        let of_channel = |c: usize| match (bytes, scale.mean.get(c), scale.std.get(c)) {
            (true, Some(&mean), Some(&std)) => of(mean, std) as f32,
            _ => otherwise,
        };
        [0, 1, 2, 3].map(|c| Argument::from(of_channel(c)))
    };
    let factors = constant(&|_, std| 1.0 / (255.0 * std), 1.0);
    let offsets = constant(&|mean, std| -mean / std, 0.0);
    let tensors = [Argument::from(&x), (&index).into(), (&out).into()];
    launch.run(&[&tensors[..], &numbers.map(|n| (n as i32).into()), &factors, &offsets].concat())?;
    Ok(out)
}
