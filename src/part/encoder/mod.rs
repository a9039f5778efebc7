//! Encoders: tokens to features.

pub mod block;
pub mod position;
pub mod shape;
pub mod stack;
pub mod text;
pub mod vit;

use crate::error::Result;
use crate::grid::Grid;
use crate::part::batch::Batch;
use crate::part::mask::{Mask, MaskPolicy};
use crate::part::ragged::{LengthGroup, unpermute};
use crate::part::step::Step;
use tch::Tensor;

/// Options of a frozen encoder: the tokens it sees, and the layer its features are read from.
#[derive(Clone, Copy, Default)]
pub struct EncodeOptions<'a> {
    /// The input of this block, counted from 0, after its first normalization; after the final normalization if it is
    /// the depth; where the model likes best if it is left out.
    pub layer: Option<usize>,
    /// Hides tokens; means are over the visible ones.
    pub mask: Option<&'a dyn MaskPolicy>,
}

impl EncodeOptions<'_> {
    /// Samples the mask of a batch of which every sample fills this grid.
    pub fn sample_mask(&self, step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        match self.mask {
            Some(policy) => policy.sample(step, grid, batch),
            None => Ok(Mask::all_visible(batch.size(), grid.tokens(), batch.view().device())),
        }
    }
}

/// The output of a frozen encoder for a batch, after the final normalization.
pub struct Features {
    /// The class token [B, D], if there is one.
    pub class: Option<Tensor>,
    /// The mean of all other tokens [B, D].
    pub mean: Tensor,
}

impl Features {
    /// Concatenates the features of each group in batch order.
    pub fn from_groups(groups: &[LengthGroup], parts: &[Features]) -> Features {
        let classes: Vec<Tensor> = parts.iter().filter_map(|part| Some(part.class.as_ref()?.shallow_clone())).collect();
        let means: Vec<Tensor> = parts.iter().map(|part| part.mean.shallow_clone()).collect();
        let class = (!classes.is_empty()).then(|| unpermute(groups, &classes));
        Features { class, mean: unpermute(groups, &means) }
    }
}
