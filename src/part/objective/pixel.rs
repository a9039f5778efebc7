//! Pixels of the hidden patches, raw or normalized per patch (MAE §3, "Reconstruction target").

use crate::error::Result;
use crate::op::patch::PatchNorm;
use crate::part::patchify::Patchify;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The config's `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Each patch with mean 0 and standard deviation 1 instead of raw pixels.
    pub normalize: bool,
}

impl Config {
    /// Returns MAE's target: each patch normalized, or pixels as the model receives them.
    pub fn patch_target(self) -> PixelTarget {
        if self.normalize { PixelTarget::PerPatch } else { PixelTarget::Standardized }
    }
}

/// The form of the pixels that are predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelTarget {
    /// Pixels as the model receives them, standardized by the data set's mean and standard deviation.
    Standardized,
    /// Standardized pixels, each patch normalized over all its values (MAE).
    PerPatch,
    /// Pixels in 0..1.
    Raw01,
    /// Pixels in 0..1, each channel of each patch normalized (VideoMAE).
    PerChannel,
    /// The same with 1e-6 inside the root (OmniMAE).
    PerChannelEpsInside,
}

impl PixelTarget {
    /// x uint8 or fp32 [B, C, T, Y, X] → the targets at `drop`, fp32 [B, M, P].
    pub fn target(self, patchify: &Patchify, x: &Tensor, drop: &Tensor) -> Result<Tensor> {
        let (norm, raw01) = match self {
            PixelTarget::Standardized => (PatchNorm::Raw, false),
            PixelTarget::PerPatch => (PatchNorm::PerPatch, false),
            PixelTarget::Raw01 => (PatchNorm::Raw, true),
            PixelTarget::PerChannel => (PatchNorm::PerChannel, true),
            PixelTarget::PerChannelEpsInside => (PatchNorm::PerChannelEpsInside, true),
        };
        patchify.target_patches(x, drop, norm, raw01)
    }

    /// Converts a prediction [B, M, P] to standardized pixels for display. Mean and standard deviation of the target
    /// would leak the answer into the image, so that those of the visible patches [B, K, P] take their place.
    pub fn denormalize(self, patchify: &Patchify, pred: &Tensor, visible: &Tensor) -> Tensor {
        let pred = pred.to_kind(Kind::Float);
        let groups = match self {
            PixelTarget::Standardized => return pred,
            PixelTarget::Raw01 => return patchify.normalize_patches(&pred),
            PixelTarget::PerPatch => 1,
            PixelTarget::PerChannel | PixelTarget::PerChannelEpsInside => patchify.grid.channels,
        };
        let visible = by_group(visible, groups);
        let mean = visible.mean_dim([1, 2].as_slice(), true, Kind::Float); // [B, 1, 1, groups]
        let std = (&visible - &mean).square().mean_dim([1, 2].as_slice(), true, Kind::Float).sqrt();
        (by_group(&pred, groups) * std + mean).view_as(&pred)
    }
}

/// rows [B, n, P], the channel last → [B, n, P / groups, groups].
fn by_group(rows: &Tensor, groups: i64) -> Tensor {
    rows.unflatten(-1, [-1, groups].as_slice())
}
