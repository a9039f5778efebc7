//! Samples as rows of patches, which a transformer reads, and back to pixels.

use crate::error::Result;
use crate::grid::{Grid, InputConfig};
use crate::op::patch::{self, ChannelStats, PatchNorm};
use crate::part::batch::Batch;
use crate::part::mask::Mask;
use crate::part::ragged::{LengthGroup, Padding, unpermute};
use tch::{Kind, Tensor};

/// Pictures of a prediction: pixels as 0..1, [B, C, T, Y, X].
pub struct Reconstruction {
    pub original: Tensor,
    /// The original with hidden patches in gray.
    pub masked: Tensor,
    /// The original where visible, the prediction where hidden.
    pub predicted: Tensor,
}

impl Reconstruction {
    /// Joins the pictures of groups of samples in the order of the batch.
    pub fn from_groups(groups: &[LengthGroup], parts: &[Reconstruction]) -> Reconstruction {
        let join = |picture: fn(&Reconstruction) -> &Tensor| {
            unpermute(groups, &parts.iter().map(|part| picture(part).shallow_clone()).collect::<Vec<_>>())
        };
        Reconstruction {
            original: join(|part| &part.original),
            masked: join(|part| &part.masked),
            predicted: join(|part| &part.predicted),
        }
    }
}

/// Cuts samples into patches and scales their values. Samples x are uint8 or normalized fp32 [B, C, T, Y, X]; patches
/// are rows [B, .., P] with the channel last. A sample may have fewer frames than the grid; one with fewer than a token
/// covers is an image, which is repeated to the frames of one token (OmniMAE §3).
pub struct Patchify {
    /// The grid of the longest samples.
    pub grid: Grid,
    /// Treatment of the padding behind short samples.
    pub padding: Padding,
    stats: ChannelStats,
}

impl Patchify {
    /// Cuts samples as the config's `input` says.
    pub fn new(input: &InputConfig) -> Result<Patchify> {
        let (mean, std) = input.mean_std()?;
        Ok(Patchify { grid: input.grid()?, padding: Padding::Keep, stats: ChannelStats { mean, std } })
    }

    /// Sets how padding behind short samples is treated, by default as data.
    pub fn with_padding(self, padding: Padding) -> Patchify {
        Patchify { padding, ..self }
    }

    /// Repeats an image to the frames of one token; returns clips as they are.
    fn as_clip(&self, x: &Tensor) -> Tensor {
        x.expand([-1, -1, x.size()[2].max(self.grid.patch_frames), -1, -1], false)
    }

    /// Returns the grid of samples x, padding included.
    pub fn grid_of(&self, x: &Tensor) -> Grid {
        Grid { frames: x.size()[2].max(self.grid.patch_frames) / self.grid.patch_frames, ..self.grid }
    }

    /// Counts the samples of a batch by the grid that each fills.
    pub fn grids(&self, batch: &Batch) -> Vec<(Grid, i64)> {
        self.padding.grids(&self.grid_of(batch.view()), batch.size(), batch.side.valid.as_deref())
    }

    /// Groups the samples of a batch by the grid that each fills; one group where padding takes part.
    pub fn groups(&self, batch: &Batch) -> Result<Vec<LengthGroup>> {
        self.padding.groups(&self.grid_of(batch.view()), batch)
    }

    /// Returns the normalized patches at `indices` int64 [B, K]: [B, K, P] of this kind.
    pub fn patches_at(&self, x: &Tensor, indices: &Tensor, kind: Kind) -> Result<Tensor> {
        patch::gather_patches(&self.as_clip(x), &self.grid_of(x), &self.stats, indices, kind)
    }

    /// Returns all patches in row-major order, normalized: [B, N, P] of this kind.
    pub fn patchify(&self, x: &Tensor, kind: Kind) -> Result<Tensor> {
        self.first_patches(x, self.grid_of(x).tokens(), kind)
    }

    /// Returns the first `tokens` patches, normalized: [B, tokens, P].
    pub fn first_patches(&self, x: &Tensor, tokens: i64, kind: Kind) -> Result<Tensor> {
        self.patches_at(x, &Mask::all_visible(x.size()[0], tokens, x.device()).keep, kind)
    }

    /// Normalizes whole samples as the model receives them: fp32 [B, C, T, Y, X].
    pub fn normalize(&self, x: &Tensor) -> Result<Tensor> {
        Ok(patch::unpatchify(&self.patchify(x, Kind::Float)?, &self.grid_of(x)))
    }

    /// Returns target patches at `indices`, normalized by `norm`: as the model receives them, or as 0..1 where `raw01`:
    /// fp32 [B, M, P].
    pub fn target_patches(&self, x: &Tensor, indices: &Tensor, norm: PatchNorm, raw01: bool) -> Result<Tensor> {
        let grid = self.grid_of(x);
        let x = self.as_clip(x);
        if !raw01 {
            return patch::gather_target(&x, &grid, &self.stats, indices, norm);
        }
        let identity = ChannelStats { mean: vec![0.0; self.stats.mean.len()], std: vec![1.0; self.stats.std.len()] };
        let x = if x.kind() == Kind::Uint8 { x } else { self.to_01(&x) };
        patch::gather_target(&x, &grid, &identity, indices, norm)
    }

    /// Samples, uint8 or normalized → fp32 as 0..1, not clamped.
    pub fn to_01(&self, x: &Tensor) -> Tensor {
        if x.kind() == Kind::Uint8 {
            return x.to_kind(Kind::Float) / 255.0;
        }
        x * self.by_channel(&self.stats.std, x) + self.by_channel(&self.stats.mean, x)
    }

    /// Samples as 0..1 → normalized.
    pub fn standardize(&self, x: &Tensor) -> Tensor {
        (x - self.by_channel(&self.stats.mean, x)) / self.by_channel(&self.stats.std, x)
    }

    /// One value for each channel, [C, 1, 1, 1].
    fn by_channel(&self, values: &[f64], like: &Tensor) -> Tensor {
        patch::channel_tensor(values, like.device()).view([-1, 1, 1, 1])
    }

    /// Patches as 0..1 → normalized patches.
    pub fn normalize_patches(&self, patches: &Tensor) -> Tensor {
        (patches - self.patch_constants(&self.stats.mean, patches)) / self.patch_constants(&self.stats.std, patches)
    }

    /// Draws a prediction, normalized patches [B, M, P] at the hidden tokens. Tokens that the mask does not cover,
    /// padding behind short samples, are shown as they are.
    pub fn reconstruct(&self, x: &Tensor, pred: &Tensor, mask: &Mask) -> Result<Reconstruction> {
        let visible = self.patches_at(x, &mask.keep, Kind::Float)?;
        let hidden = self.patches_at(x, &mask.drop, Kind::Float)?;
        let restore = mask.restore();
        let covered = restore.size()[1];
        let grid = self.grid_of(x);
        let rest = self.patchify(x, Kind::Float)?.narrow(1, covered, grid.tokens() - covered);
        let picture = |at_hidden: &Tensor| {
            let patches = patch::gather(&Tensor::cat(&[&visible, at_hidden], 1), &restore);
            self.stats.denormalize(&patch::unpatchify(&Tensor::cat(&[&patches, &rest], 1), &grid))
        };
        let gray = hidden.zeros_like();
        Ok(Reconstruction { original: picture(&hidden), masked: picture(&gray), predicted: picture(pred) })
    }

    /// One value for each channel as a row `[P]`.
    fn patch_constants(&self, values: &[f64], like: &Tensor) -> Tensor {
        patch::channel_tensor(values, like.device()).repeat([self.grid.patch_values() / self.grid.channels])
    }
}
