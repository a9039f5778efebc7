//! The model to evaluate: a run's checkpoint, or the same model with its initial weights.

use crate::checkpoint::load_from_url;
use crate::checkpoint::weights::{SavedModel, load_model};
use crate::config::Config;
use crate::error::Result;
use crate::method::Method;
use crate::optim::flat::FlatParams;
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
    pub config: Config,
    pub method: Box<dyn Method>,
    pub flat: FlatParams,
    /// Number of training steps.
    pub step: u64,
    pub seed: u64,
}

impl ModelSource {
    /// Loads the model.
    pub fn load(&self, device: Device) -> Result<LoadedModel> {
        let loaded = load_from_url(&self.checkpoint)?;
        let SavedModel { config, method, flat } = load_model(&loaded, device)?;
        let seed = self.seed.unwrap_or(config.train.seed);
        if self.random_init {
            let flat = FlatParams::new(method.model().params(), seed, Kind::Float, device)?;
            return Ok(LoadedModel { config, method, flat, step: 0, seed });
        }
        Ok(LoadedModel { config, method, flat, step: loaded.manifest.step, seed })
    }

    /// Returns "pretrained" or "random".
    pub fn weights_label(&self) -> &'static str {
        if self.random_init { "random" } else { "pretrained" }
    }
}
