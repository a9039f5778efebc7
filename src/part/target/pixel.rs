//! Pixels of the hidden patches, as they are or normalised patch by patch (MAE §3, "Reconstruction target").

use crate::part::pixels::Pixels;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The config's `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Each patch with mean 0 and deviation 1 instead of raw pixels.
    pub normalize: bool,
}

/// In what form pixels are guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pixel {
    /// As the model receives them.
    Received,
    /// The same with mean and deviation of each patch, over all its values jointly, taken out (MAE).
    PerPatch,
    /// As 0..1.
    Unit,
    /// The same with mean and deviation of each channel of each patch taken out (VideoMAE).
    PerChannel,
}

impl Pixel {
    /// x uint8 or fp32 [B, C, T, Y, X] → fp32 [B, M, P] at `drop`.
    pub fn truth(self, pixels: &Pixels, x: &Tensor, drop: &Tensor) -> Tensor {
        let rows = pixels.rows(x, drop);
        match self {
            Pixel::Received => rows,
            Pixel::PerPatch => standardised(&rows),
            Pixel::Unit => pixels.to_unit(&rows),
            Pixel::PerChannel => standardised_by_channel(&pixels.to_unit(&rows), pixels.grid.channels),
        }
    }

    /// A guess [B, M, P] in this form as normalised pixels to look at. The truth's own mean and deviation would leak the
    /// answer into the picture: those of what is visible, rows `seen` [B, K, P], stand in for them.
    pub fn shown(self, pixels: &Pixels, guess: &Tensor, seen: &Tensor) -> Tensor {
        let guess = guess.to_kind(Kind::Float);
        let groups = match self {
            Pixel::Received => return guess,
            Pixel::Unit => return pixels.from_unit(&guess),
            Pixel::PerPatch => 1,
            Pixel::PerChannel => pixels.grid.channels,
        };
        let seen = by_group(seen, groups);
        let mean = seen.mean_dim([1, 2].as_slice(), true, Kind::Float); // [B, 1, 1, groups]
        let deviation = (&seen - &mean).square().mean_dim([1, 2].as_slice(), true, Kind::Float).sqrt();
        (by_group(&guess, groups) * deviation + mean).view_as(&guess)
    }
}

/// rows [B, n, P], the channel last → [B, n, P / groups, groups].
fn by_group(rows: &Tensor, groups: i64) -> Tensor {
    rows.unflatten(-1, [-1, groups].as_slice())
}

/// Each row of [.., P] with mean 0 and deviation 1; the variance divides by P − 1 (PyTorch's default), plus 1e-6.
pub fn standardised(rows: &Tensor) -> Tensor {
    let mean = rows.mean_dim(-1, true, Kind::Float);
    let variance = rows.var_dim(-1, true, true);
    (rows - mean) / (variance + 1e-6).sqrt()
}

/// Each channel of each row of [B, n, P] with mean 0 and deviation 1; the variance divides by one less than its values,
/// and 1e-6 is added to the deviation (official `engine_for_pretraining.py`).
pub fn standardised_by_channel(rows: &Tensor, channels: i64) -> Tensor {
    let each = by_group(rows, channels);
    let mean = each.mean_dim(-2, true, Kind::Float);
    let deviation = each.var_dim(-2, true, true).sqrt();
    ((each - mean) / (deviation + 1e-6)).view_as(rows)
}
