//! A model: what parts make together, whichever paper trains it.

use crate::error::Result;
use crate::grid::Grid;
use crate::part::batch::Batch;
use crate::part::cost::ModelCost;
use crate::part::encoder::{EncodeOptions, Features};
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
    /// Returns the number of blocks of the encoder.
    fn depth(&self) -> usize;
    /// Encodes samples, by default whole ones.
    ///
    /// # Errors
    /// ExitCode::Usage if the model cannot hide what the options hide.
    fn encode(&self, step: &Step, batch: &Batch, options: EncodeOptions) -> Result<Features>;
}

/// Draws what a model predicts.
pub trait Reconstruct {
    /// Returns pictures of the samples under the masks of a policy.
    fn reconstruct(&self, step: &Step, batch: &Batch, mask: &dyn MaskPolicy) -> Result<Reconstruction>;
}

/// Samples images.
pub trait Generate {
    /// Returns images of which the first `kept` pixels in row-major order are the batch's, and the others are sampled
    /// by the noise of its keys: 0..1, fp32 [B, C, 1, Y, X]. A lower temperature makes them more alike.
    fn generate(&self, step: &Step, batch: &Batch, kept: i64, temperature: f64) -> Result<Tensor>;
}

/// Embeds images and captions into one space.
pub trait ImageText {
    /// Returns whole images as unit vectors, fp32 [B, E].
    fn encode_image(&self, w: &Weights, batch: &Batch) -> Result<Tensor>;
    /// Returns captions, ids int64 [B, L], as unit vectors, fp32 [B, E].
    fn encode_text(&self, w: &Weights, ids: &Tensor) -> Result<Tensor>;
}
