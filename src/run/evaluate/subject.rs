//! Who is judged: a run's model, trained or as it began.

use crate::config::Config;
use crate::fault::Result;
use crate::method::Method;
use crate::optim::flat::Flat;
use crate::run::{checkpoint, state};
use tch::{Device, Kind};

#[derive(Clone, Debug)]
pub struct Subject {
    pub checkpoint: String,
    /// Judge the same model with the weights it began with instead of the trained ones.
    pub random: bool,
    /// The seed of those first weights, and of a probe; the run's own when left out.
    pub seed: Option<u64>,
}

/// Its model, with weights that stay as they are.
pub struct Opened {
    pub config: Config,
    pub method: Box<dyn Method>,
    pub flat: Flat,
    /// How many steps it was trained for.
    pub step: u64,
    pub seed: u64,
}

impl Subject {
    pub fn open(&self, device: Device) -> Result<Opened> {
        let loaded = checkpoint::open(&self.checkpoint)?;
        let (config, method, flat) = state::model(&loaded, device)?;
        let seed = self.seed.unwrap_or(config.train.seed);
        let (flat, step) = match self.random {
            true => (Flat::new(method.table(), seed, Kind::Float, device)?, 0),
            false => (flat, loaded.manifest.step),
        };
        Ok(Opened { config, method, flat, step, seed })
    }

    /// "pretrained" or "random".
    pub fn name(&self) -> &'static str {
        if self.random { "random" } else { "pretrained" }
    }
}
