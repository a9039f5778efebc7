//! What a timed step is fed: the config's data where it can be opened, else noise.

use crate::config::Config;
use crate::data::medium::Medium;
use crate::data::order;
use crate::device::World;
use crate::fault::{Fault, Result};
use crate::feed::{Feed, Rows};
use crate::method::Method;
use crate::op::shuffle::Origin;
use crate::part::encoder::text;
use crate::run::open;
use crate::run::pace::Share;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// How long data that may not be there are waited for.
const PATIENCE_S: f64 = 5.0;

pub enum Input {
    Data(Feed),
    /// This rank's rows in the element of the config's samples; on a GPU in pinned memory.
    Noise(Noise),
}

/// Samples that stay the same: pixels, and captions where the method reads some.
#[derive(Debug)]
pub struct Noise {
    pixels: Tensor,
    text: Option<Tensor>,
}

/// This rank's rows of one step.
pub enum Given {
    Rows(Rows),
    Noise(Noise, u64),
}

impl Input {
    /// The config's data, or noise and why.
    pub fn open(config: &Config, world: &dyn World, method: &dyn Method) -> Result<(Input, Option<String>)> {
        match data(config, world, method) {
            Ok(feed) => Ok((Input::Data(feed), None)),
            Err(fault) => Ok((Input::noise(config, world, method)?, Some(fault.message))),
        }
    }

    pub fn noise(config: &Config, world: &dyn World, method: &dyn Method) -> Result<Input> {
        let rows = order::rows(config.train.global_batch, world.rank(), world.size());
        let [c, t, y, x] = config.view.on(world.device()).shape(method.grid());
        let shape = [(rows.end - rows.start) as i64, c, t, y, x];
        let pixels = match config.view.medium() {
            Medium::Picture => Tensor::f_randint(256, shape, (Kind::Uint8, Device::Cpu))?,
            Medium::Sound => Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?,
        };
        let device = world.device();
        let ids = |text: &text::Config| {
            Tensor::f_randint(text.vocabulary, [shape[0], text.length], (Kind::Int64, Device::Cpu))
        };
        let text = config.method.text().map(ids).transpose()?;
        let here = |tensor: Tensor| if device.is_cuda() { tensor.f_pin_memory(device) } else { Ok(tensor) };
        Ok(Input::Noise(Noise { pixels: here(pixels)?, text: text.map(here).transpose()? }))
    }

    /// The rows of step `step`, and for how long they were waited for.
    pub fn next(&mut self, step: u64) -> Result<(Given, Duration)> {
        match self {
            Input::Data(feed) => {
                let rows = feed.next().unwrap_or_else(|| Err(Fault::failed("the feed ended early")))?;
                let waited = rows.waited;
                Ok((Given::Rows(rows), waited))
            }
            Input::Noise(Noise { pixels, text }) => {
                let noise = Noise { pixels: pixels.shallow_clone(), text: text.as_ref().map(Tensor::shallow_clone) };
                Ok((Given::Noise(noise, step), Duration::ZERO))
            }
        }
    }
}

impl Given {
    /// Bytes of pixels and captions.
    pub fn bytes(&self) -> usize {
        let (pixels, text) = self.tensors();
        let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        bytes(pixels) + text.map_or(0, bytes)
    }

    fn tensors(&self) -> (&Tensor, Option<&Tensor>) {
        match self {
            Given::Rows(rows) => (&rows.pixels, rows.text.as_ref()),
            Given::Noise(noise, _) => (&noise.pixels, noise.text.as_ref()),
        }
    }

    /// This rank's share of the step.
    pub fn share(&self, config: &Config) -> Share {
        let (pixels, text) = self.tensors();
        let rows = pixels.size()[0] as usize;
        Share {
            pixels: pixels.shallow_clone(),
            text: text.map(Tensor::shallow_clone),
            valid: match self {
                Given::Rows(rows) => Some(rows.valid.clone()),
                Given::Noise(..) => None,
            },
            origins: self.origins(),
            seed: config.train.seed,
            micro: config.train.micro_batch.map_or(rows, |most| most as usize),
        }
    }

    fn origins(&self) -> Vec<Origin> {
        match self {
            Given::Rows(rows) => rows.origins(),
            Given::Noise(noise, step) => {
                (0..noise.pixels.size()[0] as u64).map(|id| Origin { id, epoch: step % 1000, repeat: 0 }).collect()
            }
        }
    }
}

fn data(config: &Config, world: &dyn World, method: &dyn Method) -> Result<Feed> {
    let mut config = config.clone();
    config.data.patience_s = config.data.patience_s.min(PATIENCE_S);
    let set = open::training_set(&config)?;
    let source = open::source(&config, set.clone(), open::tokenizer(&config)?, world, *method.grid())?;
    let order = open::order(&config, &set)?;
    Feed::train(source, order, config.train.global_batch, world.rank(), world.size(), 0..u64::MAX >> 8)
}
