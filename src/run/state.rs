//! What a training leaves in a checkpoint, and back.

use super::checkpoint::{Loaded, Named, Snapshot, required_bytes};
use super::step::Stepper;
use crate::bridge::bytes;
use crate::config::{Config, differences};
use crate::device::{Channel, World};
use crate::fault::{Fault, Result};
use crate::method::Method;
use crate::optim::flat::Flat;
use safetensors::Dtype;
use serde_json::json;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// The buffers that make a training: name in the checkpoint, and the flat buffer of what this rank keeps.
fn buffers(stepper: &Stepper) -> Vec<(&'static str, &Tensor)> {
    let flat = &stepper.flat;
    let mut all = vec![("weight", &flat.master), ("first", &flat.first), ("second", &flat.second)];
    all.extend(stepper.updater.average.as_ref().map(|average| ("average", average)));
    all
}

/// Bytes of one checkpoint, as the saver will ask for them.
pub fn bytes_needed(flat: &Flat, average: bool) -> u64 {
    let buffers = 3 + usize::from(average);
    let each = (0..buffers).flat_map(|_| flat.specs.iter().map(|spec| 4 * spec.numel() as u64));
    required_bytes(each.chain([4 * flat.specs.len() as u64]))
}

/// Everything that a resumed run needs, copied while nothing moves: on rank 0, from all ranks. The same whatever ranks
/// there are and whatever each keeps; collective where the optimizer is sharded.
pub fn snapshot(stepper: &Stepper, step: u64, config: &Config, world: &dyn World) -> Result<Option<Snapshot>> {
    let (flat, writes) = (&stepper.flat, world.rank() == 0);
    if !writes && flat.shards.is_none() {
        return Ok(None);
    }
    let mut tensors = vec![named("steps".into(), &flat.steps)];
    for (name, buffer) in buffers(stepper) {
        stepper.buckets.whole(flat, buffer, stepper.deadline, |index, whole| {
            if writes {
                tensors.push(named(format!("{name}.{}", flat.specs[index].name), whole));
            }
            Ok(())
        })?;
    }
    Ok(writes.then(|| Snapshot {
        step,
        samples: step * config.train.global_batch,
        world: world.size(),
        meta: json!({"config": config.resolved(), "program": env!("CARGO_PKG_VERSION")}),
        tensors,
    }))
}

/// The checkpoint of step 0 that other people's weights become: weights alone, and where they came from. `fresh` names
/// the tensors that were drawn because the file did not have them.
pub fn imported(flat: &Flat, config: &Config, format: &str, file: &str, fresh: &[&str]) -> Snapshot {
    let tensors = flat.specs.iter().enumerate();
    Snapshot {
        step: 0,
        samples: 0,
        world: 1,
        meta: json!({
            "config": config.resolved(),
            "program": env!("CARGO_PKG_VERSION"),
            "imported": {"format": format, "file": file, "fresh": fresh},
        }),
        tensors: tensors.map(|(i, spec)| named(format!("weight.{}", spec.name), &flat.part(&flat.master, i))).collect(),
    }
}

/// The weights of a training's checkpoint, as if they had been imported: the moving average where it kept one.
pub fn weights_alone(mut loaded: Loaded) -> Loaded {
    loaded.manifest.step = 0;
    if let Some(meta) = loaded.manifest.meta.as_object_mut() {
        meta.insert("imported".into(), json!({"format": "checkpoint"}));
    }
    loaded
}

/// Whether a checkpoint holds weights alone, with no training behind them that could go on.
fn is_imported(loaded: &Loaded) -> bool {
    loaded.manifest.meta.get("imported").is_some()
}

fn named(name: String, tensor: &Tensor) -> Named {
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let shape = tensor.size().iter().map(|&size| size as usize).collect();
    Named { name, dtype: Dtype::F32, shape, bytes: bytes(&tensor).to_vec() }
}

/// Brings rank 0's checkpoint, if there is one, into the buffers of a fresh training on all ranks, tensor by tensor; each
/// keeps what is its own. Imported weights, and those of `--init`, begin one: no moment, no step. Collective; returns the
/// first step.
pub fn begin(stepper: &mut Stepper, loaded: Option<&Loaded>, channel: &mut dyn Channel) -> Result<u64> {
    let told = [
        loaded.map_or(0, |loaded| loaded.manifest.step as i64),
        i64::from(loaded.is_some()),
        i64::from(loaded.is_some_and(is_imported)),
    ];
    let told = channel.broadcast(&Tensor::from_slice(&told), 0).wait(stepper.deadline)?;
    let [first, there, imported] = [0, 1, 2].map(|at| told.int64_value(&[at]));
    if there == 0 {
        return Ok(first as u64);
    }
    let flat = &stepper.flat;
    // Only rank 0 reads a name.
    let name = loaded.filter(|_| imported == 1).map_or("weight", best);
    receive(stepper, name, loaded, channel, |index, whole| flat.begin(index, whole))?;
    if imported == 1 {
        stepper.updater.average.iter_mut().for_each(|average| average.copy_(&stepper.flat.master));
    } else {
        let n = stepper.flat.specs.len() as i64;
        let mut steps = stepper.flat.steps.shallow_clone();
        steps.copy_(&from_rank_0("steps", &[n], steps.device(), loaded, channel, stepper.deadline)?);
        for (name, buffer) in buffers(stepper).into_iter().filter(|(name, _)| *name != "weight") {
            receive(stepper, name, loaded, channel, |index, whole| flat.keep(buffer, index, whole))?;
        }
    }
    stepper.flat.refresh();
    Ok(first as u64)
}

/// Calls `with` for every tensor of a buffer of rank 0's checkpoint, on every rank.
fn receive(
    stepper: &Stepper,
    name: &str,
    loaded: Option<&Loaded>,
    channel: &mut dyn Channel,
    with: impl Fn(usize, &Tensor),
) -> Result<()> {
    let (flat, device) = (&stepper.flat, stepper.flat.master.device());
    for (index, spec) in flat.specs.iter().enumerate() {
        let name = format!("{name}.{}", spec.name);
        with(index, &from_rank_0(&name, &spec.shape, device, loaded, channel, stepper.deadline)?);
    }
    Ok(())
}

/// One tensor of rank 0's checkpoint, on every rank.
fn from_rank_0(
    name: &str,
    shape: &[i64],
    device: Device,
    loaded: Option<&Loaded>,
    channel: &mut dyn Channel,
    deadline: Duration,
) -> Result<Tensor> {
    let own = match loaded {
        Some(loaded) => tensor(loaded, name, shape)?.to_device(device),
        None => Tensor::empty(shape, (Kind::Float, device)),
    };
    channel.broadcast(&own, 0).wait(deadline)
}

/// The weights to evaluate with, into `flat`: the moving average where the run kept one.
pub fn weights(flat: &mut Flat, loaded: &Loaded) -> Result<()> {
    fill(flat, &flat.master, loaded, best(loaded))?;
    flat.refresh();
    Ok(())
}

/// The weights of a checkpoint that count: their moving average where it has one.
fn best(loaded: &Loaded) -> &'static str {
    let averaged = loaded.tensors.keys().any(|name| name.starts_with("average."));
    if averaged { "average" } else { "weight" }
}

fn fill(flat: &Flat, buffer: &Tensor, loaded: &Loaded, name: &str) -> Result<()> {
    for (index, spec) in flat.specs.iter().enumerate() {
        flat.part(buffer, index).copy_(&tensor(loaded, &format!("{name}.{}", spec.name), &spec.shape)?);
    }
    Ok(())
}

fn tensor(loaded: &Loaded, name: &str, shape: &[i64]) -> Result<Tensor> {
    let other = |what: String| {
        Fault::usage(format!("the checkpoint is of another model: {what}. Give the config that it was trained with."))
    };
    let found = loaded.tensors.get(name).ok_or_else(|| other(format!("it has no tensor {name}")))?;
    if found.dtype != Dtype::F32 || found.shape.iter().map(|&size| size as i64).ne(shape.iter().copied()) {
        return Err(other(format!("{name} is {:?} {:?} there and F32 {shape:?} here", found.dtype, found.shape)));
    }
    Ok(Tensor::f_from_data_size(&found.bytes, shape, Kind::Float)?)
}

/// The config that a checkpoint was written with.
pub fn config(loaded: &Loaded) -> Result<Config> {
    let value = loaded.manifest.meta.get("config").cloned().unwrap_or_default();
    Config::parse(&value.to_string(), &[]).map_err(|fault| fault.at("the config in the checkpoint"))
}

/// Refuses to go on with other numbers than the run began with, naming them. Imported weights have no run behind them:
/// only what gives them their meaning must stay.
pub fn same(config: &Config, loaded: &Loaded) -> Result<()> {
    let before = self::config(loaded)?;
    let imported = is_imported(loaded);
    let mut changed = differences(&before.identity(), &config.identity());
    changed.retain(|(path, ..)| !imported || path.starts_with("input.") || path.starts_with("method."));
    if changed.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        changed.iter().map(|(path, was, is)| format!("  {path} was {was} and is now {is}")).collect();
    if imported {
        return Err(Fault::usage(format!(
            "the weights were imported for another model:\n{}\nGive the values that they were imported with, or import \
             them again with this config.",
            lines.join("\n")
        )));
    }
    Err(Fault::usage(format!(
        "the run was begun with another config:\n{}\nGive the old values, another --run, or --resume never into an empty \
         run.",
        lines.join("\n")
    )))
}

/// The model of a checkpoint with its weights, for reading only.
pub fn model(loaded: &Loaded, device: Device) -> Result<(Config, Box<dyn Method>, Flat)> {
    let config = config(loaded)?;
    let method = config.method.build(&config.input)?;
    let mut flat = Flat::new(method.table(), config.train.seed, Kind::Float, device)?;
    weights(&mut flat, loaded)?;
    Ok((config, method, flat))
}
