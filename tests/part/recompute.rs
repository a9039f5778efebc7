//! Tests of activation checkpointing: the same numbers and the same order of hooks, in less memory.

use crate::method::flip;
use crate::support::child_process::run_case;
use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, normal};
use crate::train::step::{BATCH, BUCKET, LR, input, micro_batches, stepper, tiny_mae};
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::grid::InputConfig;
use occlude::method::{Batch, Method, mae, videomae};
use occlude::op::shuffle::SampleKey;
use occlude::optim::bucket::BucketEvent;
use occlude::train::step::Stepper;
use serde_json::json;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    mae_losses_and_gradients_match_bit_for_bit,
    videomae_losses_and_gradients_match_bit_for_bit,
    dual_encoder_losses_and_gradients_match_bit_for_bit,
    hooks_fire_once_and_in_the_order_of_backward,
    features_are_not_recomputed,
    recomputation_saves_memory,
];

fn clip() -> videomae::VideoMae {
    let input = InputConfig { frames: 4, patch_frames: 2, ..input() };
    let config = json!({
        "encoder": {"width": 32, "depth": 2, "heads": 4}, "decoder": {"width": 16, "depth": 2, "heads": 2},
        "mask": {"ratio": 0.75},
    });
    videomae::VideoMae::new(&serde_json::from_value(config).expect("numbers"), &input).expect("a method")
}

fn with_recompute<M: Method>(mut method: M) -> M {
    method.model_mut().set_recompute(true);
    method
}

/// Runs one step over these micro-batches; returns its loss, the gradient, the weights, and the events in order.
fn run_step(method: impl Method + 'static, kind: Kind, micro: &[Batch]) -> (f64, Tensor, Tensor, Vec<BucketEvent>) {
    let mut stepper = stepper(method, Arc::new(SoloWorld::new(Device::Cpu)), kind, BUCKET);
    let outcome = stepper.step(micro, LR, |_, _| Ok(())).expect("a step");
    let Stepper { flat, buckets, .. } = stepper;
    (outcome.loss, flat.grad.copy(), flat.master.copy(), buckets.events())
}

fn mae_losses_and_gradients_match_bit_for_bit() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let solo = SoloWorld::new(Device::Cpu);
        // Three micro-batches, whose gradients are accumulated.
        let plain = run_step(tiny_mae(), kind, &micro_batches(0, BATCH, &solo, 4));
        let second = run_step(with_recompute(tiny_mae()), kind, &micro_batches(0, BATCH, &solo, 4));
        assert_eq!(plain.0, second.0, "{kind:?}: the loss");
        assert!(plain.1.equal(&second.1) && plain.1.norm().double_value(&[]) > 0.0, "{kind:?}: the gradients");
        assert!(plain.2.equal(&second.2), "{kind:?}: the weights");
    }
    Ok(())
}

fn videomae_losses_and_gradients_match_bit_for_bit() -> Outcome {
    let pixels = Tensor::arange(3 * 4 * 256, (Kind::Int64, Device::Cpu)).remainder(251).to_kind(Kind::Uint8);
    let keys: Vec<SampleKey> = (0..3).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
    let micro = [Batch::new(pixels.view([3, 1, 4, 16, 16]), &keys, 5)];
    let plain = run_step(clip(), Kind::Float, &micro);
    let second = run_step(with_recompute(clip()), Kind::Float, &micro);
    assert!(plain.0 == second.0 && plain.1.equal(&second.1) && plain.2.equal(&second.2));
    Ok(())
}

fn dual_encoder_losses_and_gradients_match_bit_for_bit() -> Outcome {
    for (kind, towers) in [(Kind::Float, "clip"), (Kind::BFloat16, "flip")] {
        let micro = [flip::batch(&normal(1, &[4, 3, 1, 16, 16]))];
        let case = flip::tiny(towers);
        let plain = run_step(case.method(), kind, &micro);
        let second = run_step(with_recompute(case.method()), kind, &micro);
        assert!(plain.0 == second.0 && plain.1.equal(&second.1) && plain.2.equal(&second.2), "{kind:?}, {towers}");
    }
    Ok(())
}

fn hooks_fire_once_and_in_the_order_of_backward() -> Outcome {
    run_on_threads(2, |world| {
        let events = [tiny_mae(), with_recompute(tiny_mae())].map(|method| {
            let mut stepper = stepper(method, world.clone(), Kind::Float, BUCKET);
            stepper.step(&micro_batches(0, BATCH, world.as_ref(), 2), LR, |_, _| Ok(())).expect("a step");
            stepper.buckets.events()
        });
        let fired = events.each_ref().map(|all| {
            let fired = all.iter().filter(|event| matches!(event, BucketEvent::GradReady(_)));
            fired.copied().collect::<Vec<_>>()
        });
        assert_eq!(fired[0], fired[1], "tensor by tensor");
        assert_eq!(events[0], events[1], "every bucket starts at the same point");
    });
    Ok(())
}

fn features_are_not_recomputed() -> Outcome {
    let stepper = stepper(tiny_mae(), Arc::new(SoloWorld::new(Device::Cpu)), Kind::Float, BUCKET);
    let batch = micro_batches(0, BATCH, &SoloWorld::new(Device::Cpu), u64::MAX >> 1).remove(0);
    let plain = no_grad(|| tiny_mae().encode(&stepper.flat.leaves, &batch))?;
    let second = no_grad(|| with_recompute(tiny_mae()).encode(&stepper.flat.leaves, &batch))?;
    assert!(plain.mean.equal(&second.mean) && !second.mean.requires_grad());
    Ok(())
}

/// Runs in its own process and prints by how many megabytes the resident memory rises during a step.
pub fn case(name: &str) -> i32 {
    let config = json!({
        "encoder": {"width": 128, "depth": 12, "heads": 4}, "decoder": {"width": 64, "depth": 4, "heads": 2},
        "mask": {"ratio": 0.25},
    });
    let input = InputConfig { height: 32, width: 32, ..input() };
    let method = mae::Mae::new(&serde_json::from_value(config).expect("numbers"), &input).expect("a method");
    let method = if name.ends_with("again") { with_recompute(method) } else { method };
    let mut stepper = stepper(method, Arc::new(SoloWorld::new(Device::Cpu)), Kind::Float, 1 << 20);
    let rows = 96;
    let pixels = Tensor::zeros([rows, 1, 1, 32, 32], (Kind::Uint8, Device::Cpu));
    let mut step = |rows: i64| {
        let keys: Vec<SampleKey> = (0..rows as u64).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
        let micro = [Batch::new(pixels.narrow(0, 0, rows), &keys, 5)];
        stepper.step(&micro, LR, |_, _| Ok(())).expect("a step");
    };
    // Allocations of libraries at the first step do not count.
    step(1);
    let before = resident_kib("VmRSS");
    step(rows);
    println!("{}", (resident_kib("VmHWM") - before) / 1024);
    0
}

/// Returns a value of /proc/self/status in KiB.
fn resident_kib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with(name)).expect("the value");
    line.split_whitespace().nth(1).and_then(|figure| figure.parse().ok()).expect("a number")
}

/// Sixteen blocks, of each of which 16 activations (as wide as the residual stream: the sum, its norm, three of
/// queries, keys and values, the attention output, again a sum and a norm, four before and four after the activation
/// function) become 2 inputs, besides those of the one block that is recomputed: 562 MB became 223 when this was
/// written.
fn recomputation_saves_memory() -> Outcome {
    let mut held = Vec::new();
    for name in ["recompute-never", "recompute-again"] {
        let (code, output, why) = run_case(name)?;
        assert_eq!(code, Some(0), "{why}");
        held.push(output.trim().parse::<f64>()?);
    }
    assert!(held[1] < 0.5 * held[0], "{held:?} MB");
    Ok(())
}
