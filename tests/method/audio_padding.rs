//! Tests of clips that are shorter than the grid: padding does not affect losses, gradients, features, reconstructions
//! or other ranks.

use crate::method::audiomae::{method, origins, random_clips, row, speech_case, step_once};
use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, distance};
use crate::train::step::{BUCKET, LR, stepper};
use occlude::data::order::rank_rows;
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::grid::InputConfig;
use occlude::method::{Batch, Method};
use occlude::op::shuffle::SampleKey;
use occlude::optim::flat::FlatParams;
use occlude::part::batch::Side;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    a_padded_clip_gives_the_loss_of_the_clip_alone,
    the_values_of_padding_do_not_matter,
    any_number_of_ranks_steps_like_one,
    masks_of_all_lengths_are_padded_into_one,
    reconstructions_show_visible_patches_and_padding_unchanged,
];

fn a_padded_clip_gives_the_loss_of_the_clip_alone() -> Outcome {
    let (long, config) = speech_case();
    for attention in [config["attention"].clone(), json!("global")] {
        let mut config = config.clone();
        config["attention"] = attention;
        // Eight of twelve rows of patches: a grid of its own, which windows divide as well.
        let short = InputConfig { height: 32, ..long.clone() };
        let padded = random_clips(&long, &[31, 32, 29], 1);
        let alone = Batch::new(padded.view().narrow(3, 0, 32).contiguous(), &origins(3, 1), 9);
        let with = step_once(method(&long, &config)?, &[padded])?;
        let without = step_once(method(&short, &config)?, &[alone])?;
        assert!((with.0 - without.0).abs() <= 1e-6 * without.0, "{} and {}", with.0, without.0);
        let difference = distance(&with.1, &without.1) / without.1.norm().double_value(&[]);
        assert!(difference <= 1e-6, "gradients are off by {difference:e}");
        // In a batch with longer clips the result is the same: the mean is over all predicted patches.
        let lengths = [48, 30, 48, 9];
        let all = step_once(method(&long, &config)?, &[random_clips(&long, &lengths, 2)])?.0;
        let mut sum = 0.0;
        let mut count = 0.0;
        let full = random_clips(&long, &lengths, 2);
        for (sample, &valid) in (0..).zip(&lengths) {
            let rows = i64::from(valid).div_euclid(4) + i64::from(valid % 4 > 0);
            // The smallest height that windows divide, or that one window holds.
            let local = InputConfig { height: if rows <= 4 { rows } else { (rows + 3) / 4 * 4 } * 4, ..long.clone() };
            let one = Batch::new(
                full.view().narrow(0, sample, 1).narrow(3, 0, local.height).contiguous(),
                &[SampleKey { id: sample as u64, epoch: 2, repeat: 0 }],
                9,
            );
            let method = method(&local, &config)?;
            let one = one.with_side(Side { valid: Some(vec![valid]), ..Side::default() });
            let hidden = method.denominators(&one)?.hidden_tokens;
            sum += step_once(method, &[one])?.0 * hidden;
            count += hidden;
        }
        assert!((all - sum / count).abs() <= 1e-5 * all, "{all} and {}", sum / count);
    }
    Ok(())
}

fn the_values_of_padding_do_not_matter() -> Outcome {
    let (input, config) = speech_case();
    let valid = [48, 17, 32, 2];
    let clean = random_clips(&input, &valid, 3);
    let dirty = random_clips(&input, &valid, 3);
    for (row, valid) in (0..).zip(valid) {
        let start = (i64::from(valid) + 3) / 4 * 4;
        let _ = dirty.view().get(row).narrow(2, start, 48 - start).fill_(f64::NAN);
    }
    let method_ = || method(&input, &config);
    let flat = FlatParams::new(method_()?.params(), 3, Kind::Float, Device::Cpu)?;
    let features = |batch| no_grad(|| method_()?.encode(&flat.leaves, batch));
    let a = features(&clean)?;
    let b = features(&dirty)?;
    assert!(a.mean.equal(&b.mean) && a.class.expect("one").equal(&b.class.expect("one")), "features");
    // One feature row per sample, in the order of samples.
    let last = Batch::new(clean.view().narrow(0, 3, 1), &origins(1, 3), 9)
        .with_side(Side { valid: Some(vec![2]), ..Side::default() });
    assert!(distance(&features(&last)?.mean.get(0), &a.mean.get(3)) < 1e-5);
    let clean = step_once(method_()?, &[clean])?;
    let dirty = step_once(method_()?, &[dirty])?;
    assert!(clean.0.is_finite() && clean.0 == dirty.0 && clean.1.equal(&dirty.1), "a step");
    Ok(())
}

/// Trains some steps on clips of all lengths; returns the losses and the weights.
fn train(world: Arc<dyn World>, micro: usize) -> (Vec<f64>, Tensor) {
    const BATCH: u64 = 7;
    let (input, config) = speech_case();
    let mut stepper = stepper(method(&input, &config).expect("a method"), world.clone(), Kind::Float, BUCKET);
    let mut losses = Vec::new();
    for step in 0..4u64 {
        let valid: Vec<u32> = (0..BATCH).map(|row| 1 + ((row * 7 + step * 5) % 48) as u32).collect();
        let full = random_clips(&input, &valid, step);
        let local = rank_rows(BATCH, world.rank(), world.size());
        let mut batches = Vec::new();
        for first in local.clone().step_by(micro) {
            let rows = first as usize..(first as usize + micro).min(local.end as usize);
            batches.push(full.slice(rows).expect("rows"));
        }
        losses.push(stepper.step(&batches, LR, |_, _| Ok(())).expect("a step").loss);
    }
    // Gradients of biases that softmax cancels are pure rounding.
    let visible = |name: &str| !name.ends_with("qkv.bias") && !name.ends_with("meta_mlp.fc2.bias");
    let flat = &stepper.flat;
    let parts = flat.specs.iter().enumerate().filter(|(_, spec)| visible(&spec.name));
    let parts: Vec<Tensor> = parts.map(|(i, _)| flat.param_view(&flat.master, i).reshape(-1)).collect();
    (losses, Tensor::cat(&parts, 0))
}

fn any_number_of_ranks_steps_like_one() -> Outcome {
    let alone = train(Arc::new(SoloWorld::new(Device::Cpu)), 7);
    for (ranks, micro) in [(1, 2), (2, 4), (3, 1), (8, 1)] {
        for (losses, weights) in run_on_threads(ranks, |world| train(world, micro)) {
            for (step, (loss, expected)) in losses.iter().zip(&alone.0).enumerate() {
                let difference = (loss - expected).abs() / expected;
                assert!(difference <= 2e-5, "{ranks} ranks, step {step}: {loss} and {expected}");
            }
            let difference = (weights - &alone.1).abs().max().double_value(&[]);
            assert!(
                difference <= 0.1 * LR * 4.0,
                "{ranks} ranks, micro-batches of {micro}: weights are off by {difference:e}"
            );
        }
    }
    Ok(())
}

fn masks_of_all_lengths_are_padded_into_one() -> Outcome {
    let (input, config) = speech_case();
    let method = method(&input, &config)?;
    let valid = [48, 1, 20, 48, 5];
    let batch = random_clips(&input, &valid, 0);
    let mask = method.sample_mask(&batch);
    assert_eq!((mask.keep.size(), mask.drop.size()), (vec![5, 14], vec![5, 34]), "of 48 tokens 14 are kept");
    let restore = mask.restore();
    let mut hidden = 0;
    for (sample, tokens) in (0..).zip([48, 4, 20, 48, 8]) {
        let keep = row(&mask.keep, sample);
        let drop = row(&mask.drop, sample);
        assert_eq!(keep.len(), ((tokens as f64 * 0.3) as usize).max(1), "sample {sample}");
        let all: BTreeSet<i64> = keep.iter().chain(&drop).copied().collect();
        assert_eq!(all, (0..tokens).collect(), "its own tokens, and no others");
        let both = [Vec::<i64>::try_from(mask.keep.get(sample))?, Vec::try_from(mask.drop.get(sample))?].concat();
        for (token, position) in (0..).zip(Vec::<i64>::try_from(restore.get(sample))?) {
            if token < tokens { assert_eq!(both[position as usize], token) } else { assert_eq!(position, -1) }
        }
        hidden += drop.len();
    }
    assert_eq!(method.denominators(&batch)?.hidden_tokens, hidden as f64);
    Ok(())
}

fn reconstructions_show_visible_patches_and_padding_unchanged() -> Outcome {
    let (input, config) = speech_case();
    let method = method(&input, &config)?;
    let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let valid = [48, 18];
    let batch = random_clips(&input, &valid, 0);
    let visible = no_grad(|| method.draw(&flat.leaves, &batch))?;
    let mask = method.sample_mask(&batch);
    for sample in 0..2 {
        let drop: BTreeSet<i64> = row(&mask.drop, sample).into_iter().collect();
        for token in 0..48 {
            let patch = |x: &Tensor| {
                x.get(sample).select(1, 0).narrow(1, token / 4 * 4, 4).narrow(2, token % 4 * 4, 4).contiguous()
            };
            let same = |x: &Tensor| patch(x).equal(&patch(&visible.original));
            let hidden = drop.contains(&token);
            assert_eq!(
                [same(&visible.masked), same(&visible.predicted)],
                [!hidden; 2],
                "token {token} of sample {sample}"
            );
        }
    }
    Ok(())
}
