//! Losses are sums; the training step divides each once by its count over the global batch, so that neither the number
//! of ranks nor micro-batches change the result.

mod cross_entropy; // with labels, and of tokens
mod contrastive; // symmetric InfoNCE between images and captions of all ranks
mod mse; // between two predictions
mod spectrum; // distance of spectra

pub use crate::op::masked_mse::masked_mse;
pub use contrastive::contrastive;
pub use cross_entropy::{cross_entropy, token_cross_entropy};
pub use mse::mse_between;
pub use spectrum::{SpectrumAverage, spectrum_distance};

use crate::part::buffers::BufferId;
use std::ops::{Add, Mul};
use tch::Tensor;

/// The unit that a loss term is averaged over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    HiddenToken,
    Token,
    Sample,
    /// Samples that have a label.
    Labeled,
    /// Anything that the method itself counts.
    Counted,
}

/// Counts of what loss terms are averaged over, in some samples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossDenominators {
    pub hidden_tokens: f64,
    pub tokens: f64,
    pub samples: f64,
    pub labeled: f64,
    pub counted: f64,
}

impl LossDenominators {
    /// Kinds of counts, one for each [`Per`], in its order.
    pub const COUNT: i64 = 5;

    /// Returns one count.
    pub fn get(&self, per: Per) -> f64 {
        match per {
            Per::HiddenToken => self.hidden_tokens,
            Per::Token => self.tokens,
            Per::Sample => self.samples,
            Per::Labeled => self.labeled,
            Per::Counted => self.counted,
        }
    }

    /// Returns the counts in the order of [`Per`].
    pub fn to_array(self) -> [f64; 5] {
        [self.hidden_tokens, self.tokens, self.samples, self.labeled, self.counted]
    }

    /// Makes counts of an array in the order of [`Per`].
    pub fn from_array([hidden_tokens, tokens, samples, labeled, counted]: [f64; 5]) -> LossDenominators {
        LossDenominators { hidden_tokens, tokens, samples, labeled, counted }
    }
}

impl Add for LossDenominators {
    type Output = LossDenominators;
    fn add(self, other: LossDenominators) -> LossDenominators {
        let a = self.to_array();
        let b = other.to_array();
        LossDenominators::from_array(std::array::from_fn(|index| a[index] + b[index]))
    }
}

impl Mul<f64> for LossDenominators {
    type Output = LossDenominators;
    fn mul(self, factor: f64) -> LossDenominators {
        LossDenominators::from_array(self.to_array().map(|count| count * factor))
    }
}

/// One named term of a loss. The objective is the sum of all terms' means.
#[derive(Debug)]
pub struct LossTerm {
    pub name: &'static str,
    /// fp32 [], carrying the gradient; a weight is part of it.
    pub sum: Tensor,
    pub per: Per,
}

/// The update of a buffer in a step, computed from this rank's samples.
#[derive(Debug)]
pub enum BufferUpdate {
    /// Exponential moving average of a mean over the global batch: b ← momentum · b + (1 − momentum) · Σ sum / Σ count.
    /// `sum` has the buffer's shape and is added over micro-batches and ranks; `per` names the count.
    Mean { buffer: BufferId, sum: Tensor, per: Per, momentum: f64 },
    /// First in, first out: rows [n, ..] of all ranks enter at the end of the buffer [Q, ..] in the order of the global
    /// batch, and as many leave at its front. The method must require the whole batch.
    Queue { buffer: BufferId, rows: Tensor },
}

impl BufferUpdate {
    /// Returns which buffer it moves.
    pub fn buffer(&self) -> BufferId {
        match self {
            BufferUpdate::Mean { buffer, .. } | BufferUpdate::Queue { buffer, .. } => *buffer,
        }
    }
}

/// The loss of a batch, and the updates of buffers.
#[derive(Debug, Default)]
pub struct LossOutput {
    pub terms: Vec<LossTerm>,
    /// Updates that take place if all ranks accept the step.
    pub buffers: Vec<BufferUpdate>,
}

impl LossOutput {
    /// A loss of one term.
    pub fn term(name: &'static str, sum: Tensor, per: Per) -> LossOutput {
        LossOutput { terms: vec![LossTerm { name, sum, per }], buffers: Vec::new() }
    }
}
