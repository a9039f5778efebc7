//! Audio-MAE against timm's blocks put together: losses, gradients and weights after three AdamW steps; its
//! masks and positions.

use crate::parity::{self, LR, stepper};
use crate::support::{Outcome, normal, oracle, read, root};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::fault::{Code, Fault};
use occlude::grid::{Grid, Input};
use occlude::method::audio_mae::{self, AudioMae};
use occlude::method::{Batch, Method};
use occlude::op::shuffle::Origin;
use occlude::optim::flat::Flat;
use occlude::part::encoder::position::Axes;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

crate::trials![
    windows_over_whole_sounds_agree,
    windows_over_short_sounds_agree,
    a_global_decoder_under_lines_agrees,
    padding_as_good_as_sound_agrees,
    swapped_positions_are_the_official_table,
    moments_and_frequencies_are_hidden_whole,
    blocks_run_again_in_backward_give_the_same_to_the_bit,
    a_step_that_goes_by_lengths_is_not_captured,
    what_does_not_fit_is_refused,
];

const STEPS: usize = 3;

/// A spectrogram of one channel in patches of `patch`.
pub fn input(height: i64, width: i64, patch: i64) -> Input {
    Input { channels: 1, frames: 1, height, width, patch, patch_frames: 1, mean: vec![], std: vec![] }
}

pub fn method(input: &Input, config: &Value) -> Result<AudioMae, Fault> {
    AudioMae::new(&serde_json::from_value::<audio_mae::Config>(config.clone()).expect("numbers"), input)
}

pub fn shape(width: i64, depth: i64, heads: i64) -> Value {
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
        let flat = parity::moved(&method)?;
        let batches: Vec<Batch> = (0..STEPS as u64).map(|step| sounds(&self.input, &self.valid, step)).collect();
        let mut asked = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            let mask = method.mask(batch);
            asked.push((format!("input.{step}"), batch.pixels.squeeze_dim(2)));
            asked.push((format!("keep.{step}"), mask.keep));
            asked.push((format!("drop.{step}"), mask.drop));
        }
        let reply = parity::reply(&["audio_mae.py", "steps"], &flat, &parity::ours, asked, &self.theirs())?;
        parity::agree(Box::new(method), flat, batches, &reply, &parity::ours)
    }

    fn theirs(&self) -> Value {
        let numbers = |part: &str| json!([self.config[part]["depth"], self.config[part]["heads"]]);
        let windows = match &self.config["attention"] {
            Value::Null => json!({"size": [4, 4], "shift": [2, 0]}),
            other => other["windows"].clone(),
        };
        let numbers = json!({
            "encoder": numbers("encoder"), "decoder": numbers("decoder"), "patch": self.input.patch,
            "window": windows["size"], "shift": windows["shift"], "swapped": self.config["positions"] == "swapped",
            "normalize": self.config["target"]["normalize"] != false,
        });
        parity::training(STEPS, numbers)
    }
}

pub fn origins(samples: usize, epoch: u64) -> Vec<Origin> {
    (0..samples as u64).map(|id| Origin { id, epoch, repeat: 0 }).collect()
}

/// Noise, in padding too.
pub fn sounds(input: &Input, valid: &[u32], step: u64) -> Batch {
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
pub fn speech() -> (Input, Value) {
    let config = json!({
        "encoder": shape(16, 2, 2), "decoder": shape(16, 3, 2), "mask": {"ratio": 0.7},
        "attention": {"windows": {"size": [4, 2], "shift": [2, 0]}},
    });
    (input(48, 16, 4), config)
}

/// The loss of a step, and its gradient.
pub fn stepped(method: AudioMae, micro: &[Batch]) -> Result<(f64, Tensor), Fault> {
    let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
    let mut stepper = stepper(Box::new(method), flat)?;
    let outcome = stepper.step(micro, LR, |_, _| Ok(()))?;
    Ok((outcome.loss, stepper.flat.gradient.copy()))
}

pub fn row(tokens: &Tensor, sample: i64) -> Vec<i64> {
    let all: Vec<i64> = Vec::try_from(tokens.get(sample)).expect("numbers");
    let there = all.iter().take_while(|token| **token >= 0).count();
    assert!(all[there..].iter().all(|&token| token == -1), "{all:?}");
    all[..there].to_vec()
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

fn what_does_not_fit_is_refused() -> Outcome {
    let tiny = |line: &str| Config::read(&root().join("configs/tiny/audio_mae.json"), &[line.to_owned()]);
    for (line, word) in [
        ("method.audio_mae.mask.ratio=1", "method.audio_mae.mask.ratio is 1"),
        ("method.audio_mae.mask.time=0.5", "has a ratio and time or frequency"),
        ("method.audio_mae.mask={}", "ratio, 0.8 in the paper"),
        ("method.audio_mae.mask={\"time\": 0.97}", "keeps none of 24 rows"),
        ("method.audio_mae.mask={\"time\": 1.5}", "mask.time is 1.5"),
        ("method.audio_mae.mask={\"frequency\": 0}", "hides none of 96 patches"),
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
