//! The flat buffers, their buckets, the schedule, and AdamW against PyTorch's.

use crate::support::{Outcome, distance, normal, oracle, read, write};
use occlude::device::solo::threads;
use occlude::op::square_sum::square_sum;
use occlude::optim::bucket::Buckets;
use occlude::optim::flat::Flat;
use occlude::optim::schedule::{Schedule, Span};
use occlude::optim::update::{Config, Updater};
use occlude::part::weights::{Init, Table};
use serde_json::json;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    fifty_updates_agree_with_pytorch,
    fifty_clipped_updates_agree_with_pytorch,
    the_average_follows_its_formula,
    bf16_weights_follow_the_master_weights,
    a_warmup_rises_from_zero_and_the_cosine_ends_at_the_least,
    spans_are_counted_in_samples,
    tensors_lie_on_boundaries_in_reverse_order_of_use,
    leaves_and_gradients_are_views_of_the_buffers,
    buckets_cover_every_tensor_once,
];

const STEPS: u64 = 50;
const BATCH: u64 = 24;
const DATA_SET: u64 = 200;

/// Shapes that are no multiples of anything.
fn table() -> Table {
    let mut table = Table::default();
    for (index, shape) in [&[17, 31][..], &[31], &[1, 1, 13], &[129, 3], &[3], &[1]].iter().enumerate() {
        table.add(format!("tensor.{index}"), shape, Init::Normal(0.5));
    }
    table
}

fn config(clip: Option<f64>) -> Config {
    let config = json!({
        "lr": 3e-3, "min_lr": 1e-4, "warmup": {"epochs": 1.5}, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.3,
        "clip": clip, "ema": 0.9,
    });
    serde_json::from_value(config).expect("a config")
}

fn fifty_updates_agree_with_pytorch() -> Outcome {
    agrees(None)
}

fn fifty_clipped_updates_agree_with_pytorch() -> Outcome {
    agrees(Some(1.5))
}

/// Tensor 2 rests in steps 10..20, tensor 3 never moves.
fn is_used(step: u64, tensor: usize) -> bool {
    !(tensor == 3 || tensor == 2 && (10..20).contains(&step))
}

fn agrees(clip: Option<f64>) -> Outcome {
    let config = config(clip);
    let mut flat = Flat::new(&table(), 5, Kind::Float, Device::Cpu)?;
    let mut updater = Updater::new(&flat, &config);
    let tensors = flat.specs.len();
    // Sizes from far below the limit of the clipping to far above.
    let gradient = |step: u64, i: usize| {
        normal(1000 + step * 10 + i as u64, &table().specs()[i].shape) * 0.01 * (1 + step % 7 * 10) as f64
    };
    let mut asked: Vec<_> = (0..tensors).map(|i| (format!("weight.{i}"), flat.part(&flat.master, i).copy())).collect();
    for step in 0..STEPS {
        let used = (0..tensors).filter(|&i| is_used(step, i));
        asked.extend(used.map(|i| (format!("grad.{step}.{i}"), gradient(step, i))));
    }
    let numbers = json!({
        "tensors": tensors, "steps": STEPS, "batch": BATCH, "data_set": DATA_SET, "peak": 3e-3, "least": 1e-4,
        "warmup_epochs": 1.5, "epochs": (STEPS * BATCH) as f64 / DATA_SET as f64, "betas": [0.9, 0.95], "eps": 1e-8,
        "weight_decay": 0.3, "clip": clip, "ema": 0.9,
    });
    let folder = tempfile::tempdir()?;
    let [request, reply] = ["request", "reply"].map(|name| folder.path().join(name));
    write(&request, &asked)?;
    oracle("adamw.py", &[request.to_str().unwrap(), reply.to_str().unwrap(), &numbers.to_string()])?;
    let theirs = read(&reply)?;

    let schedule = config.schedule(DATA_SET, BATCH, STEPS * BATCH);
    let mut clipped = 0;
    for step in 0..STEPS {
        flat.zero_gradient();
        let used: Vec<bool> = (0..tensors).map(|i| is_used(step, i)).collect();
        for i in (0..tensors).filter(|&i| used[i]) {
            flat.part(&flat.gradient, i).copy_(&gradient(step, i));
        }
        let lr = schedule.at(step * BATCH);
        let wanted = theirs["lr"].double_value(&[step as i64]);
        assert!((lr - wanted).abs() <= 1e-12 * 3e-3, "lr of step {step}: {lr} against {wanted}");
        let norm = square_sum(&flat.gradient)?.double_value(&[]).sqrt();
        let wanted = theirs["norm"].double_value(&[step as i64]);
        assert!((norm - wanted).abs() <= 1e-6 * wanted, "norm of step {step}: {norm} against {wanted}");
        let scale = updater.clip_scale(norm);
        clipped += u64::from(scale < 1.0);
        updater.update(&mut flat, &used, lr, scale)?;
    }
    match clip {
        None => assert_eq!(clipped, 0),
        Some(_) => assert!(clipped > STEPS / 4 && clipped < STEPS, "some are clipped and some are not: {clipped}"),
    }
    let average = updater.average.as_ref().expect("an average");
    for i in 0..tensors {
        for (what, buffer) in
            [("weight", &flat.master), ("first", &flat.first), ("second", &flat.second), ("average", average)]
        {
            let (ours, wanted) = (flat.part(buffer, i), &theirs[&format!("{what}.{i}")]);
            let (off, norm) = (distance(&ours, wanted), wanted.norm().double_value(&[]));
            assert!(off <= 1e-6 * norm, "{what} of tensor {i}: ‖Δ‖ = {off:e} of {norm:e}");
        }
        let (ours, wanted) = (flat.steps.double_value(&[i as i64]), theirs[&format!("steps.{i}")].double_value(&[0]));
        assert_eq!(ours, wanted, "updates of tensor {i}");
    }
    // What was never used is where it was, to the bit.
    let begun = table().specs()[3].draw(5);
    assert_eq!(Vec::<f32>::try_from(flat.part(&flat.master, 3).view(-1))?, begun);
    assert_eq!(theirs["steps.2"].double_value(&[0]), (STEPS - 10) as f64, "the oracle has rested too");
    Ok(())
}

fn the_average_follows_its_formula() -> Outcome {
    let mut flat = Flat::new(&table(), 6, Kind::Float, Device::Cpu)?;
    let mut updater = Updater::new(&flat, &config(None));
    let mut wanted = flat.master.to_kind(Kind::Double).copy();
    for step in 0..20 {
        flat.gradient.copy_(&normal(step, &flat.gradient.size()));
        updater.update(&mut flat, &[true; 6], 1e-2, 1.0)?;
        wanted = wanted * 0.9 + flat.master.to_kind(Kind::Double) * 0.1;
    }
    let off = distance(updater.average.as_ref().expect("an average"), &wanted);
    assert!(off <= 1e-6 * wanted.norm().double_value(&[]), "off by {off:e}");
    let without = serde_json::from_value(json!({"lr": 1.0}))?;
    assert!(Updater::new(&flat, &without).average.is_none(), "no average where none is asked for");
    Ok(())
}

fn bf16_weights_follow_the_master_weights() -> Outcome {
    let mut flat = Flat::new(&table(), 6, Kind::BFloat16, Device::Cpu)?;
    let mut updater = Updater::new(&flat, &config(None));
    for step in 0..30 {
        assert!(flat.compute.equal(&flat.master.to_kind(Kind::BFloat16)), "after {step} updates");
        flat.gradient.copy_(&normal(step, &flat.gradient.size()));
        // Far below bf16's resolution around 0.5: only fp32 masters can gather it.
        updater.update(&mut flat, &[true; 6], 1e-4, 1.0)?;
    }
    let moved = flat.master.to_kind(Kind::BFloat16).to_kind(Kind::Float) - &flat.master;
    assert!(moved.abs().max().double_value(&[]) > 0.0, "the masters hold more than bf16");
    for (i, leaf) in flat.leaves.0.iter().enumerate() {
        assert!(leaf.detach().equal(&flat.part(&flat.compute, i)), "leaf {i} sees the update");
    }
    Ok(())
}

fn a_warmup_rises_from_zero_and_the_cosine_ends_at_the_least() -> Outcome {
    let curve = Schedule { peak: 2.0, least: 0.5, warmup: 100.0, total: 300.0 };
    for (samples, wanted) in [(0, 0.0), (25, 0.5), (99, 1.98), (100, 2.0), (200, 1.25), (300, 0.5), (1000, 0.5)] {
        assert!((curve.at(samples) - wanted).abs() <= 1e-12, "{samples}: {}", curve.at(samples));
    }
    let flat = Schedule { warmup: 0.0, ..curve };
    assert_eq!(flat.at(0), 2.0, "without a warm-up the first step moves");
    let all_warm = Schedule { warmup: 300.0, ..curve };
    assert!(all_warm.at(299) < 2.0 && all_warm.at(300).is_finite());
    Ok(())
}

fn spans_are_counted_in_samples() -> Outcome {
    assert_eq!(Span::Epochs(1.5).samples(1000, 64), 1500.0);
    assert_eq!(Span::Steps(10).samples(1000, 64), 640.0);
    assert_eq!(Span::Samples(77).samples(1000, 64), 77.0);
    let config: Config = serde_json::from_value(json!({"base_lr": 1e-3, "warmup": {"steps": 3}}))?;
    assert_eq!(config.peak(1024), 4e-3, "base_lr is per 256 samples");
    let curve = config.schedule(5000, 1024, 102_400);
    assert_eq!(curve, Schedule { peak: 4e-3, least: 0.0, warmup: 3072.0, total: 102_400.0 });
    Ok(())
}

fn tensors_lie_on_boundaries_in_reverse_order_of_use() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let flat = Flat::new(&table(), 1, kind, Device::Cpu)?;
        let length = flat.master.size()[0] as usize;
        let bytes = kind.elt_size_in_bytes();
        let mut end = 0;
        for (spec, place) in flat.specs.iter().zip(&flat.places).rev() {
            assert_eq!(place.start * bytes % 256, 0, "{} in {kind:?}", spec.name);
            assert!(place.start >= end, "{} overlaps what is used after it", spec.name);
            assert!((place.start - end) * 2 < 256, "no more padding than the boundary wants");
            assert_eq!(place.len(), spec.numel());
            end = place.end;
        }
        assert!(end <= length, "the buffer is long enough");
        for buffer in [&flat.compute, &flat.gradient, &flat.first, &flat.second] {
            assert_eq!(buffer.size(), [length as i64]);
        }
        assert_eq!(flat.compute.data_ptr() == flat.master.data_ptr(), kind == Kind::Float, "one storage in fp32");
    }
    Ok(())
}

fn leaves_and_gradients_are_views_of_the_buffers() -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        let mut flat = Flat::new(&table(), 1, kind, Device::Cpu)?;
        let loss: Tensor = flat.leaves.0.iter().map(|leaf| leaf.sum(Kind::Float)).sum();
        loss.backward();
        let at = |buffer: &Tensor, start: usize, bytes: usize| buffer.data_ptr() as usize + start * bytes;
        for (leaf, place) in flat.leaves.0.iter().zip(&flat.places) {
            assert_eq!(leaf.data_ptr() as usize, at(&flat.compute, place.start, kind.elt_size_in_bytes()));
            assert_eq!(leaf.grad().data_ptr() as usize, at(&flat.gradient, place.start, 4));
            assert_eq!(leaf.grad().kind(), Kind::Float);
        }
        let parameters: usize = flat.specs.iter().map(|spec| spec.numel()).sum();
        assert_eq!(flat.gradient.sum(Kind::Float).double_value(&[]), parameters as f64, "a one for each value");
        flat.zero_gradient();
        assert!(
            flat.leaves.0.iter().all(|leaf| leaf.grad().defined() && leaf.grad().abs().max().double_value(&[]) == 0.0)
        );
    }
    Ok(())
}

fn buckets_cover_every_tensor_once() -> Outcome {
    for bytes in [4, 300, 2000, 1 << 20] {
        let events = threads(2, |world| {
            let flat = Flat::new(&table(), 1, Kind::Float, Device::Cpu).expect("buffers");
            let buckets = Buckets::new(&flat, bytes, world.channel("gradients").expect("a channel")).expect("buckets");
            let _ = flat.gradient.shallow_clone().fill_(1.0 + world.rank() as f64);
            buckets.begin();
            buckets.finish(Duration::from_secs(30)).expect("sums");
            // Summed twice would be more than 3, not at all would be less.
            for (i, spec) in flat.specs.iter().enumerate() {
                let part = flat.part(&flat.gradient, i);
                let (low, high) = (part.min().double_value(&[]), part.max().double_value(&[]));
                assert_eq!((low, high), (3.0, 3.0), "{} in buckets of {bytes} bytes", spec.name);
            }
            assert!(!buckets.used().contains(&true), "no gradient came");
            buckets.events().len()
        });
        let wanted = match bytes {
            4 => 6,
            1_048_576 => 1,
            _ => events[0],
        };
        assert_eq!(events, [wanted, wanted], "buckets of {bytes} bytes");
        assert!((1..=6).contains(&wanted));
    }
    Ok(())
}
