//! Weights of a checkpoint: for reading, and as the start of another training.

use super::{LoadedCheckpoint, NamedTensor, Snapshot};
use crate::bridge::bytes;
use crate::config::{Config, differences};
use crate::error::{Error, Result};
use crate::method::Method;
use crate::optim::flat::FlatParams;
use crate::part::buffers::Buffers;
use safetensors::Dtype;
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// Makes the checkpoint of step 0 that imported weights become: weights alone, and where they came from. `initialized`
/// names the tensors that the file did not have.
pub fn import_snapshot(flat: &FlatParams, config: &Config, format: &str, file: &str, initialized: &[&str]) -> Snapshot {
    let tensors =
        flat.specs.iter().enumerate().map(|(index, spec)| {
            to_named_tensor(format!("weight.{}", spec.name), &flat.param_view(&flat.master, index))
        });
    Snapshot {
        step: 0,
        samples: 0,
        world: 1,
        meta: json!({
            "config": config.to_json(),
            "program": env!("CARGO_PKG_VERSION"),
            "imported": {"format": format, "file": file, "initialized": initialized},
        }),
        tensors: tensors.collect(),
    }
}

/// Turns a training's checkpoint into one of weights alone, as if they had been imported.
pub fn weights_only(mut loaded: LoadedCheckpoint) -> LoadedCheckpoint {
    loaded.manifest.step = 0;
    if let Some(meta) = loaded.manifest.meta.as_object_mut() {
        meta.insert("imported".into(), json!({"format": "checkpoint"}));
    }
    loaded
}

/// Returns whether a checkpoint holds weights alone, without the state of a training that could be resumed.
pub fn is_imported(loaded: &LoadedCheckpoint) -> bool {
    loaded.manifest.meta.get("imported").is_some()
}

/// Copies a tensor as it is written.
pub fn to_named_tensor(name: String, tensor: &Tensor) -> NamedTensor {
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let shape = tensor.size().iter().map(|&size| size as usize).collect();
    NamedTensor { name, dtype: Dtype::F32, shape, bytes: bytes(&tensor).to_vec() }
}

/// Returns the prefix of the weights to evaluate with: the moving average where the run kept one.
pub fn eval_weights_prefix(loaded: &LoadedCheckpoint) -> &'static str {
    let has_ema = loaded.tensors.keys().any(|name| name.starts_with("ema."));
    if has_ema { "ema" } else { "weight" }
}

/// Returns a tensor of a checkpoint, fp32 of this shape.
///
/// # Errors
/// ExitCode::Usage if it is missing or of another shape: the checkpoint is of another model.
pub fn checked_tensor(loaded: &LoadedCheckpoint, name: &str, shape: &[i64]) -> Result<Tensor> {
    let another_model = |what: String| {
        Error::usage(format!("the checkpoint is of another model: {what}. Give the config that it was trained with."))
    };
    let found = loaded.tensors.get(name).ok_or_else(|| another_model(format!("it has no tensor {name}")))?;
    let has_shape = found.shape.iter().map(|&size| size as i64).eq(shape.iter().copied());
    if found.dtype != Dtype::F32 || !has_shape {
        return Err(another_model(format!(
            "{name} is {:?} {:?} there and F32 {shape:?} here",
            found.dtype, found.shape
        )));
    }
    Ok(Tensor::f_from_data_size(&found.bytes, shape, Kind::Float)?)
}

/// Returns the config that a checkpoint was written with.
pub fn saved_config(loaded: &LoadedCheckpoint) -> Result<Config> {
    let value = loaded.manifest.meta.get("config").cloned().unwrap_or_default();
    Config::parse(&value.to_string(), &[]).map_err(|error| error.with_context("the config in the checkpoint"))
}

/// Checks that a run goes on with the values that it began with. For imported weights, which have no run behind them,
/// only what gives them their meaning must stay.
///
/// # Errors
/// ExitCode::Usage with every value that differs.
pub fn check_same_config(config: &Config, loaded: &LoadedCheckpoint) -> Result<()> {
    let before = saved_config(loaded)?;
    let is_import = is_imported(loaded);
    let mut changed = differences(&before.resume_identity(), &config.resume_identity());
    changed.retain(|(path, ..)| !is_import || path.starts_with("input.") || path.starts_with("method."));
    if changed.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        changed.iter().map(|(path, was, is)| format!("  {path} was {was} and is now {is}")).collect();
    if is_import {
        return Err(Error::usage(format!(
            "the weights were imported for another model:\n{}\nGive the values that they were imported with, or import \
             them again with this config.",
            lines.join("\n")
        )));
    }
    Err(Error::usage(format!(
        "the run was started with another config:\n{}\nGive the old values, another --run, or --resume never into an empty \
         run.",
        lines.join("\n")
    )))
}

/// A checkpoint's model, for reading only.
pub struct SavedModel {
    pub config: Config,
    pub method: Box<dyn Method>,
    pub flat: FlatParams,
    pub buffers: Buffers,
}

/// Loads the model of a checkpoint with the weights to evaluate with.
pub fn load_model(loaded: &LoadedCheckpoint, device: Device) -> Result<SavedModel> {
    let config = saved_config(loaded)?;
    let method = config.method.build(&config.input)?;
    let mut flat = FlatParams::new(method.model().params(), config.train.seed, Kind::Float, device)?;
    let prefix = eval_weights_prefix(loaded);
    for (index, spec) in flat.specs.iter().enumerate() {
        let value = checked_tensor(loaded, &format!("{prefix}.{}", spec.name), &spec.shape)?;
        flat.param_view(&flat.master, index).copy_(&value);
    }
    flat.sync_compute_weights();
    let buffers = Buffers::new(&method.buffers(), config.train.seed, device);
    for (index, spec) in buffers.specs.iter().enumerate() {
        let name = format!("buffer.{}", spec.name);
        // Imported weights have none.
        if loaded.tensors.contains_key(&name) {
            buffers.set(index, &checked_tensor(loaded, &name, &spec.shape)?);
        }
    }
    Ok(SavedModel { config, method, flat, buffers })
}
