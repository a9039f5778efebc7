//! A whole step on disk, so that any other implementation can be asked the same question.
//!
//! `dump/step-NNNNNNNN-rank-R.safetensors` under the run. Weights (fp32 masters before the step) and gradients (the mean
//! over the global batch, before clipping) under the official repository's names; the input as the model receives it;
//! the mask; the captions' ids (`text`) where there are any; the losses and the optimizer's numbers. Micro-batches are
//! joined along B. Every rank writes its own, all in the same step: where the optimizer is sharded, weights and gradients
//! are gathered. Where a sample has fewer tokens than others, since it does not fill the grid, its rows of `keep`, `drop`
//! and `restore` are filled up with −1.

use super::{exchange::official, step::Outcome, step::Stepper};
use crate::fault::{Fault, Result};
use crate::method::Batch;
use std::path::Path;
use tch::Tensor;

#[allow(clippy::too_many_arguments)] // A record of a step names everything that went into it.
pub fn write(
    folder: &Path,
    step: u64,
    rank: usize,
    stepper: &Stepper,
    micro: &[Batch],
    outcome: &Outcome,
    lr: f64,
    weight_decay: f64,
) -> Result<()> {
    let (flat, method) = (&stepper.flat, &stepper.method);
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (prefix, buffer) in [("weight", &flat.master), ("grad", &flat.summed)] {
        stepper.buckets.whole(flat, buffer, stepper.deadline, |index, whole| {
            let (name, tensor) = official(method.name(), &flat.specs[index].name, whole, method.grid());
            tensors.push((format!("{prefix}.{name}"), tensor));
            Ok(())
        })?;
    }
    if micro.is_empty() {
        tensors.push(("sample_id".into(), Tensor::from_slice::<i64>(&[])));
    } else {
        let micro: Vec<Batch> =
            micro.iter().map(|batch| batch.heard(stepper.log_mel.as_ref())).collect::<Result<_>>()?;
        let masks: Vec<_> = micro.iter().map(|batch| method.mask(batch)).collect();
        let join = |parts: Vec<Tensor>| Tensor::cat(&parts, 0);
        tensors
            .push(("input".into(), join(micro.iter().map(|batch| method.normalised(batch)).collect::<Result<_>>()?)));
        let texts: Vec<Tensor> = micro.iter().filter_map(|batch| Some(batch.text.as_ref()?.shallow_clone())).collect();
        if !texts.is_empty() {
            tensors.push(("text".into(), join(texts)));
        }
        tensors.push(("keep".into(), join(masks.iter().map(|mask| mask.keep.shallow_clone()).collect())));
        tensors.push(("drop".into(), join(masks.iter().map(|mask| mask.drop.shallow_clone()).collect())));
        tensors.push(("restore".into(), join(masks.iter().map(|mask| mask.restore()).collect())));
        tensors.push(("sample_id".into(), join(micro.iter().map(|batch| batch.origins.get(0)).collect())));
    }
    let numbers = [
        ("loss", outcome.loss),
        ("loss_local", outcome.local_loss),
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("clip_scale", outcome.clip_scale),
    ];
    tensors.extend(numbers.map(|(name, value)| (name.to_string(), Tensor::from_slice(&[value]))));

    let folder = folder.join("dump");
    std::fs::create_dir_all(&folder).map_err(|error| Fault::disk(folder.display(), error))?;
    let path = folder.join(format!("step-{step:08}-rank-{rank}.safetensors"));
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.contiguous())).collect();
    Ok(Tensor::write_safetensors(&tensors, &path)?)
}
