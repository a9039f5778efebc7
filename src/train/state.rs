//! The state of a training as tensors of a checkpoint, and back.

use super::step::Stepper;
use crate::checkpoint::weights::{checked_tensor, eval_weights_prefix, is_imported, to_named_tensor};
use crate::checkpoint::{LoadedCheckpoint, NamedTensor, Snapshot, required_bytes};
use crate::config::Config;
use crate::dist::{Channel, World};
use crate::error::Result;
use crate::part::buffers::Buffers;
use crate::part::params::{Init, ParamSpec};
use serde_json::json;
use std::time::Duration;
use tch::{Device, Kind, Tensor, no_grad};

/// The sharded buffers of a training: their prefix in a checkpoint, and this rank's shard.
fn sharded_buffers(stepper: &Stepper) -> Vec<(&'static str, &Tensor)> {
    let flat = &stepper.flat;
    let mut all = vec![("weight", &flat.master), ("exp_avg", &flat.exp_avg), ("exp_avg_sq", &flat.exp_avg_sq)];
    all.extend(stepper.updater.ema.as_ref().map(|ema| ("ema", ema)));
    all.extend(stepper.teacher.as_ref().map(|teacher| ("teacher", &teacher.average)));
    all
}

/// Returns whether a checkpoint holds a parameter under this prefix: a teacher has some of them only.
fn is_saved(stepper: &Stepper, prefix: &str, index: usize) -> bool {
    prefix != "teacher" || stepper.teacher.as_ref().is_some_and(|teacher| teacher.members[index])
}

/// Returns the bytes of one checkpoint, as the saver will ask for them.
pub fn checkpoint_bytes(stepper: &Stepper) -> u64 {
    let specs = &stepper.flat.specs;
    let mut sizes = vec![4 * specs.len() as u64];
    for (prefix, _) in sharded_buffers(stepper) {
        let saved = specs.iter().enumerate().filter(|(index, _)| is_saved(stepper, prefix, *index));
        sizes.extend(saved.map(|(_, spec)| 4 * spec.numel() as u64));
    }
    sizes.extend(stepper.buffers.iter().map(|(_, value)| 4 * value.numel() as u64));
    required_bytes(sizes)
}

/// Copies everything that a resumed run needs while nothing moves: on rank 0, from all ranks. The same whatever the
/// number of ranks and sharding; collective where the optimizer is sharded.
pub fn take_snapshot(stepper: &Stepper, step: u64, config: &Config, world: &dyn World) -> Result<Option<Snapshot>> {
    Ok(snapshot_tensors(stepper, world)?.map(|tensors| Snapshot {
        step,
        samples: step * config.train.global_batch,
        world: world.size(),
        meta: json!({"config": config.to_json(), "program": env!("CARGO_PKG_VERSION")}),
        tensors,
    }))
}

/// Returns the tensors of a snapshot, on rank 0.
pub fn snapshot_tensors(stepper: &Stepper, world: &dyn World) -> Result<Option<Vec<NamedTensor>>> {
    let flat = &stepper.flat;
    let writes = world.rank() == 0;
    if !writes && flat.sharding.is_none() {
        return Ok(None);
    }
    let mut tensors = vec![to_named_tensor("steps".into(), &flat.steps)];
    for (prefix, buffer) in sharded_buffers(stepper) {
        stepper.buckets.for_each_full(flat, buffer, stepper.timeout, |index, full| {
            if writes && is_saved(stepper, prefix, index) {
                tensors.push(to_named_tensor(format!("{prefix}.{}", flat.specs[index].name), full));
            }
            Ok(())
        })?;
    }
    tensors.extend(stepper.buffers.iter().map(|(name, value)| to_named_tensor(format!("buffer.{name}"), value)));
    Ok(writes.then_some(tensors))
}

/// Brings rank 0's checkpoint, if there is one, into a fresh training on all ranks, tensor by tensor; each rank keeps
/// its shard. Imported weights, and those of `--init`, begin a training: no moment, no step, a teacher that is a copy,
/// fresh buffers but those learned from data. Collective; returns the first step, none if there is no checkpoint.
pub fn restore(
    stepper: &mut Stepper,
    loaded: Option<&LoadedCheckpoint>,
    channel: &mut dyn Channel,
) -> Result<Option<u64>> {
    let message = [
        loaded.map_or(0, |loaded| loaded.manifest.step as i64),
        i64::from(loaded.is_some()),
        i64::from(loaded.is_some_and(is_imported)),
    ];
    let message = channel.broadcast(&Tensor::from_slice(&message), 0).wait(stepper.timeout)?;
    let [first_step, is_there, is_import] = [0, 1, 2].map(|index| message.int64_value(&[index]));
    if is_there == 0 {
        return Ok(None);
    }
    let mut source = Source { loaded, channel, timeout: stepper.timeout };
    // Only rank 0 reads a prefix.
    let prefix = loaded.filter(|_| is_import == 1).map_or("weight", eval_weights_prefix);
    for (index, spec) in stepper.flat.specs.iter().enumerate() {
        let full = source.tensor(&format!("{prefix}.{}", spec.name), &spec.shape, stepper.flat.master.device())?;
        stepper.flat.set_param(index, &full);
    }
    if is_import == 1 {
        no_grad(|| {
            stepper.updater.ema.iter_mut().for_each(|ema| ema.copy_(&stepper.flat.master));
            stepper.teacher.iter_mut().for_each(|teacher| teacher.average.copy_(&stepper.flat.master));
        });
        restore_buffers(&stepper.buffers, &mut source, |spec| spec.init == Init::FromData)?;
    } else {
        restore_training(stepper, &mut source)?;
    }
    stepper.flat.sync_compute_weights();
    if let Some(teacher) = &stepper.teacher {
        teacher.sync_weights(&stepper.flat, &stepper.buckets, stepper.timeout)?;
    }
    Ok(Some(first_step as u64))
}

/// Moments, moving average, teacher, buffers and counts of updates.
fn restore_training(stepper: &mut Stepper, source: &mut Source) -> Result<()> {
    let flat = &stepper.flat;
    let device = flat.master.device();
    flat.steps.shallow_clone().copy_(&source.tensor("steps", &[flat.specs.len() as i64], device)?);
    for (prefix, buffer) in sharded_buffers(stepper).into_iter().filter(|(prefix, _)| *prefix != "weight") {
        for (index, spec) in flat.specs.iter().enumerate().filter(|(index, _)| is_saved(stepper, prefix, *index)) {
            let full = source.tensor(&format!("{prefix}.{}", spec.name), &spec.shape, device)?;
            flat.copy_shard(buffer, index, &full);
        }
    }
    restore_buffers(&stepper.buffers, source, |_| true)
}

/// The buffers that are chosen by their declaration.
fn restore_buffers(buffers: &Buffers, source: &mut Source, is_chosen: impl Fn(&ParamSpec) -> bool) -> Result<()> {
    for (index, spec) in buffers.specs.iter().enumerate().filter(|(_, spec)| is_chosen(spec)) {
        let device = buffers.value(index).device();
        buffers.set(index, &source.tensor(&format!("buffer.{}", spec.name), &spec.shape, device)?);
    }
    Ok(())
}

/// Tensors of rank 0's checkpoint, for every rank.
struct Source<'a> {
    loaded: Option<&'a LoadedCheckpoint>,
    channel: &'a mut dyn Channel,
    timeout: Duration,
}

impl Source<'_> {
    fn tensor(&mut self, name: &str, shape: &[i64], device: Device) -> Result<Tensor> {
        let local = match self.loaded {
            Some(loaded) => checked_tensor(loaded, name, shape)?.to_device(device),
            None => Tensor::empty(shape, (Kind::Float, device)),
        };
        self.channel.broadcast(&local, 0).wait(self.timeout)
    }
}
