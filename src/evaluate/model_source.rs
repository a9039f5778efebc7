//! The model to evaluate: a run's checkpoint, or the same model with its initial weights.

use crate::checkpoint::load_from_url;
use crate::checkpoint::weights::{SavedModel, load_model};
use crate::error::Result;
use crate::optim::flat::FlatParams;
use crate::part::buffers::Buffers;
use crate::part::params::Init;
use tch::{Device, Kind};

/// The checkpoint to load.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// URL of a run or a checkpoint.
    pub checkpoint: String,
    /// Uses initial weights instead of the trained ones.
    pub random_init: bool,
    /// Seed of initial weights and probes; by default the run's own.
    pub seed: Option<u64>,
}

/// A model with frozen weights.
pub struct LoadedModel {
    pub model: SavedModel,
    /// Number of training steps.
    pub step: u64,
    pub seed: u64,
}

impl ModelSource {
    /// Loads the model.
    pub fn load(&self, device: Device) -> Result<LoadedModel> {
        let loaded = load_from_url(&self.checkpoint)?;
        let mut model = load_model(&loaded, device)?;
        let seed = self.seed.unwrap_or(model.config.train.seed);
        if !self.random_init {
            return Ok(LoadedModel { model, step: loaded.manifest.step, seed });
        }
        model.flat = FlatParams::new(model.method.model().params(), seed, Kind::Float, device)?;
        let initial = Buffers::new(&model.method.buffers(), seed, device);
        for (index, spec) in initial.specs.iter().enumerate() {
            // A palette is learned from the data, not by training.
            if spec.init != Init::FromData {
                model.buffers.set(index, initial.value(index));
            }
        }
        Ok(LoadedModel { model, step: 0, seed })
    }

    /// Returns "pretrained" or "random".
    pub fn weights_label(&self) -> &'static str {
        if self.random_init { "random" } else { "pretrained" }
    }
}
