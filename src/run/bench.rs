//! How long a step takes, on input made up on the spot.

use super::step::Stepper;
use crate::config::Config;
use crate::data::medium::Medium;
use crate::device::World;
use crate::fault::{Fault, Result};
use crate::method::Batch;
use crate::op::shuffle::Origin;
use crate::optim::{flat::Flat, update::Updater};
use serde_json::json;
use std::io::BufRead;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Tensor;

/// Steps of the config's model on this rank's share of a global batch of noise, in the element of its samples.
pub struct Bench {
    stepper: Stepper,
    pixels: Tensor,
    seed: u64,
    done: u64,
}

impl Bench {
    pub fn new(config: &Config, world: &Arc<dyn World>) -> Result<Bench> {
        let method = config.method.build(&config.input)?;
        let flat = Flat::new(method.table(), config.train.seed, config.train.dtype.kind(), world.device())?;
        let updater = Updater::new(&flat, &config.optim);
        let [c, t, y, x] = method.grid().pixels();
        let rows = (config.train.global_batch as usize / world.size()) as i64;
        let shape = [rows, c, t, y, x];
        let pixels = match config.view.medium() {
            Medium::Picture => Tensor::randint(256, shape, (tch::Kind::Uint8, world.device())),
            Medium::Sound => Tensor::randn(shape, (tch::Kind::Float, world.device())),
        };
        let bytes = (config.world.bucket_mb * 1e6) as usize;
        let stepper = Stepper::new(method, flat, updater, world.clone(), bytes, Duration::from_secs(600))?;
        Ok(Bench { stepper, pixels, seed: config.train.seed, done: 0 })
    }

    /// One whole step; its seconds.
    pub fn step(&mut self) -> Result<f64> {
        let rows = self.pixels.size()[0] as u64;
        let origins: Vec<Origin> = (0..rows).map(|id| Origin { id, epoch: self.done % 1000, repeat: 0 }).collect();
        let batch = Batch::new(self.pixels.shallow_clone(), &origins, self.seed);
        let began = Instant::now();
        self.stepper.step(&[batch], 1e-4, |_, _| Ok(()))?;
        self.done += 1;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// `steps` timed steps after three to warm up: median and quartiles, as one JSON line.
pub fn bench(config: &Config, world: &Arc<dyn World>, steps: usize) -> Result<()> {
    let mut bench = Bench::new(config, world)?;
    for _ in 0..3 {
        bench.step()?;
    }
    let mut seconds = (0..steps.max(1)).map(|_| bench.step()).collect::<Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share).round() as usize];
    if world.rank() == 0 {
        let median = at(0.5);
        let line = json!({
            "ms": median * 1e3, "ms_quartiles": [at(0.25) * 1e3, at(0.75) * 1e3], "steps": seconds.len(),
            "samples_per_s": config.train.global_batch as f64 / median,
            "parameters": bench.stepper.method.table().parameters(), "threads": tch::get_num_threads(),
        });
        println!("{line}");
    }
    Ok(())
}

/// One step for every line on standard input, its seconds on standard output: for a benchmark that takes turns with
/// another program.
pub fn by_turns(config: &Config, world: &Arc<dyn World>) -> Result<()> {
    let mut bench = Bench::new(config, world)?;
    for line in std::io::stdin().lock().lines() {
        line.map_err(|error| Fault::disk("standard input", error))?;
        println!("{:.6}", bench.step()?);
    }
    Ok(())
}
