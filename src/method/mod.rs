//! A method is one paper: which model it trains, what it hides, and its loss. It knows parts; parts know no method.
//! `README.md` shows how to add one.

/// Implements [`Method::model`], [`Method::model_mut`] and [`Method::mask`] by the fields `model` and `mask`.
macro_rules! model_and_mask {
    () => {
        fn model(&self) -> &dyn $crate::part::model::Model {
            &self.model
        }
        fn model_mut(&mut self) -> &mut dyn $crate::part::model::Model {
            &mut self.model
        }
        fn mask(&self) -> Option<&dyn $crate::part::mask::MaskPolicy> {
            Some(&self.mask)
        }
    };
}

pub mod audiomae;
pub mod catalog;
pub mod contrastive_mae;
pub mod flip;
pub mod igpt;
pub mod mae;
pub mod maskfeat;
pub mod mfm;
pub mod omnimae;
pub mod rmae;
pub mod supmae;
pub mod videomae;

/// The words that method files are written in.
pub mod prelude {
    pub use super::{Capabilities, Method, MethodConfig, Progress, Requirements, check_image, check_number};
    pub use crate::error::{Error, Result};
    pub use crate::grid::{Grid, InputConfig};
    pub use schemars::JsonSchema;
    pub use serde::{Deserialize, Serialize};

    pub use crate::part::{
        autoencoder::Autoencoder,
        batch::Batch,
        buffers::BufferSpecs,
        cost::ModelCost,
        decoder::Decode,
        decoder::options::{DecoderOptions, OutputTokens},
        decoder::vit::VitDecoder,
        encoder::vit::{LearnedPositions, PositionTable, Shape, VitOptions},
        encoder::{EncodeOptions, Features, block::BlockInit, block::QkvBias, block::StackOptions, position},
        encoder_with_head::EncoderWithHead,
        head::{Head, HeadOptions},
        loss::{LossDenominators, LossOutput, LossTerm, Per, cross_entropy, masked_mse, mse_between},
        mask::{BlockMask, Mask, MaskPolicy, NoMask, RandomMask, Ratio},
        model::{Generate, ImageText, Model, Reconstruct},
        objective::pixel::{self, PixelTarget},
        params::Init,
        patchify::{Patchify, Reconstruction},
        step::Step,
        teacher::Teacher,
    };
}

pub use prelude::*;

use crate::part::batch::NO_LABEL;
use crate::part::buffers::BufferId;
use crate::part::encoder::text;
use crate::part::training_samples::TrainingSamples;
use std::ops::RangeInclusive;
use tch::{Kind, Tensor};

/// A method's section of the config, `{"<NAME>": {..}}`.
pub trait MethodConfig {
    /// Its key in the config.
    const NAME: &'static str;
    /// Checks its values, which stand at `at` in the config.
    ///
    /// # Errors
    /// ExitCode::Usage on a value that cannot work, before any work begins.
    fn check(&self, at: &str, grid: &Grid) -> Result<()>;
    /// Returns what it needs of a run beside one view of each sample.
    fn requirements(&self) -> Requirements<'_> {
        Requirements::default()
    }
    /// Builds the method.
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>>;
}

/// Needs of a method beside one view of each sample, known from its config. It grows without touching a method.
#[derive(Clone, Copy, Debug, Default)]
pub struct Requirements<'a> {
    /// The loss compares the samples of the global batch: a rank's part is not cut into micro-batches, and all ranks
    /// have equal parts.
    pub whole_batch: bool,
    /// Samples have captions for this text encoder.
    pub captions: Option<&'a text::Config>,
    /// Samples have labels of this many classes; those without one have [`NO_LABEL`].
    pub classes: Option<i64>,
    /// Steps of images alternate with steps of videos.
    pub images_beside_video: bool,
}

/// Abilities of some methods beside training, asked for and never assumed.
#[derive(Clone, Copy, Default)]
pub struct Capabilities<'a> {
    /// Draws predictions of pixels.
    pub reconstruct: Option<&'a dyn Reconstruct>,
    /// Samples images.
    pub generate: Option<&'a dyn Generate>,
    /// Embeds images and captions into one space.
    pub image_text: Option<&'a dyn ImageText>,
    /// The loss reads rows of other ranks through [`Step::ranks`].
    pub gathers: bool,
    /// The count that the loss is averaged over differs from sample to sample, so that ranks sum it in every step.
    pub varying_denominators: bool,
    /// Why a step of this method cannot be captured in a CUDA graph. It can where the loss copies nothing to or from
    /// the device, waits for nothing, and does the same whatever the values and the padding are.
    pub not_capturable: Option<&'static str>,
}

/// Progress of a training at the start of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Samples seen before this step.
    pub samples: u64,
    pub global_batch: u64,
    /// Samples of the data set.
    pub epoch_samples: u64,
    /// Samples of the whole training.
    pub total_samples: u64,
}

impl Progress {
    /// Returns the passes over the data set that are done.
    pub fn epoch(&self) -> f64 {
        self.samples as f64 / self.epoch_samples.max(1) as f64
    }

    /// Returns the fraction of the training that is done, in [0, 1].
    pub fn fraction(&self) -> f64 {
        (self.samples as f64 / self.total_samples.max(1) as f64).min(1.0)
    }

    /// Returns whether a pass over the data set ends in this step.
    pub fn ends_epoch(&self) -> bool {
        let epoch = self.epoch_samples.max(1);
        (self.samples + self.global_batch) / epoch > self.samples / epoch
    }
}

/// A pre-training method.
pub trait Method {
    fn model(&self) -> &dyn Model;
    fn model_mut(&mut self) -> &mut dyn Model;

    /// Returns the policy that hides tokens; none where nothing is hidden.
    fn mask(&self) -> Option<&dyn MaskPolicy> {
        None
    }

    /// Returns the teacher that the step keeps for the loss.
    fn teacher(&self) -> Option<Teacher> {
        None
    }

    /// Declares tensors without gradient that the loss reads and updates.
    fn buffers(&self) -> BufferSpecs {
        BufferSpecs::default()
    }

    /// Learns the buffers of [`Init::FromData`] from the training set, before the first step of a new training.
    ///
    /// # Errors
    /// ExitCode::Usage if the set does not have what they need.
    fn learn_buffers(&self, _samples: &mut TrainingSamples) -> Result<Vec<(BufferId, Tensor)>> {
        Ok(Vec::new())
    }

    /// Returns loss weights, temperatures, momenta, ratios of a step: pure functions of the samples seen, always as
    /// many.
    fn scheduled(&self, _at: &Progress) -> Vec<f64> {
        Vec::new()
    }

    /// Computes the loss of a batch: the paper's figure.
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput>;

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }

    /// Counts what the loss terms of a batch are averaged over. Known before the forward pass, so that counts are added
    /// over micro-batches and ranks first and each sum is divided once.
    fn denominators(&self, batch: &Batch) -> Result<LossDenominators> {
        let mut counts = LossDenominators::default();
        for (grid, samples) in self.model().patchify().grids(batch) {
            counts.samples += samples as f64;
            counts.tokens += (samples * grid.tokens()) as f64;
            counts.hidden_tokens += (samples * (grid.tokens() - self.visible(&grid))) as f64;
        }
        if let Some(labels) = &batch.side.labels {
            counts.labeled = f64::try_from(labels.ne(NO_LABEL).sum(Kind::Int64))?;
        }
        Ok(counts)
    }

    /// Returns the operations of a training step on one sample of a global batch that fills this grid.
    fn cost(&self, grid: &Grid, _global_batch: u64) -> ModelCost {
        self.model().cost(grid, self.visible(grid))
    }

    /// Returns K, the number of visible tokens of a sample that fills this grid.
    fn visible(&self, grid: &Grid) -> i64 {
        self.mask().map_or(grid.tokens(), |mask| mask.visible(grid))
    }
}

/// Checks a number of the config, which stands at `path`.
///
/// # Errors
/// ExitCode::Usage if it lies outside the range.
pub fn check_number(path: &str, value: f64, range: RangeInclusive<f64>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(Error::usage(format!("{path} is {value}; it must lie in {} to {}", range.start(), range.end())))
}

/// The error of asking a method for images and captions that has not learned them.
pub fn no_captions_error(name: &str) -> Error {
    Error::usage(format!("{name} has not learned to match images with captions; ask for --protocol knn or linear"))
}

/// Checks that a method for images gets images.
///
/// # Errors
/// ExitCode::Usage if a sample has more than one frame.
pub fn check_image(at: &str, grid: &Grid) -> Result<()> {
    if grid.frames * grid.patch_frames == 1 {
        return Ok(());
    }
    Err(Error::usage(format!(
        "input.frames makes {} time slots of {} frames; {at} reads images: set it to 1, or choose a method for video",
        grid.frames, grid.patch_frames
    )))
}
