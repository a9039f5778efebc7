//! A whole step on disk, so that any other implementation can be asked the same question.
//!
//! `dump/step-NNNNNNNN-rank-R.safetensors` under the run: weights (fp32 masters before the step) and gradients (the
//! mean over the global batch, before clipping) under the official repository's names; the input as the model receives
//! it; the mask; captions (`text`), labels, further views (`input.1`, ..), the teacher, buffers and scheduled values
//! where there are any; the losses and the optimizer's numbers. Micro-batches are concatenated along B. Every rank
//! writes its own file, all in the same step: where the optimizer is sharded, weights and gradients are gathered. Where
//! samples differ in length, rows of `keep`, `drop` and `restore` are padded with −1.

use super::{outcome::Outcome, step::Stepper};
use crate::error::{Error, Result};
use crate::interop::to_official;
use crate::method::Batch;
use crate::part::mask::Mask;
use std::path::Path;
use tch::Tensor;

/// Values that are written beside the state of the stepper.
pub struct StepDump<'a> {
    pub step: u64,
    pub rank: usize,
    pub method: &'a str,
    pub micro_batches: &'a [Batch],
    pub outcome: &'a Outcome,
    pub lr: f64,
    pub weight_decay: f64,
}

type Named = Vec<(String, Tensor)>;

/// Writes a step into the folder of a run, between its reduction and its update; collective.
///
/// # Errors
/// ExitCode::Disk if the file cannot be written.
pub fn write_step(run: &Path, stepper: &Stepper, dump: &StepDump) -> Result<()> {
    let mut tensors = state(stepper, dump.method)?;
    tensors.extend(samples(stepper, dump.micro_batches)?);
    let numbers = [
        ("loss", dump.outcome.loss),
        ("loss_local", dump.outcome.local_loss),
        ("lr", dump.lr),
        ("weight_decay", dump.weight_decay),
        ("clip_scale", dump.outcome.clip_scale),
    ];
    tensors.extend(numbers.map(|(name, value)| (name.to_string(), Tensor::from_slice(&[value]))));

    let folder = run.join("dump");
    std::fs::create_dir_all(&folder).map_err(|error| Error::disk(folder.display(), error))?;
    let path = folder.join(format!("step-{:08}-rank-{}.safetensors", dump.step, dump.rank));
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.contiguous())).collect();
    Ok(Tensor::write_safetensors(&tensors, &path)?)
}

/// Weights, gradients, teacher, buffers and scheduled values.
fn state(stepper: &Stepper, method: &str) -> Result<Named> {
    let flat = &stepper.flat;
    let grid = &stepper.method.model().patchify().grid;
    let mut tensors = Named::new();
    let mut sources = vec![("weight", &flat.master), ("grad", &flat.reduced_grad)];
    sources.extend(stepper.teacher.as_ref().map(|teacher| ("teacher", &teacher.average)));
    for (prefix, buffer) in sources {
        stepper.buckets.for_each_full(flat, buffer, stepper.timeout, |index, full| {
            let is_absent = prefix == "teacher" && stepper.teacher.as_ref().is_some_and(|t| !t.members[index]);
            if !is_absent {
                let (name, tensor) = to_official(method, &flat.specs[index].name, full, grid);
                tensors.push((format!("{prefix}.{name}"), tensor));
            }
            Ok(())
        })?;
    }
    tensors.extend(stepper.buffers.iter().map(|(name, value)| (format!("buffer.{name}"), value.shallow_clone())));
    let scheduled = stepper.controls.scheduled();
    if scheduled.numel() > 0 {
        tensors.push(("scheduled".into(), scheduled));
    }
    Ok(tensors)
}

/// Inputs, masks, and what goes along with the samples.
fn samples(stepper: &Stepper, micro_batches: &[Batch]) -> Result<Named> {
    if micro_batches.is_empty() {
        return Ok(vec![("sample_id".into(), Tensor::from_slice::<i64>(&[]))]);
    }
    let method = stepper.method.as_ref();
    let patchify = method.model().patchify();
    let batches = micro_batches.iter().map(|batch| batch.with_spectrograms(stepper.log_mel.as_ref()));
    let batches: Vec<Batch> = batches.collect::<Result<_>>()?;
    let join = |parts: Vec<Tensor>| Tensor::cat(&parts, 0);
    let mut tensors = Named::new();
    for view in 0..batches[0].views.len() {
        let name = if view == 0 { "input".to_string() } else { format!("input.{view}") };
        let parts = batches.iter().map(|batch| patchify.normalize(&batch.views[view]));
        tensors.push((name, join(parts.collect::<Result<_>>()?)));
    }
    let side = |name: &str, field: fn(&Batch) -> Option<&Tensor>| {
        let parts: Vec<Tensor> = batches.iter().filter_map(|batch| Some(field(batch)?.shallow_clone())).collect();
        (!parts.is_empty()).then(|| (name.to_string(), join(parts)))
    };
    tensors.extend(side("text", |batch| batch.side.captions.as_ref()));
    tensors.extend(side("label", |batch| batch.side.labels.as_ref()));
    if let Some(policy) = method.mask() {
        let masks = batches.iter().map(|batch| {
            let grid = patchify.grid_of(batch.view());
            Mask::sample_padded(policy, &stepper.context(), &grid, &patchify.groups(batch)?)
        });
        let masks: Vec<Mask> = masks.collect::<Result<_>>()?;
        tensors.push(("keep".into(), join(masks.iter().map(|mask| mask.keep.shallow_clone()).collect())));
        tensors.push(("drop".into(), join(masks.iter().map(|mask| mask.drop.shallow_clone()).collect())));
        tensors.push(("restore".into(), join(masks.iter().map(Mask::restore).collect())));
    }
    tensors.push(("sample_id".into(), join(batches.iter().map(|batch| batch.keys.get(0)).collect())));
    Ok(tensors)
}
