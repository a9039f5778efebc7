//! Tests of the flat buffers, their buckets, the schedule, and AdamW against PyTorch.

use crate::support::{Outcome, Tensors, distance, normal, oracle, read, write};
use libtest_mimic::Failed;
use occlude::dist::solo::run_on_threads;
use occlude::op::square_sum::square_sum;
use occlude::optim::bucket::Buckets;
use occlude::optim::flat::FlatParams;
use occlude::optim::schedule::{Schedule, TrainingLength};
use occlude::optim::update::{Config, Updater};
use occlude::part::params::{Init, ParamSpecs};
use serde_json::json;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    fifty_updates_match_pytorch,
    fifty_clipped_updates_match_pytorch,
    the_ema_follows_its_formula,
    bf16_weights_follow_the_master_weights,
    warmup_starts_at_zero_and_cosine_ends_at_min_lr,
    schedule_lengths_are_counted_in_samples,
    tensors_are_aligned_in_reverse_order_of_use,
    leaves_and_gradients_are_views_of_the_buffers,
    buckets_cover_every_tensor_once,
];

const STEPS: u64 = 50;
const BATCH: u64 = 24;
const DATA_SET: u64 = 200;

/// Shapes that are not multiples of anything.
fn table() -> ParamSpecs {
    let mut table = ParamSpecs::default();
    for (index, shape) in [&[17, 31][..], &[31], &[1, 1, 13], &[129, 3], &[3], &[1]].iter().enumerate() {
        table.add(format!("tensor.{index}"), shape, Init::Normal(0.5));
    }
    table
}

fn config(clip: Option<f64>) -> Config {
    let config = json!({
        "lr": 3e-3, "min_lr": 1e-4, "warmup": {"epochs": 1.5}, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.3,
        "clip_grad_norm": clip, "ema_decay": 0.9,
    });
    serde_json::from_value(config).expect("a config")
}

fn fifty_updates_match_pytorch() -> Outcome {
    assert_matches_pytorch(None)
}

fn fifty_clipped_updates_match_pytorch() -> Outcome {
    assert_matches_pytorch(Some(1.5))
}

/// Tensor 2 is unused in steps 10..20, tensor 3 always.
fn is_used(step: u64, tensor: usize) -> bool {
    !(tensor == 3 || tensor == 2 && (10..20).contains(&step))
}

/// Returns a gradient; norms lie from far below the clipping limit to far above.
fn gradient(step: u64, tensor: usize) -> Tensor {
    normal(1000 + step * 10 + tensor as u64, &table().specs()[tensor].shape) * 0.01 * (1 + step % 7 * 10) as f64
}

/// Returns what the same updates give in PyTorch.
fn query_pytorch(flat: &FlatParams, clip: Option<f64>) -> Result<Tensors, Failed> {
    let tensors = flat.specs.len();
    let mut query: Vec<_> =
        (0..tensors).map(|i| (format!("weight.{i}"), flat.param_view(&flat.master, i).copy())).collect();
    for step in 0..STEPS {
        let used = (0..tensors).filter(|&i| is_used(step, i));
        query.extend(used.map(|i| (format!("grad.{step}.{i}"), gradient(step, i))));
    }
    let numbers = json!({
        "tensors": tensors, "steps": STEPS, "batch": BATCH, "data_set": DATA_SET, "peak": 3e-3, "least": 1e-4,
        "warmup_epochs": 1.5, "epochs": (STEPS * BATCH) as f64 / DATA_SET as f64, "betas": [0.9, 0.95], "eps": 1e-8,
        "weight_decay": 0.3, "clip": clip, "ema_decay": 0.9,
    });
    let folder = tempfile::tempdir()?;
    let [request, reply] = ["request", "reply"].map(|name| folder.path().join(name));
    write(&request, &query)?;
    oracle("adamw.py", &[request.to_str().unwrap(), reply.to_str().unwrap(), &numbers.to_string()])?;
    read(&reply)
}

fn assert_matches_pytorch(clip: Option<f64>) -> Outcome {
    let config = config(clip);
    let mut flat = FlatParams::new(&table(), 5, Kind::Float, Device::Cpu)?;
    let mut updater = Updater::new(&flat, &config);
    let tensors = flat.specs.len();
    let reference = query_pytorch(&flat, clip)?;
    let schedule = config.schedule(DATA_SET, BATCH, STEPS * BATCH);
    let mut clipped = 0;
    for step in 0..STEPS {
        flat.zero_grad();
        let used: Vec<bool> = (0..tensors).map(|i| is_used(step, i)).collect();
        for i in (0..tensors).filter(|&i| used[i]) {
            flat.param_view(&flat.grad, i).copy_(&gradient(step, i));
        }
        let lr = schedule.lr_at(step * BATCH);
        let expected = reference["lr"].double_value(&[step as i64]);
        assert!((lr - expected).abs() <= 1e-12 * 3e-3, "lr of step {step}: {lr} against {expected}");
        let norm = square_sum(&flat.grad)?.double_value(&[]).sqrt();
        let expected = reference["norm"].double_value(&[step as i64]);
        assert!((norm - expected).abs() <= 1e-6 * expected, "norm of step {step}: {norm} against {expected}");
        let scale = updater.clip_scale(norm);
        clipped += u64::from(scale < 1.0);
        updater.update(&mut flat, &used, lr, scale)?;
    }
    match clip {
        None => assert_eq!(clipped, 0),
        Some(_) => assert!(clipped > STEPS / 4 && clipped < STEPS, "some are clipped and some are not: {clipped}"),
    }
    let average = updater.ema.as_ref().expect("an average");
    for i in 0..tensors {
        for (label, buffer) in
            [("weight", &flat.master), ("first", &flat.exp_avg), ("second", &flat.exp_avg_sq), ("average", average)]
        {
            let ours = flat.param_view(buffer, i);
            let expected = &reference[&format!("{label}.{i}")];
            let difference = distance(&ours, expected);
            let norm = expected.norm().double_value(&[]);
            assert!(difference <= 1e-6 * norm, "{label} of tensor {i}: ‖Δ‖ = {difference:e} of {norm:e}");
        }
        let ours = flat.steps.double_value(&[i as i64]);
        let expected = reference[&format!("steps.{i}")].double_value(&[0]);
        assert_eq!(ours, expected, "updates of tensor {i}");
    }
    // A tensor that was never used is unchanged, bit for bit.
    let start = table().specs()[3].initial_values(5);
    assert_eq!(Vec::<f32>::try_from(flat.param_view(&flat.master, 3).view(-1))?, start);
    assert_eq!(reference["steps.2"].double_value(&[0]), (STEPS - 10) as f64, "the oracle skipped the update as well");
    Ok(())
}

fn the_ema_follows_its_formula() -> Outcome {
    let mut flat = FlatParams::new(&table(), 6, Kind::Float, Device::Cpu)?;
    let mut updater = Updater::new(&flat, &config(None));
    let mut expected = flat.master.to_kind(Kind::Double).copy();
    for step in 0..20 {
        flat.grad.copy_(&normal(step, &flat.grad.size()));
        updater.update(&mut flat, &[true; 6], 1e-2, 1.0)?;
        expected = expected * 0.9 + flat.master.to_kind(Kind::Double) * 0.1;
    }
    let difference = distance(updater.ema.as_ref().expect("an average"), &expected);
    assert!(difference <= 1e-6 * expected.norm().double_value(&[]), "off by {difference:e}");
    let without = serde_json::from_value(json!({"lr": 1.0}))?;
    assert!(Updater::new(&flat, &without).ema.is_none(), "no average unless requested");
    Ok(())
}

fn bf16_weights_follow_the_master_weights() -> Outcome {
    let mut flat = FlatParams::new(&table(), 6, Kind::BFloat16, Device::Cpu)?;
    let mut updater = Updater::new(&flat, &config(None));
    for step in 0..30 {
        assert!(flat.compute.equal(&flat.master.to_kind(Kind::BFloat16)), "after {step} updates");
        flat.grad.copy_(&normal(step, &flat.grad.size()));
        // Far below the resolution of bf16 around 0.5: only fp32 masters can accumulate it.
        updater.update(&mut flat, &[true; 6], 1e-4, 1.0)?;
    }
    let moved = flat.master.to_kind(Kind::BFloat16).to_kind(Kind::Float) - &flat.master;
    assert!(moved.abs().max().double_value(&[]) > 0.0, "the masters hold more than bf16");
    for (i, leaf) in flat.leaves.0.iter().enumerate() {
        assert!(leaf.detach().equal(&flat.param_view(&flat.compute, i)), "leaf {i} has the update");
    }
    Ok(())
}

fn warmup_starts_at_zero_and_cosine_ends_at_min_lr() -> Outcome {
    let curve = Schedule { peak_lr: 2.0, min_lr: 0.5, warmup_lr: 0.0, warmup_samples: 100.0, total_samples: 300.0 };
    for (samples, expected) in [(0, 0.0), (25, 0.5), (99, 1.98), (100, 2.0), (200, 1.25), (300, 0.5), (1000, 0.5)] {
        assert!((curve.lr_at(samples) - expected).abs() <= 1e-12, "{samples}: {}", curve.lr_at(samples));
    }
    let flat = Schedule { warmup_samples: 0.0, ..curve };
    assert_eq!(flat.lr_at(0), 2.0, "without a warm-up the first step moves");
    let begun = Schedule { warmup_lr: 0.4, ..curve };
    assert!(
        (begun.lr_at(0) - 0.4).abs() <= 1e-12 && (begun.lr_at(50) - 1.2).abs() <= 1e-12,
        "a warm-up may begin above 0"
    );
    let all_warm = Schedule { warmup_samples: 300.0, ..curve };
    assert!(all_warm.lr_at(299) < 2.0 && all_warm.lr_at(300).is_finite());
    Ok(())
}

fn schedule_lengths_are_counted_in_samples() -> Outcome {
    assert_eq!(TrainingLength::Epochs(1.5).to_samples(1000, 64), 1500.0);
    assert_eq!(TrainingLength::Steps(10).to_samples(1000, 64), 640.0);
    assert_eq!(TrainingLength::Samples(77).to_samples(1000, 64), 77.0);
    let config: Config = serde_json::from_value(json!({"base_lr": 1e-3, "warmup": {"steps": 3}}))?;
    assert_eq!(config.peak_lr(1024), 4e-3, "base_lr is per 256 samples");
    let curve = config.schedule(5000, 1024, 102_400);
    assert_eq!(
        curve,
        Schedule { peak_lr: 4e-3, min_lr: 0.0, warmup_lr: 0.0, warmup_samples: 3072.0, total_samples: 102_400.0 }
    );
    Ok(())
}

fn tensors_are_aligned_in_reverse_order_of_use() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let flat = FlatParams::new(&table(), 1, kind, Device::Cpu)?;
        let length = flat.master.size()[0] as usize;
        let bytes = kind.elt_size_in_bytes();
        let mut end = 0;
        for (spec, range) in flat.specs.iter().zip(&flat.ranges).rev() {
            assert_eq!(range.start * bytes % 256, 0, "{} in {kind:?}", spec.name);
            assert!(range.start >= end, "{} overlaps the tensor used after it", spec.name);
            assert!((range.start - end) * 2 < 256, "no more padding than the alignment needs");
            assert_eq!(range.len(), spec.numel());
            end = range.end;
        }
        assert!(end <= length, "the buffer is long enough");
        for buffer in [&flat.compute, &flat.grad, &flat.exp_avg, &flat.exp_avg_sq] {
            assert_eq!(buffer.size(), [length as i64]);
        }
        assert_eq!(flat.compute.data_ptr() == flat.master.data_ptr(), kind == Kind::Float, "one storage in fp32");
    }
    Ok(())
}

fn leaves_and_gradients_are_views_of_the_buffers() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut flat = FlatParams::new(&table(), 1, kind, Device::Cpu)?;
        let loss: Tensor = flat.leaves.0.iter().map(|leaf| leaf.sum(Kind::Float)).sum();
        loss.backward();
        let at = |buffer: &Tensor, start: usize, bytes: usize| buffer.data_ptr() as usize + start * bytes;
        for (leaf, range) in flat.leaves.0.iter().zip(&flat.ranges) {
            assert_eq!(leaf.data_ptr() as usize, at(&flat.compute, range.start, kind.elt_size_in_bytes()));
            assert_eq!(leaf.grad().data_ptr() as usize, at(&flat.grad, range.start, 4));
            assert_eq!(leaf.grad().kind(), Kind::Float);
        }
        let parameters: usize = flat.specs.iter().map(|spec| spec.numel()).sum();
        assert_eq!(flat.grad.sum(Kind::Float).double_value(&[]), parameters as f64, "the gradient of a sum is 1");
        flat.zero_grad();
        assert!(
            flat.leaves.0.iter().all(|leaf| leaf.grad().defined() && leaf.grad().abs().max().double_value(&[]) == 0.0)
        );
    }
    Ok(())
}

fn buckets_cover_every_tensor_once() -> Outcome {
    for bytes in [4, 300, 2000, 1 << 20] {
        let events = run_on_threads(2, |world| {
            let flat = FlatParams::new(&table(), 1, Kind::Float, Device::Cpu).expect("buffers");
            let buckets =
                Buckets::new(&flat, bytes, world.open_channel("gradients").expect("a channel")).expect("buckets");
            let _ = flat.grad.shallow_clone().fill_(1.0 + world.rank() as f64);
            buckets.begin_step();
            buckets.finish(Duration::from_secs(30)).expect("sums");
            // Summed twice would be more than 3, not at all would be less.
            for (i, spec) in flat.specs.iter().enumerate() {
                let part = flat.param_view(&flat.grad, i);
                let low = part.min().double_value(&[]);
                let high = part.max().double_value(&[]);
                assert_eq!((low, high), (3.0, 3.0), "{} in buckets of {bytes} bytes", spec.name);
            }
            assert!(!buckets.used_params().contains(&true), "no gradient was reduced");
            buckets.events().len()
        });
        let expected = match bytes {
            4 => 6,
            1_048_576 => 1,
            _ => events[0],
        };
        assert_eq!(events, [expected, expected], "buckets of {bytes} bytes");
        assert!((1..=6).contains(&expected));
    }
    Ok(())
}
