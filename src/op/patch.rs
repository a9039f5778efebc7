//! Pixels become rows of patches, normalised, only where they are asked for.

use super::sizes;
use crate::grid::Grid;
use tch::{Kind, Tensor};

/// Per-channel constants of a data set; pixels are read as 0..1.
#[derive(Clone, Debug)]
pub struct Scale {
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
}

impl Scale {
    /// Normalised pixels [B, C, T, Y, X] back to 0..1, clamped.
    pub fn to_unit(&self, x: &Tensor) -> Tensor {
        let constants = |values: &[f64]| Tensor::from_slice(values).to_kind(Kind::Float).view([1, -1, 1, 1, 1]);
        (x * constants(&self.std).to_device(x.device()) + constants(&self.mean).to_device(x.device())).clamp(0.0, 1.0)
    }
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

/// The patches of x at `index`, as fp32 with the data set's mean and deviation taken out → [B, K, P]. uint8 is gathered
/// before it is widened, so a full float image never exists.
pub fn patch(x: &Tensor, grid: &Grid, scale: &Scale, index: &Tensor) -> Tensor {
    normalised(&gather(&patches(x, grid), index), scale)
}

/// rows [.., P] with the channel last → fp32, normalised. fp32 rows are taken as normalised already.
fn normalised(rows: &Tensor, scale: &Scale) -> Tensor {
    if rows.kind() != Kind::Uint8 {
        return rows.to_kind(Kind::Float);
    }
    let repeats = rows.size()[2] / scale.mean.len() as i64;
    let constants =
        |values: Vec<f64>| Tensor::from_slice(&values).to_kind(Kind::Float).to_device(rows.device()).repeat([repeats]);
    let factor = constants(scale.std.iter().map(|std| 1.0 / (255.0 * std)).collect());
    let offset = constants(scale.mean.iter().zip(&scale.std).map(|(mean, std)| -mean / std).collect());
    offset.addcmul(&rows.to_kind(Kind::Float), &factor)
}
