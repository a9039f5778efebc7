//! The input of timed steps: the config's data where they can be opened, otherwise random samples.

use crate::config::Config;
use crate::data::modality::Modality;
use crate::data::order;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::loader::{DataLoader, LoadedRows};
use crate::method::Method;
use crate::op::shuffle::SampleKey;
use crate::part::batch::Side;
use crate::part::encoder::text;
use crate::setup;
use crate::train::step_mode::LocalBatch;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Maximum number of seconds to wait for a store before random samples are used instead.
const MAX_STORE_TIMEOUT_S: f64 = 5.0;

/// Source of the batches of timed steps.
pub enum BenchInput {
    /// The config's data set.
    Data(DataLoader),
    /// Random samples of this rank, with the dtype of the config's samples; in pinned memory for a GPU.
    Noise(Noise),
}

/// Random samples, the same at every step: pixels, and whatever else the method requires.
#[derive(Debug)]
pub struct Noise {
    pixels: Tensor,
    side: Side,
}

/// This rank's rows of one step.
pub enum BenchBatch {
    /// Rows of the data set.
    Rows(LoadedRows),
    /// Random samples, and the number of the step.
    Noise(Noise, u64),
}

impl BenchInput {
    /// Opens the config's data. Where that fails, returns random samples and the reason.
    pub fn open(config: &Config, world: &dyn World, method: &dyn Method) -> Result<(BenchInput, Option<String>)> {
        match open_loader(config, world, method) {
            Ok(loader) => Ok((BenchInput::Data(loader), None)),
            Err(error) => Ok((BenchInput::with_noise(config, world, method)?, Some(error.message))),
        }
    }

    /// Draws random samples of the shape and dtype of the config's samples.
    pub fn with_noise(config: &Config, world: &dyn World, method: &dyn Method) -> Result<BenchInput> {
        let device = world.device();
        let rows = order::rank_rows(config.train.global_batch, world.rank(), world.size());
        let rows = (rows.end - rows.start) as i64;
        let [c, t, y, x] = config.view.for_device(device).shape(&method.model().patchify().grid);
        let shape = [rows, c, t, y, x];
        let pixels = match config.view.modality() {
            Modality::Image => Tensor::f_randint(256, shape, (Kind::Uint8, Device::Cpu))?,
            Modality::Audio => Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?,
        };
        let random_ids = |text: &text::Config| {
            Tensor::f_randint(text.vocab_size, [rows, text.context_length], (Kind::Int64, Device::Cpu))
        };
        let random_labels = |classes: i64| Tensor::f_randint(classes, [rows], (Kind::Int64, Device::Cpu));
        let requirements = config.method.requirements();
        let side = Side {
            captions: requirements.captions.map(random_ids).transpose()?,
            labels: requirements.classes.map(random_labels).transpose()?,
            valid: None,
        };
        if !device.is_cuda() {
            return Ok(BenchInput::Noise(Noise { pixels, side }));
        }
        let pixels = pixels.f_pin_memory(device)?;
        let side = side.map(|tensor| Ok(tensor.f_pin_memory(device)?))?;
        Ok(BenchInput::Noise(Noise { pixels, side }))
    }

    /// Returns the rows of step `step` and the time that the caller waited for them.
    pub fn next(&mut self, step: u64) -> Result<(BenchBatch, Duration)> {
        match self {
            BenchInput::Data(loader) => {
                let rows = loader.next().unwrap_or_else(|| Err(Error::failed("the data loader ended early")))?;
                let wait_time = rows.wait_time;
                Ok((BenchBatch::Rows(rows), wait_time))
            }
            BenchInput::Noise(Noise { pixels, side }) => {
                let noise = Noise { pixels: pixels.shallow_clone(), side: share(side)? };
                Ok((BenchBatch::Noise(noise, step), Duration::ZERO))
            }
        }
    }
}

impl BenchBatch {
    /// Returns the bytes of pixels and captions.
    pub fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        bytes(self.pixels()) + self.side().captions.as_ref().map_or(0, bytes)
    }

    fn pixels(&self) -> &Tensor {
        match self {
            BenchBatch::Rows(rows) => &rows.pixels,
            BenchBatch::Noise(noise, _) => &noise.pixels,
        }
    }

    fn side(&self) -> &Side {
        match self {
            BenchBatch::Rows(rows) => &rows.side,
            BenchBatch::Noise(noise, _) => &noise.side,
        }
    }

    /// Converts to the batch that a step takes, without copying.
    pub fn local_batch(&self, config: &Config) -> Result<LocalBatch> {
        let pixels = self.pixels().shallow_clone();
        let rows = pixels.size()[0] as usize;
        Ok(LocalBatch {
            views: vec![pixels],
            keys: self.keys(),
            side: share(self.side())?,
            seed: config.train.seed,
            micro_batch: config.train.micro_batch.map_or(rows, |size| size as usize),
        })
    }

    fn keys(&self) -> Vec<SampleKey> {
        match self {
            BenchBatch::Rows(rows) => rows.keys(),
            BenchBatch::Noise(noise, step) => {
                (0..noise.pixels.size()[0] as u64).map(|id| SampleKey { id, epoch: step % 1000, repeat: 0 }).collect()
            }
        }
    }
}

/// Returns the same tensors, without copying.
fn share(side: &Side) -> Result<Side> {
    side.map(|tensor| Ok(tensor.shallow_clone()))
}

fn open_loader(config: &Config, world: &dyn World, method: &dyn Method) -> Result<DataLoader> {
    let mut config = config.clone();
    config.data.store_timeout_s = config.data.store_timeout_s.min(MAX_STORE_TIMEOUT_S);
    let set = setup::open_training_set(&config)?;
    let grid = method.model().patchify().grid;
    let options = setup::loader_options(&config, set.clone(), setup::open_tokenizer(&config)?, world, grid)?;
    let order = setup::sample_order(&config, &set)?;
    DataLoader::for_training(options, order, config.train.global_batch, world.rank(), world.size(), 0..u64::MAX >> 8)
}
