//! A model: what parts make together, whichever paper trains it.

use crate::error::Result;
use crate::grid::Grid;
use crate::part::batch::Batch;
use crate::part::cost::ModelCost;
use crate::part::encoder::Features;
use crate::part::mask::MaskPolicy;
use crate::part::params::{ParamSpecs, Weights};
use crate::part::patchify::{Patchify, Reconstruction};
use crate::part::step::Step;
use tch::Tensor;

/// Implemented by parts, never by a paper.
pub trait Model {
    /// Returns how samples are cut into tokens; its grid is that of the longest samples.
    fn patchify(&self) -> &Patchify;
    /// Returns the declarations of the parameters.
    fn params(&self) -> &ParamSpecs;
    /// Returns the operations of a training step on one sample that fills this grid, `visible` tokens of it visible.
    fn cost(&self, grid: &Grid, visible: i64) -> ModelCost;
    /// Turns activation checkpointing of the blocks on or off: less memory, more time, the same numbers.
    fn set_recompute(&mut self, on: bool);
    /// Encodes whole samples, nothing hidden.
    fn encode(&self, w: &Weights, batch: &Batch) -> Result<Features>;
}

/// Draws what a model predicts.
pub trait Reconstruct {
    /// Returns pictures of the samples under the masks of a policy.
    fn reconstruct(&self, step: &Step, batch: &Batch, mask: &dyn MaskPolicy) -> Result<Reconstruction>;
}

/// Embeds images and captions into one space.
pub trait ImageText {
    /// Returns whole images as unit vectors, fp32 [B, E].
    fn encode_image(&self, w: &Weights, batch: &Batch) -> Result<Tensor>;
    /// Returns captions, ids int64 [B, L], as unit vectors, fp32 [B, E].
    fn encode_text(&self, w: &Weights, ids: &Tensor) -> Result<Tensor>;
}
