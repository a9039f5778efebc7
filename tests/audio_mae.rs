//! Audio-MAE against timm's blocks put together: losses, gradients and weights after three AdamW steps; padding, which
//! might as well not be there; its masks.

use crate::step::{BUCKET, LR, SOON, stepper as tiny_stepper};
use crate::support::{Outcome, Tensors, distance, normal, oracle, read, root, write};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::order::rows;
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::fault::{Code, Fault};
use occlude::grid::{Grid, Input};
use occlude::method::audio_mae::{self, AudioMae};
use occlude::method::{Batch, Method};
use occlude::op::shuffle::Origin;
use occlude::optim::{flat::Flat, update, update::Updater};
use occlude::part::encoder::position::Axes;
use occlude::run::step::Stepper;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    windows_over_whole_sounds_agree,
    windows_over_short_sounds_agree,
    a_global_decoder_under_lines_agrees,
    padding_as_good_as_sound_agrees,
    swapped_positions_are_the_official_table,
    a_short_sound_is_worth_what_it_is_alone,
    nobody_reads_what_is_left_out,
    any_number_of_ranks_steps_like_one,
    masks_of_sounds_of_all_lengths_stand_in_one,
    moments_and_frequencies_are_hidden_whole,
    blocks_run_again_in_backward_give_the_same_to_the_bit,
    a_step_that_goes_by_lengths_is_not_captured,
    a_picture_shows_what_is_visible_and_padding_as_they_are,
    what_does_not_fit_is_refused,
];

const STEPS: usize = 3;
const DECAY: f64 = 0.05;

/// A spectrogram of one channel in patches of `patch`.
fn input(height: i64, width: i64, patch: i64) -> Input {
    Input { channels: 1, frames: 1, height, width, patch, patch_frames: 1, mean: vec![], std: vec![] }
}

fn method(input: &Input, config: &Value) -> Result<AudioMae, Fault> {
    AudioMae::new(&serde_json::from_value::<audio_mae::Config>(config.clone()).expect("numbers"), input)
}

fn shape(width: i64, depth: i64, heads: i64) -> Value {
    json!({"width": width, "depth": depth, "heads": heads})
}

struct Case {
    input: Input,
    config: Value,
    /// Rows of pixels of each sample that are sound.
    valid: Vec<u32>,
}

fn windows_over_whole_sounds_agree() -> Outcome {
    Case {
        input: input(48, 24, 4),
        config: json!({
            "encoder": shape(24, 2, 3), "decoder": shape(20, 3, 2), "mask": {"ratio": 0.7},
            "attention": {"windows": {"size": [4, 3], "shift": [2, 0]}},
        }),
        valid: vec![48; 4],
    }
    .check()
}

/// One that ends amid a patch, one amid a window, one within the first row, one that fills the grid.
fn windows_over_short_sounds_agree() -> Outcome {
    Case {
        input: input(40, 15, 5),
        config: json!({
            "encoder": shape(20, 1, 2), "decoder": shape(24, 4, 3),
            "attention": {"windows": {"size": [4, 3], "shift": [3, 1]}},
        }),
        valid: vec![33, 25, 3, 40, 25, 20],
    }
    .check()
}

fn a_global_decoder_under_lines_agrees() -> Outcome {
    Case {
        input: input(36, 30, 6),
        config: json!({
            "encoder": shape(44, 2, 11), "decoder": shape(28, 2, 7), "attention": "global",
            "mask": {"time": 0.5, "frequency": 0.4}, "target": {"normalize": false}, "positions": "swapped",
        }),
        valid: vec![36, 12, 31],
    }
    .check()
}

fn padding_as_good_as_sound_agrees() -> Outcome {
    Case {
        input: input(32, 8, 2),
        config: json!({
            "encoder": shape(16, 1, 2), "decoder": shape(16, 2, 4), "positions": "swapped", "padding": "seen",
        }),
        valid: vec![20, 32, 1],
    }
    .check()
}

impl Case {
    fn check(&self) -> Outcome {
        let method = method(&self.input, &self.config)?;
        let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
        // Biases and scales begin at 0 and 1, which would hide a mistake: move everything a little.
        let _ = flat.master.shallow_clone().g_add_(&(normal(1, &flat.master.size()) * 0.02));
        let batches: Vec<Batch> = (0..STEPS as u64).map(|step| sounds(&self.input, &self.valid, step)).collect();
        let parts = flat.specs.iter().enumerate();
        let mut asked: Vec<(String, Tensor)> =
            parts.map(|(i, spec)| (format!("weight.{}", spec.name), flat.part(&flat.master, i))).collect();
        for (step, batch) in batches.iter().enumerate() {
            let mask = method.mask(batch);
            asked.push((format!("input.{step}"), batch.pixels.squeeze_dim(2)));
            asked.push((format!("keep.{step}"), mask.keep));
            asked.push((format!("drop.{step}"), mask.drop));
        }
        let folder = tempfile::tempdir()?;
        let (request, reply) = (folder.path().join("request.safetensors"), folder.path().join("reply.safetensors"));
        write(&request, &asked)?;
        let words = ["steps", request.to_str().unwrap(), reply.to_str().unwrap(), &self.theirs()];
        oracle("audio_mae.py", &words)?;
        let reply = read(&reply)?;

        let mut stepper = stepper(Box::new(method), flat)?;
        for (step, batch) in batches.into_iter().enumerate() {
            let outcome = stepper.step(&[batch], LR, |stepper, _| {
                if step == 0 {
                    check_gradients(stepper, &reply);
                }
                Ok(())
            })?;
            let theirs = reply[&format!("loss.{step}")].double_value(&[0]);
            let off = (outcome.loss - theirs).abs() / theirs;
            assert!(off <= 1e-5, "loss of step {step}: {} against {theirs}, off by {off:e}", outcome.loss);
        }
        for (index, spec) in stepper.flat.specs.iter().enumerate() {
            let name = &spec.name;
            let off = stepper.flat.part(&stepper.flat.master, index) - &reply[&format!("weight.{name}")];
            // Softmax sees neither a bias of all keys nor one of all scores: gradients of pure rounding, which AdamW blows
            // up to ±lr.
            if name.ends_with("qkv.bias") {
                let _ = off.chunk(3, 0)[1].zero_();
            } else if name.ends_with("meta_mlp.fc2.bias") {
                continue;
            }
            let off = off.abs().max().double_value(&[]);
            assert!(off <= 0.1 * LR * STEPS as f64, "{name} is off by {off:e} after {STEPS} steps");
        }
        Ok(())
    }

    fn theirs(&self) -> String {
        let numbers = |part: &str| json!([self.config[part]["depth"], self.config[part]["heads"]]);
        let windows = match &self.config["attention"] {
            Value::Null => json!({"size": [4, 4], "shift": [2, 0]}),
            other => other["windows"].clone(),
        };
        json!({
            "encoder": numbers("encoder"), "decoder": numbers("decoder"), "patch": self.input.patch,
            "window": windows["size"], "shift": windows["shift"], "swapped": self.config["positions"] == "swapped",
            "normalize": self.config["target"]["normalize"] != false, "steps": STEPS, "lr": LR, "weight_decay": DECAY,
        })
        .to_string()
    }
}

fn check_gradients(stepper: &Stepper, reply: &Tensors) {
    let theirs: Vec<&Tensor> = reply.iter().filter(|(name, _)| name.starts_with("grad.")).map(|(_, t)| t).collect();
    assert_eq!(theirs.len(), stepper.flat.specs.len(), "as many gradients as tensors");
    let greatest = theirs.iter().map(|t| t.abs().max().double_value(&[])).fold(0.0, f64::max);
    for (index, spec) in stepper.flat.specs.iter().enumerate() {
        let (name, ours) = (&spec.name, stepper.flat.part(&stepper.flat.gradient, index).to_kind(Kind::Double));
        let wanted = &reply[&format!("grad.{name}")];
        assert_eq!(ours.size(), wanted.size(), "{name}");
        let (off, norm) = (distance(&ours, wanted), wanted.norm().double_value(&[]));
        let within = 1e-5 * norm + 1e-7 * greatest;
        assert!(off <= within, "gradient of {name}: ‖Δ‖ = {off:e}, ‖g‖ = {norm:e}, allowed {within:e}");
    }
}

fn stepper(method: Box<dyn Method>, flat: Flat) -> Result<Stepper, Fault> {
    let optim = json!({"lr": LR, "weight_decay": DECAY, "betas": [0.9, 0.95]});
    let optim: update::Config = serde_json::from_value(optim).expect("numbers");
    let updater = Updater::new(&flat, &optim);
    Stepper::new(method, flat, updater, Arc::new(Solo::new(Device::Cpu)), 1 << 16, SOON)
}

fn origins(samples: usize, epoch: u64) -> Vec<Origin> {
    (0..samples as u64).map(|id| Origin { id, epoch, repeat: 0 }).collect()
}

/// Noise, in padding too.
fn sounds(input: &Input, valid: &[u32], step: u64) -> Batch {
    let pixels = normal(step, &[valid.len() as i64, 1, 1, input.height, input.width]);
    Batch::new(pixels, &origins(valid.len(), step), 9).with_valid(Some(valid.to_vec()))
}

fn swapped_positions_are_the_official_table() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("positions.safetensors");
    for (rows, cols, width) in [(64, 8, 16), (3, 5, 36), (12, 4, 64)] {
        let [r, c, w] = [rows, cols, width].map(|n: i64| n.to_string());
        oracle("audio_mae.py", &["positions", &r, &c, &w, path.to_str().unwrap()])?;
        let grid = Grid { frames: 1, rows, cols, channels: 1, patch_frames: 1, patch: 4 };
        let theirs = &read(&path)?["positions"];
        let off = (Axes::Swapped.table(&grid, width) - theirs).abs().max().double_value(&[]);
        assert!(off <= 1e-6, "a swapped {rows} × {cols} table of width {width} is off by {off:e}");
        // Token (1, 0) of 64 × 8 has the place of token (8, 0), as columns have it.
        let own = Axes::Grid.table(&grid, width);
        if rows == 64 {
            let turned =
                |row: Tensor| Tensor::cat(&[row.narrow(0, width / 2, width / 2), row.narrow(0, 0, width / 2)], 0);
            assert!(turned(own.get(8 * 8)).equal(&theirs.get(8)) && turned(own.get(1)).equal(&theirs.get(64)));
        }
        assert!((own - theirs).abs().max().double_value(&[]) > 0.1, "it is not the table of the grid");
    }
    Ok(())
}

/// Windows of 4 × 2 on 12 × 4 patches, as in training.
fn speech() -> (Input, Value) {
    let config = json!({
        "encoder": shape(16, 2, 2), "decoder": shape(16, 3, 2), "mask": {"ratio": 0.7},
        "attention": {"windows": {"size": [4, 2], "shift": [2, 0]}},
    });
    (input(48, 16, 4), config)
}

/// The loss of a step, and its gradient.
fn stepped(method: AudioMae, micro: &[Batch]) -> Result<(f64, Tensor), Fault> {
    let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
    let mut stepper = stepper(Box::new(method), flat)?;
    let outcome = stepper.step(micro, LR, |_, _| Ok(()))?;
    Ok((outcome.loss, stepper.flat.gradient.copy()))
}

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
    let mut stepper = tiny_stepper(method(&input, &config).expect("a method"), world.clone(), Kind::Float, BUCKET);
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

fn row(tokens: &Tensor, sample: i64) -> Vec<i64> {
    let all: Vec<i64> = Vec::try_from(tokens.get(sample)).expect("numbers");
    let there = all.iter().take_while(|token| **token >= 0).count();
    assert!(all[there..].iter().all(|&token| token == -1), "{all:?}");
    all[..there].to_vec()
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

fn moments_and_frequencies_are_hidden_whole() -> Outcome {
    let (input, mut config) = speech();
    config["mask"] = json!({"time": 0.5, "frequency": 0.3});
    let method = method(&input, &config)?;
    let mask = method.mask(&sounds(&input, &[48, 28, 3], 0));
    for (sample, rows) in (0..).zip([12i64, 7, 1]) {
        let keep = row(&mask.keep, sample);
        let lines = |of: fn(i64) -> i64| keep.iter().map(|&token| of(token)).collect::<BTreeSet<i64>>().len();
        let (moments, frequencies) = (lines(|token| token / 4), lines(|token| token % 4));
        assert_eq!((moments, frequencies), (((rows / 2) as usize).max(1), 2), "of sample {sample}");
        assert_eq!(keep.len(), moments * frequencies, "where kept lines meet");
        assert_eq!(keep.len() + row(&mask.drop, sample).len(), 4 * rows as usize);
    }
    // As many as the official code keeps for fine-tuning on AudioSet.
    let grid = Grid { frames: 1, rows: 64, cols: 8, channels: 1, patch_frames: 1, patch: 16 };
    for (share, kept) in [(0.3, 220), (0.2, 306)] {
        let lines: occlude::part::mask::Lines = serde_json::from_value(json!({"time": share, "frequency": share}))?;
        assert_eq!(lines.kept(&grid), kept);
    }
    assert_eq!(occlude::part::mask::Lines::default().kept(&grid), 102);
    Ok(())
}

fn blocks_run_again_in_backward_give_the_same_to_the_bit() -> Outcome {
    let (input, config) = speech();
    for attention in [config["attention"].clone(), json!("global")] {
        let mut config = config.clone();
        config["attention"] = attention;
        let micro = || [sounds(&input, &[48, 17, 32], 0), sounds(&input, &[9], 1)];
        let mut again = method(&input, &config)?;
        again.recompute();
        let (plain, again) = (stepped(method(&input, &config)?, &micro())?, stepped(again, &micro())?);
        assert!(plain.0 == again.0 && plain.1.equal(&again.1) && plain.1.norm().double_value(&[]) > 0.0);
    }
    Ok(())
}

fn a_step_that_goes_by_lengths_is_not_captured() -> Outcome {
    let (input, mut config) = speech();
    assert!(method(&input, &config)?.capturable().is_err_and(|why| why.contains("lengths")));
    config["padding"] = json!("seen");
    assert_eq!(method(&input, &config)?.capturable(), Ok(()));
    assert_eq!(method(&input, &config)?.counts_of(&[1, 48]), method(&input, &config)?.counts(2));
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

fn what_does_not_fit_is_refused() -> Outcome {
    let tiny = |line: &str| Config::read(&root().join("configs/tiny/audio_mae.json"), &[line.to_owned()]);
    for (line, word) in [
        ("method.audio_mae.mask.ratio=1", "method.audio_mae.mask.ratio is 1"),
        ("method.audio_mae.mask.time=0.5", "has a ratio and time or frequency"),
        ("method.audio_mae.mask={}", "ratio, 0.8 in the paper"),
        ("method.audio_mae.mask={\"time\": 0.95}", "keeps none of 12 rows"),
        ("method.audio_mae.mask={\"time\": 1.5}", "mask.time is 1.5"),
        ("method.audio_mae.mask={\"frequency\": 0}", "hides none of 48 patches"),
        ("method.audio_mae.attention={\"windows\": {\"size\": [5, 4]}}", "attention.windows: windows of 5 rows"),
        ("method.audio_mae.attention={\"windows\": {\"sise\": [4, 4]}}", "did you mean `size`?"),
        ("method.audio_mae.positions=swaped", "did you mean `swapped`?"),
        ("input.channels=3", "set both to 1"),
    ] {
        let fault = tiny(line).expect_err(line);
        assert!(fault.code == Code::Usage && fault.message.contains(word), "{line}: {fault}");
    }
    let wide: Result<AudioMae, Failed> =
        method(&Input { channels: 3, ..input(48, 16, 4) }, &speech().1).map_err(|fault| fault.to_string().into());
    assert!(wide.err().is_some_and(|failed| failed.message().is_some_and(|text| text.contains("reads spectrograms"))));
    Ok(())
}
