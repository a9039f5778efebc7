//! Tests of Audio-MAE against blocks of timm: losses, gradients and weights after three AdamW steps; its masks and
//! positions.

use crate::support::method_ext::MethodExt;
use crate::support::parity::{self, LR, stepper};
use crate::support::{Outcome, normal, oracle, read, root};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::dist::solo::SoloWorld;
use occlude::error::{Error, ExitCode};
use occlude::grid::{Grid, InputConfig};
use occlude::method::audiomae;
use occlude::method::audiomae::AudioMae;
use occlude::method::{Batch, Method};
use occlude::op::shuffle::SampleKey;
use occlude::optim::flat::FlatParams;
use occlude::part::batch::Side;
use occlude::part::encoder::position::PositionAxes;
use occlude::part::mask::{MaskPolicy, TimeFrequencyMask};
use occlude::train::step_mode::can_capture;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

crate::trials![
    window_attention_on_full_clips_matches_timm,
    window_attention_on_short_clips_matches_timm,
    a_global_decoder_with_time_frequency_masks_matches_timm,
    padding_kept_as_input_matches_timm,
    swapped_positions_match_the_official_table,
    time_frequency_masks_hide_whole_rows_and_columns,
    recomputed_blocks_match_bit_for_bit,
    a_step_with_ragged_lengths_is_not_capturable,
    mismatched_settings_are_rejected,
];

const STEPS: usize = 3;

/// A spectrogram of one channel in patches of `patch`.
pub fn input(height: i64, width: i64, patch: i64) -> InputConfig {
    InputConfig { channels: 1, frames: 1, height, width, patch, patch_frames: 1, mean: vec![], std: vec![] }
}

pub fn method(input: &InputConfig, config: &Value) -> Result<AudioMae, Error> {
    AudioMae::new(&serde_json::from_value::<audiomae::Config>(config.clone()).expect("numbers"), input)
}

pub fn shape(width: i64, depth: i64, heads: i64) -> Value {
    json!({"width": width, "depth": depth, "heads": heads})
}

struct Case {
    input: InputConfig,
    config: Value,
    /// Rows of pixels of each sample that are not padding.
    valid: Vec<u32>,
}

fn window_attention_on_full_clips_matches_timm() -> Outcome {
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

/// One sample that ends within a patch, one within a window, one within the first row, and one that fills the grid.
fn window_attention_on_short_clips_matches_timm() -> Outcome {
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

fn a_global_decoder_with_time_frequency_masks_matches_timm() -> Outcome {
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

fn padding_kept_as_input_matches_timm() -> Outcome {
    Case {
        input: input(32, 8, 2),
        config: json!({
            "encoder": shape(16, 1, 2), "decoder": shape(16, 2, 4), "positions": "swapped", "padding": "keep",
        }),
        valid: vec![20, 32, 1],
    }
    .check()
}

impl Case {
    fn check(&self) -> Outcome {
        let method = method(&self.input, &self.config)?;
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS as u64).map(|step| random_clips(&self.input, &self.valid, step)).collect();
        let mut request = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            let mask = method.sample_mask(batch);
            request.push((format!("input.{step}"), batch.view().squeeze_dim(2)));
            request.push((format!("keep.{step}"), mask.keep));
            request.push((format!("drop.{step}"), mask.drop));
        }
        let reply = parity::oracle_reply(
            &["audiomae.py", "steps"],
            &flat,
            &parity::same_name,
            request,
            &self.reference_config(),
        )?;
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &parity::same_name)
    }

    fn reference_config(&self) -> Value {
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
        parity::training_numbers(STEPS, numbers)
    }
}

pub fn origins(samples: usize, epoch: u64) -> Vec<SampleKey> {
    (0..samples as u64).map(|id| SampleKey { id, epoch, repeat: 0 }).collect()
}

/// Noise, also in the padding.
pub fn random_clips(input: &InputConfig, valid: &[u32], step: u64) -> Batch {
    let pixels = normal(step, &[valid.len() as i64, 1, 1, input.height, input.width]);
    Batch::new(pixels, &origins(valid.len(), step), 9)
        .with_side(Side { valid: Some(valid.to_vec()), ..Side::default() })
}

fn swapped_positions_match_the_official_table() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("positions.safetensors");
    for (rows, cols, width) in [(64, 8, 16), (3, 5, 36), (12, 4, 64)] {
        let [r, c, w] = [rows, cols, width].map(|n: i64| n.to_string());
        oracle("audiomae.py", &["positions", &r, &c, &w, path.to_str().unwrap()])?;
        let grid = Grid { frames: 1, rows, cols, channels: 1, patch_frames: 1, patch: 4 };
        let reference = &read(&path)?["positions"];
        let difference = (PositionAxes::Swapped.positions(&grid, width) - reference).abs().max().double_value(&[]);
        assert!(difference <= 1e-6, "a swapped {rows} × {cols} table of width {width} is off by {difference:e}");
        // Token (1, 0) of 64 × 8 has the position of token (8, 0), because rows and columns are swapped.
        let unswapped = PositionAxes::Grid.positions(&grid, width);
        if rows == 64 {
            let rotate =
                |row: Tensor| Tensor::cat(&[row.narrow(0, width / 2, width / 2), row.narrow(0, 0, width / 2)], 0);
            assert!(
                rotate(unswapped.get(8 * 8)).equal(&reference.get(8))
                    && rotate(unswapped.get(1)).equal(&reference.get(64))
            );
        }
        assert!((unswapped - reference).abs().max().double_value(&[]) > 0.1, "it is not the table of the grid");
    }
    Ok(())
}

/// Windows of 4 × 2 on 12 × 4 patches, as in training.
pub fn speech_case() -> (InputConfig, Value) {
    let config = json!({
        "encoder": shape(16, 2, 2), "decoder": shape(16, 3, 2), "mask": {"ratio": 0.7},
        "attention": {"windows": {"size": [4, 2], "shift": [2, 0]}},
    });
    (input(48, 16, 4), config)
}

/// Returns the loss of a step and its gradient.
pub fn step_once(method: AudioMae, micro: &[Batch]) -> Result<(f64, Tensor), Error> {
    let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let mut stepper = stepper(Box::new(method), flat)?;
    let outcome = stepper.step(micro, LR, |_, _| Ok(()))?;
    Ok((outcome.loss, stepper.flat.grad.copy()))
}

pub fn row(tokens: &Tensor, sample: i64) -> Vec<i64> {
    let all: Vec<i64> = Vec::try_from(tokens.get(sample)).expect("numbers");
    let count = all.iter().take_while(|token| **token >= 0).count();
    assert!(all[count..].iter().all(|&token| token == -1), "{all:?}");
    all[..count].to_vec()
}

fn time_frequency_masks_hide_whole_rows_and_columns() -> Outcome {
    let (input, mut config) = speech_case();
    config["mask"] = json!({"time": 0.5, "frequency": 0.3});
    let method = method(&input, &config)?;
    let mask = method.sample_mask(&random_clips(&input, &[48, 28, 3], 0));
    for (sample, rows) in (0..).zip([12i64, 7, 1]) {
        let keep = row(&mask.keep, sample);
        let lines = |of: fn(i64) -> i64| keep.iter().map(|&token| of(token)).collect::<BTreeSet<i64>>().len();
        let moments = lines(|token| token / 4);
        let frequencies = lines(|token| token % 4);
        assert_eq!((moments, frequencies), (((rows / 2) as usize).max(1), 2), "of sample {sample}");
        assert_eq!(keep.len(), moments * frequencies, "where kept rows and columns meet");
        assert_eq!(keep.len() + row(&mask.drop, sample).len(), 4 * rows as usize);
    }
    // The number that the official code keeps for fine-tuning on AudioSet.
    let grid = Grid { frames: 1, rows: 64, cols: 8, channels: 1, patch_frames: 1, patch: 16 };
    for (ratio, visible) in [(0.3, 220), (0.2, 306)] {
        let mask: TimeFrequencyMask = serde_json::from_value(json!({"time": ratio, "frequency": ratio}))?;
        assert_eq!(mask.visible(&grid), visible);
    }
    assert_eq!(TimeFrequencyMask::default().visible(&grid), 102);
    Ok(())
}

fn recomputed_blocks_match_bit_for_bit() -> Outcome {
    let (input, config) = speech_case();
    for attention in [config["attention"].clone(), json!("global")] {
        let mut config = config.clone();
        config["attention"] = attention;
        let micro = || [random_clips(&input, &[48, 17, 32], 0), random_clips(&input, &[9], 1)];
        let mut second = method(&input, &config)?;
        second.model_mut().set_recompute(true);
        let plain = step_once(method(&input, &config)?, &micro())?;
        let second = step_once(second, &micro())?;
        assert!(plain.0 == second.0 && plain.1.equal(&second.1) && plain.1.norm().double_value(&[]) > 0.0);
    }
    Ok(())
}

fn a_step_with_ragged_lengths_is_not_capturable() -> Outcome {
    let (input, mut config) = speech_case();
    let world = SoloWorld::new(Device::Cpu);
    assert!(can_capture(&method(&input, &config)?, &world).is_err_and(|why| why.contains("lengths")));
    config["padding"] = json!("keep");
    let method = method(&input, &config)?;
    assert_eq!(can_capture(&method, &world), Ok(()));
    let counts = |valid: &[u32]| method.denominators(&random_clips(&input, valid, 0));
    assert_eq!(counts(&[1, 48])?, counts(&[48, 48])?);
    Ok(())
}

fn mismatched_settings_are_rejected() -> Outcome {
    let tiny = |line: &str| Config::read(&root().join("configs/tiny/audiomae.json"), &[line.to_owned()]);
    for (line, word) in [
        ("method.audiomae.mask.ratio=1", "method.audiomae.mask.ratio is 1"),
        ("method.audiomae.mask.time=0.5", "has a ratio and time or frequency"),
        ("method.audiomae.mask={}", "ratio, 0.8 in the paper"),
        ("method.audiomae.mask={\"time\": 0.97}", "keeps none of 24 rows"),
        ("method.audiomae.mask={\"time\": 1.5}", "mask.time is 1.5"),
        ("method.audiomae.mask={\"frequency\": 0}", "hides none of 96 patches"),
        ("method.audiomae.attention={\"windows\": {\"size\": [5, 4]}}", "attention.windows: windows of 5 rows"),
        ("method.audiomae.attention={\"windows\": {\"sise\": [4, 4]}}", "did you mean `size`?"),
        ("method.audiomae.positions=swaped", "did you mean `swapped`?"),
        ("input.channels=3", "set both to 1"),
    ] {
        let error = tiny(line).expect_err(line);
        assert!(error.code == ExitCode::Usage && error.message.contains(word), "{line}: {error}");
    }
    let wide: Result<AudioMae, Failed> = method(&InputConfig { channels: 3, ..input(48, 16, 4) }, &speech_case().1)
        .map_err(|error| error.to_string().into());
    assert!(wide.err().is_some_and(|failed| failed.message().is_some_and(|text| text.contains("reads spectrograms"))));
    Ok(())
}
