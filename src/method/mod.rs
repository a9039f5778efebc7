//! What a method is: four functions over the parts. A method knows parts; parts know no method.

pub mod audio_mae;
pub mod catalog;
pub mod flip;
pub mod mae;
pub mod omnimae;
pub mod videomae;

pub use crate::part::batch::Batch;
pub use crate::part::encoder::Features;
pub use crate::part::pixels::Reconstruction;

use crate::device::World;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::part::mask::Mask;
use crate::part::weights::{Table, Weights};
use crate::part::work::Work;
use std::{sync::Arc, time::Duration};
use tch::Tensor;

/// What a method asks of a run beyond samples, known from its config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Its loss compares the samples of a batch with each other: a rank's share is not cut, and all have equal ones.
    pub whole_batch: bool,
    /// It guesses pixels, of which pictures can be drawn.
    pub pictures: bool,
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
    /// As `counts`, for samples of which so many rows are not padding, where that makes a difference.
    fn counts_of(&self, valid: &[u32]) -> Vec<(&'static str, f64)> {
        self.counts(valid.len() as i64)
    }
    /// What a training step over `batch` samples, those of all ranks together, does with one of them.
    fn work(&self, batch: u64) -> Work;
    /// The grid of still pictures, and what a step does with one, where the method reads them beside clips.
    fn still(&self) -> Option<(Grid, Work)> {
        None
    }
    /// The terms, in the order of `counts`.
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>>;
    /// Opens what a method needs to talk with other ranks inside of its loss; collective, once, before the first step. One
    /// collective may take so long.
    fn join(&mut self, _world: &Arc<dyn World>, _deadline: Duration) -> Result<()> {
        Ok(())
    }
    /// Whether a step may be captured as a CUDA graph, or why not. It may where `loss` copies nothing to or from the
    /// device, waits for nothing, and does the same whatever the values and the padding are. Asked after `join`.
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
    fn reconstruct(&self, _w: &Weights, _batch: &Batch) -> Result<Reconstruction> {
        Err(Fault::usage(format!("{} guesses no pixels: there is nothing to draw", self.name())))
    }
    /// Whole images as unit vectors, fp32 [B, E], in the space that they share with captions.
    fn match_images(&self, _w: &Weights, _batch: &Batch) -> Result<Tensor> {
        Err(self.no_captions())
    }
    /// Captions, ids int64 [B, L], as unit vectors, fp32 [B, E].
    fn match_captions(&self, _w: &Weights, _ids: &Tensor) -> Result<Tensor> {
        Err(self.no_captions())
    }
    /// The fault of a method that has learned nothing of captions.
    fn no_captions(&self) -> Fault {
        Fault::usage(format!(
            "{} has not learned to match images with captions; ask for --protocol knn or linear",
            self.name()
        ))
    }
}
