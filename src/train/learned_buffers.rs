//! Buffers that a method learns from the training set before the first step of a new training, such as a palette.

use super::step::Stepper;
use crate::config::Config;
use crate::data::index::to_hex;
use crate::dist::Channel;
use crate::error::{Error, Result};
use crate::loader::{DataLoader, LoaderOptions};
use crate::part::params::Init;
use crate::part::training_samples::{LearnedValues, TrainingSamples};
use crate::setup::sample_order;
use std::path::Path;
use tch::Tensor;

/// Learns on rank 0 and gives the result to all ranks; nothing where the method has no such buffer. Leaves the values
/// beside the run, in `folder`, as `<name>.json`. Collective.
///
/// # Errors
/// ExitCode::Usage if the training set does not have what the method needs.
pub fn learn(
    stepper: &Stepper,
    config: &Config,
    loader: &LoaderOptions,
    channel: &mut dyn Channel,
    folder: Option<&Path>,
) -> Result<()> {
    let buffers = &stepper.buffers;
    let specs = buffers.specs.iter().enumerate();
    let from_data: Vec<usize> = specs.filter(|(_, spec)| spec.init == Init::FromData).map(|(index, _)| index).collect();
    if from_data.is_empty() {
        return Ok(());
    }
    if let Some(folder) = folder {
        let batch = config.train.global_batch;
        let epoch = 0..loader.mixture.len().div_ceil(batch);
        let order = sample_order(config, &loader.mixture)?;
        let rows = DataLoader::for_training(loader.clone(), order, batch, 0, 1, epoch)?;
        let data_set = to_hex(&loader.mixture.digest());
        let mut samples = TrainingSamples {
            batches: &mut rows.map(|rows| Ok(rows?.pixels)),
            data_set: data_set.clone(),
            channels: config.input.channels,
            seed: config.train.seed,
        };
        for (buffer, value) in stepper.method.learn_buffers(&mut samples)? {
            buffers.set(buffer.index(), &value);
        }
        for &index in &from_data {
            write(folder, &data_set, &buffers.specs[index].name, buffers.value(index))?;
        }
    }
    for index in from_data {
        let value = channel.broadcast(buffers.value(index), 0).wait(stepper.timeout)?;
        buffers.set(index, &value);
    }
    Ok(())
}

fn write(folder: &Path, data_set: &str, name: &str, value: &Tensor) -> Result<()> {
    let values = Vec::<Vec<f32>>::try_from(value)?;
    let text =
        serde_json::to_string(&LearnedValues { data_set: data_set.to_owned(), values }).expect("numbers are JSON");
    let path = folder.join(format!("{name}.json"));
    std::fs::write(&path, text + "\n").map_err(|error| Error::disk(path.display(), error))
}
