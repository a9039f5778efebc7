//! Sounds that are shorter than the grid: what lies behind them might as well not be there, for losses, gradients,
//! features, pictures and other ranks.

use crate::audio_mae::{method, origins, row, sounds, speech, stepped};
use crate::step::{BUCKET, LR, stepper};
use crate::support::{Outcome, distance};
use occlude::data::order::rows;
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::grid::Input;
use occlude::method::{Batch, Method};
use occlude::op::shuffle::Origin;
use occlude::optim::flat::Flat;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    a_short_sound_is_worth_what_it_is_alone,
    nobody_reads_what_is_left_out,
    any_number_of_ranks_steps_like_one,
    masks_of_sounds_of_all_lengths_stand_in_one,
    a_picture_shows_what_is_visible_and_padding_as_they_are,
];

fn a_short_sound_is_worth_what_it_is_alone() -> Outcome {
    let (long, config) = speech();
    for attention in [config["attention"].clone(), json!("global")] {
        let mut config = config.clone();
        config["attention"] = attention;
        // Eight of twelve rows of patches: a grid of its own, which windows divide too.
        let short = Input { height: 32, ..long.clone() };
        let padded = sounds(&long, &[31, 32, 29], 1);
        let alone = Batch::new(padded.pixels.narrow(3, 0, 32).contiguous(), &origins(3, 1), 9);
        let (with, without) =
            (stepped(method(&long, &config)?, &[padded])?, stepped(method(&short, &config)?, &[alone])?);
        assert!((with.0 - without.0).abs() <= 1e-6 * without.0, "{} and {}", with.0, without.0);
        let off = distance(&with.1, &without.1) / without.1.norm().double_value(&[]);
        assert!(off <= 1e-6, "gradients are off by {off:e}");
        // Beside long ones it is as good: the mean is over all patches that are guessed.
        let lengths = [48, 30, 48, 9];
        let all = stepped(method(&long, &config)?, &[sounds(&long, &lengths, 2)])?.0;
        let (mut sum, mut count) = (0.0, 0.0);
        let whole = sounds(&long, &lengths, 2);
        for (sample, &valid) in (0..).zip(&lengths) {
            let rows = i64::from(valid).div_euclid(4) + i64::from(valid % 4 > 0);
            // Up to where windows divide it, or one holds it.
            let own = Input { height: if rows <= 4 { rows } else { (rows + 3) / 4 * 4 } * 4, ..long.clone() };
            let one = Batch::new(
                whole.pixels.narrow(0, sample, 1).narrow(3, 0, own.height).contiguous(),
                &[Origin { id: sample as u64, epoch: 2, repeat: 0 }],
                9,
            );
            let method = method(&own, &config)?;
            let counted = method.counts_of(&[valid])[0].1;
            sum += stepped(method, &[one.with_valid(Some(vec![valid]))])?.0 * counted;
            count += counted;
        }
        assert!((all - sum / count).abs() <= 1e-5 * all, "{all} and {}", sum / count);
    }
    Ok(())
}

fn nobody_reads_what_is_left_out() -> Outcome {
    let (input, config) = speech();
    let valid = [48, 17, 32, 2];
    let clean = sounds(&input, &valid, 3);
    let dirty = sounds(&input, &valid, 3);
    for (row, valid) in (0..).zip(valid) {
        let begun = (i64::from(valid) + 3) / 4 * 4;
        let _ = dirty.pixels.get(row).narrow(2, begun, 48 - begun).fill_(f64::NAN);
    }
    let method_ = || method(&input, &config);
    let flat = Flat::new(method_()?.table(), 3, Kind::Float, Device::Cpu)?;
    let features = |batch| no_grad(|| method_()?.features(&flat.leaves, batch));
    let (a, b) = (features(&clean)?, features(&dirty)?);
    assert!(a.mean.equal(&b.mean) && a.class.expect("one").equal(&b.class.expect("one")), "features");
    // As many features as samples, in their order.
    let last = Batch::new(clean.pixels.narrow(0, 3, 1), &origins(1, 3), 9).with_valid(Some(vec![2]));
    assert!(distance(&features(&last)?.mean.get(0), &a.mean.get(3)) < 1e-5);
    let (clean, dirty) = (stepped(method_()?, &[clean])?, stepped(method_()?, &[dirty])?);
    assert!(clean.0.is_finite() && clean.0 == dirty.0 && clean.1.equal(&dirty.1), "a step");
    Ok(())
}

/// What is left of a training of some steps over sounds of all lengths: its losses and the weights.
fn trained(world: Arc<dyn World>, micro: usize) -> (Vec<f64>, Tensor) {
    const BATCH: u64 = 7;
    let (input, config) = speech();
    let mut stepper = stepper(method(&input, &config).expect("a method"), world.clone(), Kind::Float, BUCKET);
    let mut losses = Vec::new();
    for step in 0..4u64 {
        let valid: Vec<u32> = (0..BATCH).map(|row| 1 + ((row * 7 + step * 5) % 48) as u32).collect();
        let whole = sounds(&input, &valid, step);
        let own: Vec<i64> = rows(BATCH, world.rank(), world.size()).map(|row| row as i64).collect();
        let batches: Vec<Batch> = own
            .chunks(micro)
            .map(|own| Batch {
                pixels: whole.pixels.narrow(0, own[0], own.len() as i64),
                origins: whole.origins.narrow(1, own[0], own.len() as i64),
                valid: Some(own.iter().map(|&row| valid[row as usize]).collect()),
                text: None,
                seed: 9,
            })
            .collect();
        losses.push(stepper.step(&batches, LR, |_, _| Ok(())).expect("a step").loss);
    }
    // Gradients of biases that softmax does not see are pure rounding.
    let seen = |name: &str| !name.ends_with("qkv.bias") && !name.ends_with("meta_mlp.fc2.bias");
    let flat = &stepper.flat;
    let parts = flat.specs.iter().enumerate().filter(|(_, spec)| seen(&spec.name));
    let parts: Vec<Tensor> = parts.map(|(i, _)| flat.part(&flat.master, i).reshape(-1)).collect();
    (losses, Tensor::cat(&parts, 0))
}

fn any_number_of_ranks_steps_like_one() -> Outcome {
    let alone = trained(Arc::new(Solo::new(Device::Cpu)), 7);
    for (ranks, micro) in [(1, 2), (2, 4), (3, 1), (8, 1)] {
        for (losses, weights) in threads(ranks, |world| trained(world, micro)) {
            for (step, (loss, wanted)) in losses.iter().zip(&alone.0).enumerate() {
                let off = (loss - wanted).abs() / wanted;
                assert!(off <= 2e-5, "{ranks} ranks, step {step}: {loss} and {wanted}");
            }
            let off = (weights - &alone.1).abs().max().double_value(&[]);
            assert!(off <= 0.1 * LR * 4.0, "{ranks} ranks, micro-batches of {micro}: weights are off by {off:e}");
        }
    }
    Ok(())
}

fn masks_of_sounds_of_all_lengths_stand_in_one() -> Outcome {
    let (input, config) = speech();
    let method = method(&input, &config)?;
    let valid = [48, 1, 20, 48, 5];
    let batch = sounds(&input, &valid, 0);
    let mask = method.mask(&batch);
    assert_eq!((mask.keep.size(), mask.drop.size()), (vec![5, 14], vec![5, 34]), "of 48 tokens 14 are kept");
    let (restore, mut hidden) = (mask.restore(), 0);
    for (sample, tokens) in (0..).zip([48, 4, 20, 48, 8]) {
        let (keep, drop) = (row(&mask.keep, sample), row(&mask.drop, sample));
        assert_eq!(keep.len(), ((tokens as f64 * 0.3) as usize).max(1), "sample {sample}");
        let all: BTreeSet<i64> = keep.iter().chain(&drop).copied().collect();
        assert_eq!(all, (0..tokens).collect(), "its own tokens, and no others");
        let both = [Vec::<i64>::try_from(mask.keep.get(sample))?, Vec::try_from(mask.drop.get(sample))?].concat();
        for (token, place) in (0..).zip(Vec::<i64>::try_from(restore.get(sample))?) {
            match token < tokens {
                true => assert_eq!(both[place as usize], token),
                false => assert_eq!(place, -1),
            }
        }
        hidden += drop.len();
    }
    assert_eq!(method.counts_of(&valid), [("pixel", hidden as f64)]);
    assert_eq!(method.counts(5), method.counts_of(&[48; 5]));
    Ok(())
}

fn a_picture_shows_what_is_visible_and_padding_as_they_are() -> Outcome {
    let (input, config) = speech();
    let method = method(&input, &config)?;
    let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
    let valid = [48, 18];
    let batch = sounds(&input, &valid, 0);
    let shown = no_grad(|| method.reconstruct(&flat.leaves, &batch))?;
    let mask = method.mask(&batch);
    for sample in 0..2 {
        let drop: BTreeSet<i64> = row(&mask.drop, sample).into_iter().collect();
        for token in 0..48 {
            let patch = |x: &Tensor| {
                x.get(sample).select(1, 0).narrow(1, token / 4 * 4, 4).narrow(2, token % 4 * 4, 4).contiguous()
            };
            let same = |x: &Tensor| patch(x).equal(&patch(&shown.original));
            let hidden = drop.contains(&token);
            assert_eq!([same(&shown.masked), same(&shown.guessed)], [!hidden; 2], "token {token} of sample {sample}");
        }
    }
    Ok(())
}
