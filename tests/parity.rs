//! What every method is held to beside other people's code: the losses, gradients and weights of AdamW steps.

use crate::support::{Outcome, Tensors, normal, oracle, read, write};
use libtest_mimic::Failed;
use occlude::device::solo::Solo;
use occlude::fault::Fault;
use occlude::method::{Batch, Method};
use occlude::optim::{flat::Flat, update, update::Updater};
use occlude::run::step::Stepper;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

pub const LR: f64 = 1e-3;
const DECAY: f64 = 0.05;

/// The other code's name and layout of a tensor of ours.
pub type Naming<'a> = &'a dyn Fn(&str, &Tensor) -> (String, Tensor);

/// Ours.
pub fn ours(name: &str, tensor: &Tensor) -> (String, Tensor) {
    (name.to_owned(), tensor.shallow_clone())
}

/// First weights, all moved a little: biases, scales and mask tokens begin at 0 and 1, which would hide a mistake.
pub fn moved(method: &dyn Method) -> Result<Flat, Fault> {
    let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
    let _ = flat.master.shallow_clone().g_add_(&(normal(1, &flat.master.size()) * 0.02));
    Ok(flat)
}

/// `numbers` and what the other code needs to know of the training.
pub fn training(steps: usize, mut numbers: Value) -> Value {
    numbers["steps"] = json!(steps);
    numbers["lr"] = json!(LR);
    numbers["weight_decay"] = json!(DECAY);
    numbers
}

/// What a script of tests/oracle replies of these weights, `weight.<name>` for each, and of `asked`.
pub fn reply(
    words: &[&str],
    flat: &Flat,
    naming: Naming,
    mut asked: Vec<(String, Tensor)>,
    numbers: &Value,
) -> Result<Tensors, Failed> {
    for (index, spec) in flat.specs.iter().enumerate() {
        let (name, tensor) = naming(&spec.name, &flat.part(&flat.master, index));
        asked.push((format!("weight.{name}"), tensor));
    }
    let folder = tempfile::tempdir()?;
    let [request, reply] = ["request", "reply"].map(|name| folder.path().join(format!("{name}.safetensors")));
    write(&request, &asked)?;
    let (script, words) = words.split_first().expect("a script");
    let numbers = numbers.to_string();
    oracle(script, &[words, &[request.to_str().unwrap(), reply.to_str().unwrap(), &numbers]].concat())?;
    read(&reply)
}

/// Takes a step with each batch and compares with `reply`: `loss.<step>`, `grad.<step>.<name>` where there are gradients of a
/// step, and `weight.<name>` after the last.
pub fn agree(method: Box<dyn Method>, flat: Flat, batches: Vec<Batch>, reply: &Tensors, naming: Naming) -> Outcome {
    let steps = batches.len();
    let mut stepper = stepper(method, flat)?;
    for (step, batch) in batches.into_iter().enumerate() {
        let prefix = format!("grad.{step}.");
        let outcome = stepper.step(&[batch], LR, |stepper, _| {
            if step == 0 || reply.keys().any(|name| name.starts_with(&prefix)) {
                gradients(&stepper.flat, &prefix, reply, naming);
            }
            Ok(())
        })?;
        loss(outcome.loss, &reply[&format!("loss.{step}")], step);
    }
    let flat = &stepper.flat;
    for (index, spec) in flat.specs.iter().enumerate() {
        let (name, ours) = naming(&spec.name, &flat.part(&flat.master, index));
        let off = (&ours - reply[&format!("weight.{name}")].view_as(&ours)).abs();
        // Softmax sees neither a bias of all keys nor one of all scores: gradients of pure rounding, which AdamW blows up to
        // ±lr.
        if name.ends_with("qkv.bias") {
            let _ = off.chunk(3, 0)[1].zero_();
        } else if name.ends_with("meta_mlp.fc2.bias") {
            continue;
        }
        let off = off.max().double_value(&[]);
        assert!(off <= 0.1 * LR * steps as f64, "{name} is off by {off:e} after {steps} steps");
    }
    Ok(())
}

pub fn loss(ours: f64, theirs: &Tensor, step: usize) {
    let theirs = theirs.double_value(&[0]);
    let off = (ours - theirs).abs() / theirs;
    assert!(off <= 1e-5, "loss of step {step}: {ours} against {theirs}, off by {off:e}");
}

pub fn gradients(flat: &Flat, prefix: &str, reply: &Tensors, naming: Naming) {
    let theirs: Vec<&Tensor> = reply.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, t)| t).collect();
    assert_eq!(theirs.len(), flat.specs.len(), "as many gradients as tensors");
    let greatest = theirs.iter().map(|t| t.abs().max().double_value(&[])).fold(0.0, f64::max);
    for (index, spec) in flat.specs.iter().enumerate() {
        let (name, ours) = naming(&spec.name, &flat.part(&flat.gradient, index));
        let wanted = reply[&format!("{prefix}{name}")].view_as(&ours).to_kind(Kind::Double);
        let (off, norm) = ((ours - &wanted).norm().double_value(&[]), wanted.norm().double_value(&[]));
        let within = 1e-5 * norm + 1e-7 * greatest;
        assert!(off <= within, "{prefix}{name}: ‖Δ‖ = {off:e}, ‖g‖ = {norm:e}, allowed {within:e}");
    }
}

pub fn stepper(method: Box<dyn Method>, flat: Flat) -> Result<Stepper, Fault> {
    let optim = json!({"lr": LR, "weight_decay": DECAY, "betas": [0.9, 0.95]});
    let optim: update::Config = serde_json::from_value(optim).expect("numbers");
    let updater = Updater::new(&flat, &optim);
    Stepper::new(method, flat, updater, Arc::new(Solo::new(Device::Cpu)), 1 << 12, Duration::from_secs(60))
}
