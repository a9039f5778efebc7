//! Comparison of a method with another implementation: losses, gradients and weights of AdamW steps, with the
//! tolerance of [`assert_near_reference`].

use crate::support::method_ext::MethodExt;
use crate::support::tolerance::assert_near_reference;
use crate::support::{Outcome, Tensors, normal, oracle, read, write};
use libtest_mimic::Failed;
use occlude::dist::solo::SoloWorld;
use occlude::error::Error;
use occlude::method::{Batch, Method};
use occlude::optim::{flat::FlatParams, update, update::Updater};
use occlude::train::step::Stepper;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

pub const LR: f64 = 1e-3;
const DECAY: f64 = 0.05;

/// Maps the name and layout of one of our tensors to those of the other implementation.
pub type Naming<'a> = &'a dyn Fn(&str, &Tensor) -> (String, Tensor);

/// Keeps our name and layout.
pub fn same_name(name: &str, tensor: &Tensor) -> (String, Tensor) {
    (name.to_owned(), tensor.shallow_clone())
}

/// Returns initial weights, all changed a little: biases, scales and mask tokens start at 0 and 1, which would hide
/// mistakes.
pub fn perturbed_weights(method: &dyn Method) -> Result<FlatParams, Error> {
    let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let _ = flat.master.shallow_clone().g_add_(&(normal(1, &flat.master.size()) * 0.02));
    Ok(flat)
}

/// Adds the settings of the training to `numbers`.
pub fn training_numbers(steps: usize, mut numbers: Value) -> Value {
    numbers["steps"] = json!(steps);
    numbers["lr"] = json!(LR);
    numbers["weight_decay"] = json!(DECAY);
    numbers
}

/// Returns the reply of a script of tests/oracle to these weights, `weight.<name>` each, and to the tensors of
/// `request`.
pub fn oracle_reply(
    words: &[&str],
    flat: &FlatParams,
    naming: Naming,
    mut query: Vec<(String, Tensor)>,
    numbers: &Value,
) -> Result<Tensors, Failed> {
    for (index, spec) in flat.specs.iter().enumerate() {
        let (name, tensor) = naming(&spec.name, &flat.param_view(&flat.master, index));
        query.push((format!("weight.{name}"), tensor));
    }
    let folder = tempfile::tempdir()?;
    let [request, reply] = ["request", "reply"].map(|name| folder.path().join(format!("{name}.safetensors")));
    write(&request, &query)?;
    let (script, words) = words.split_first().expect("a script");
    let numbers = numbers.to_string();
    oracle(script, &[words, &[request.to_str().unwrap(), reply.to_str().unwrap(), &numbers]].concat())?;
    read(&reply)
}

/// Takes a step with each batch and compares with `reply`: `loss.<step>`, `grad.<step>.<name>` for steps that have
/// gradients, and `weight.<name>` after the last.
pub fn assert_training_matches(
    method: Box<dyn Method>,
    flat: FlatParams,
    batches: Vec<Batch>,
    reply: &Tensors,
    naming: Naming,
) -> Outcome {
    assert_steps_match(method, flat, batches, reply, naming).map(drop)
}

/// The same; returns the stepper after the last step.
pub fn assert_steps_match(
    method: Box<dyn Method>,
    flat: FlatParams,
    batches: Vec<Batch>,
    reply: &Tensors,
    naming: Naming,
) -> Result<Stepper, Failed> {
    let steps = batches.len();
    let mut stepper = stepper(method, flat)?;
    for (step, batch) in batches.into_iter().enumerate() {
        let prefix = format!("grad.{step}.");
        let outcome = stepper.step(&[batch], LR, |stepper, _| {
            if step == 0 || reply.keys().any(|name| name.starts_with(&prefix)) {
                assert_gradients_match(&stepper.flat, &prefix, reply, naming);
            }
            Ok(())
        })?;
        assert_loss_matches(outcome.loss, reply, step);
    }
    let flat = &stepper.flat;
    for (index, spec) in flat.specs.iter().enumerate() {
        let (name, ours) = naming(&spec.name, &flat.param_view(&flat.master, index));
        let exact = reply[&format!("weight.{name}")].view_as(&ours);
        let difference = (&ours - &exact).abs();
        let fp32_difference = (reply[&format!("fp32.weight.{name}")].view_as(&ours) - &exact).abs();
        // Softmax cancels a bias of all keys and one of all scores: their gradients are pure rounding, which AdamW
        // amplifies to ±lr.
        if name.ends_with("qkv.bias") {
            let _ = difference.chunk(3, 0)[1].zero_();
            let _ = fp32_difference.chunk(3, 0)[1].zero_();
        } else if name.ends_with("meta_mlp.fc2.bias") {
            continue;
        }
        let difference = difference.max().double_value(&[]);
        let limit = 0.1 * LR * steps as f64 + 2.0 * fp32_difference.max().double_value(&[]);
        assert!(difference <= limit, "{name} is off by {difference:e} after {steps} steps, allowed {limit:e}");
    }
    Ok(stepper)
}

pub fn assert_loss_matches(ours: f64, reply: &Tensors, step: usize) {
    let name = format!("loss.{step}");
    assert_near_reference(reply, &name, &Tensor::from_slice(&[ours]), 1e-5 * reply[&name].double_value(&[0]));
}

pub fn assert_gradients_match(flat: &FlatParams, prefix: &str, reply: &Tensors, naming: Naming) {
    let reference: Vec<&Tensor> = reply.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, t)| t).collect();
    assert_eq!(reference.len(), flat.specs.len(), "one gradient per tensor");
    let greatest = reference.iter().map(|t| t.abs().max().double_value(&[])).fold(0.0, f64::max);
    for (index, spec) in flat.specs.iter().enumerate() {
        let (name, ours) = naming(&spec.name, &flat.param_view(&flat.grad, index));
        let name = format!("{prefix}{name}");
        let norm = reply[&name].norm().double_value(&[]);
        assert_near_reference(reply, &name, &ours, 1e-5 * norm + 1e-7 * greatest);
    }
}

pub fn stepper(method: Box<dyn Method>, flat: FlatParams) -> Result<Stepper, Error> {
    let optim = json!({"lr": LR, "weight_decay": DECAY, "betas": [0.9, 0.95]});
    let optim: update::Config = serde_json::from_value(optim).expect("numbers");
    let updater = Updater::new(&flat, &optim);
    Stepper::new(method, flat, updater, Arc::new(SoloWorld::new(Device::Cpu)), 1 << 12, Duration::from_secs(60))
}
