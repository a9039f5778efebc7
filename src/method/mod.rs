//! What a method is: four functions over the parts. A method knows parts; parts know no method.

pub mod catalog;
pub mod mae;
pub mod omnimae;
pub mod videomae;

pub use crate::part::encoder::Features;
pub use crate::part::pixels::Reconstruction;

use crate::fault::Result;
use crate::grid::Grid;
use crate::op::shuffle::Origin;
use crate::part::mask::Mask;
use crate::part::weights::{Table, Weights};
use crate::part::work::Work;
use tch::Tensor;

/// Samples on their way through a model, on one rank.
#[derive(Debug)]
pub struct Batch {
    /// uint8 as decoded, or fp32 already normalised: [B, C, T, Y, X].
    pub pixels: Tensor,
    /// Where each sample's randomness comes from, int64 [3, B] beside the pixels (see [`Origin::table`]).
    pub origins: Tensor,
    /// The run's seed.
    pub seed: u64,
}

impl Batch {
    /// The samples' origins are copied to where their pixels are.
    pub fn new(pixels: Tensor, origins: &[Origin], seed: u64) -> Batch {
        Batch { origins: Origin::table(origins, pixels.device()), pixels, seed }
    }
}

/// One named part of a loss: a sum, to be divided by its count over the whole step. The objective is the sum of all
/// terms' means.
#[derive(Debug)]
pub struct Term {
    pub name: &'static str,
    /// fp32 [], carrying the gradient.
    pub sum: Tensor,
}

pub trait Method {
    /// Its key in the config.
    fn name(&self) -> &'static str;
    fn grid(&self) -> &Grid;
    /// What the model is made of.
    fn table(&self) -> &Table;
    /// From now on a block's activations are not kept for backward but computed again there: less memory, more time, the
    /// same numbers.
    fn recompute(&mut self);
    /// What each term of `loss` will be divided by, for `samples` samples; known before the forward pass, so that
    /// counts are added up over micro-batches and ranks first and each sum is divided once.
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)>;
    /// What a training step does with one sample.
    fn work(&self) -> Work;
    /// The grid of still pictures, and what a step does with one, where the method reads them beside clips.
    fn still(&self) -> Option<(Grid, Work)> {
        None
    }
    /// The terms, in the order of `counts`.
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>>;
    /// Whether a step may be captured as a CUDA graph, or why not. It may where `loss` copies nothing to or from the
    /// device, waits for nothing, and does the same whatever the values are.
    fn capturable(&self) -> Result<(), &'static str> {
        Ok(())
    }
    /// Which tokens the method hides of this batch.
    fn mask(&self, batch: &Batch) -> Mask;
    /// The pixels as the model receives them: fp32, normalised [B, C, T, Y, X].
    fn normalised(&self, batch: &Batch) -> Result<Tensor>;
    /// The encoder on whole samples, nothing hidden.
    fn features(&self, w: &Weights, batch: &Batch) -> Result<Features>;
    /// Pictures of what the model guesses.
    fn reconstruct(&self, w: &Weights, batch: &Batch) -> Result<Reconstruction>;
}
