//! Pixels of the hidden patches, as they are or normalised patch by patch (MAE §3, "Reconstruction target").

use crate::fault::Result;
use crate::op::patch::Level;
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
    /// The same with 1e-6 inside of the root (OmniMAE).
    PerChannelInside,
}

impl Pixel {
    /// x uint8 or fp32 [B, C, T, Y, X] → fp32 [B, M, P] at `drop`.
    pub fn truth(self, pixels: &Pixels, x: &Tensor, drop: &Tensor) -> Result<Tensor> {
        let (level, unit) = match self {
            Pixel::Received => (Level::Raw, false),
            Pixel::PerPatch => (Level::Patch, false),
            Pixel::Unit => (Level::Raw, true),
            Pixel::PerChannel => (Level::Channel, true),
            Pixel::PerChannelInside => (Level::ChannelInside, true),
        };
        pixels.target(x, drop, level, unit)
    }

    /// A guess [B, M, P] in this form as normalised pixels to look at. The truth's own mean and deviation would leak the
    /// answer into the picture: those of what is visible, rows `seen` [B, K, P], stand in for them.
    pub fn shown(self, pixels: &Pixels, guess: &Tensor, seen: &Tensor) -> Tensor {
        let guess = guess.to_kind(Kind::Float);
        let groups = match self {
            Pixel::Received => return guess,
            Pixel::Unit => return pixels.from_unit(&guess),
            Pixel::PerPatch => 1,
            Pixel::PerChannel | Pixel::PerChannelInside => pixels.grid.channels,
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
