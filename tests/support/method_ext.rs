//! Shorthand for what tests read of a method through its model, its mask policy and its capabilities.

use occlude::checkpoint::weights::SavedModel;
use occlude::config::Config;
use occlude::error::Result;
use occlude::grid::Grid;
use occlude::method::{Batch, Features, LossTerm, Method, Reconstruction, Step};
use occlude::optim::flat::FlatParams;
use occlude::part::buffers::Buffers;
use occlude::part::encoder::EncodeOptions;
use occlude::part::mask::{Mask, MaskPolicy};
use occlude::part::params::{ParamSpecs, Weights};
use tch::{Device, Kind, Tensor};

pub trait MethodExt: Method {
    fn grid(&self) -> Grid {
        self.model().patchify().grid
    }

    fn params(&self) -> &ParamSpecs {
        self.model().params()
    }

    fn normalize(&self, batch: &Batch) -> Result<Tensor> {
        self.model().patchify().normalize(batch.view())
    }

    fn encode(&self, w: &Weights, batch: &Batch) -> Result<Features> {
        let buffers = Buffers::new(&self.buffers(), 3, w.0[0].device());
        self.model().encode(&Step::with_buffers(w, &buffers), batch, EncodeOptions::default())
    }

    /// Computes the loss terms without a teacher and without other ranks.
    fn terms(&self, w: &Weights, batch: &Batch) -> Result<Vec<LossTerm>> {
        Ok(self.loss(&Step::with_weights(w), batch)?.terms)
    }

    /// Samples the mask of a batch, with -1 where a short sample has no token.
    fn sample_mask(&self, batch: &Batch) -> Mask {
        let patchify = self.model().patchify();
        let policy = self.mask().expect("a method that hides tokens");
        let weights = Weights::new(Vec::new());
        let groups = patchify.groups(batch).expect("groups");
        let grid = patchify.grid_of(batch.view());
        Mask::sample_padded(policy, &Step::with_weights(&weights), &grid, &groups).expect("a mask")
    }

    /// Draws the predictions for a batch under its own mask.
    fn draw(&self, w: &Weights, batch: &Batch) -> Result<Reconstruction> {
        let model = self.capabilities().reconstruct.expect("a method that reconstructs");
        model.reconstruct(&Step::with_weights(w), batch, self.mask().expect("a method that hides tokens"))
    }
}

impl<M: Method + ?Sized> MethodExt for M {}

/// Samples the mask of a policy for a batch on this grid.
pub fn sample(policy: &dyn MaskPolicy, grid: &Grid, batch: &Batch) -> Mask {
    let weights = Weights::new(Vec::new());
    policy.sample(&Step::with_weights(&weights), grid, batch).expect("a mask")
}

/// Returns a config's model with its initial weights.
pub fn untrained(config: Config) -> Result<SavedModel> {
    let method = config.method.build(&config.input)?;
    let flat = FlatParams::new(method.model().params(), 3, Kind::Float, Device::Cpu)?;
    let buffers = Buffers::new(&method.buffers(), 3, Device::Cpu);
    Ok(SavedModel { config, method, flat, buffers })
}
