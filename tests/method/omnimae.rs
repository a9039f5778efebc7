//! Tests of OmniMAE against layers of other implementations, on images and clips: losses, gradients and weights after
//! AdamW steps on either; its masks; and that it learns both.

use crate::method::videomae::{blank_batch, clips, rows, shape};
use crate::support::method_ext::MethodExt;
use crate::support::parity::{self, LR, stepper};
use crate::support::{Outcome, normal, root};
use occlude::config::Config;
use occlude::error::{Error, ExitCode};
use occlude::grid::InputConfig;
use occlude::method::{Batch, Method, omnimae};
use occlude::optim::flat::FlatParams;
use occlude::part::params::Init;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    clips_match_the_reference,
    images_match_the_reference,
    alternating_grayscale_images_and_clips_match_the_reference,
    alternating_color_images_and_clips_match_the_reference,
    the_number_of_hidden_tokens_matches_the_official_recipe,
    the_mask_of_a_clip_is_not_a_tube,
    initialization_matches_the_official_code,
    bytes_and_normalized_pixels_give_the_same_loss,
    reconstructions_show_visible_patches_unchanged,
    images_and_clips_train_every_tensor,
    an_invalid_config_is_rejected,
    it_learns_images_and_clips,
];

struct Case {
    batch: i64,
    input: InputConfig,
    encoder: [i64; 3],
    decoder: [i64; 3],
    /// For each step, true for images.
    steps: &'static [bool],
}

fn grayscale_case(steps: &'static [bool]) -> Case {
    let mean = vec![0.0];
    let std = vec![1.0];
    Case {
        batch: 5,
        input: InputConfig { channels: 1, frames: 6, height: 20, width: 20, patch: 4, patch_frames: 3, mean, std },
        encoder: [24, 1, 3],
        decoder: [16, 1, 2],
        steps,
    }
}

fn color_case(steps: &'static [bool]) -> Case {
    let mean = vec![];
    let std = vec![];
    Case {
        batch: 3,
        input: InputConfig { channels: 3, frames: 6, height: 42, width: 30, patch: 6, patch_frames: 2, mean, std },
        encoder: [60, 3, 5],
        decoder: [36, 2, 3],
        steps,
    }
}

fn clips_match_the_reference() -> Outcome {
    grayscale_case(&[false, false, false]).check()
}

fn images_match_the_reference() -> Outcome {
    color_case(&[true, true, true]).check()
}

fn alternating_grayscale_images_and_clips_match_the_reference() -> Outcome {
    grayscale_case(&[true, false, true, true, false]).check()
}

fn alternating_color_images_and_clips_match_the_reference() -> Outcome {
    color_case(&[false, true, true, false]).check()
}

impl Case {
    fn check(&self) -> Outcome {
        let numbers = json!({
            "encoder": shape(self.encoder), "decoder": shape(self.decoder),
            "image_mask": {"ratio": 0.75}, "clip_mask": {"ratio": 0.9},
        });
        let method = omnimae::OmniMae::new(&serde_json::from_value(numbers)?, &self.input)?;
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..).zip(self.steps).map(|(step, &is_image)| self.batch(step, is_image)).collect();
        let mut request = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            request.push((format!("input.{step}"), batch.view().shallow_clone()));
            request.push((format!("drop.{step}"), method.sample_mask(batch).drop));
        }
        let reply =
            parity::oracle_reply(&["omnimae.py"], &flat, &parity::same_name, request, &self.reference_config())?;
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &parity::same_name)
    }

    fn batch(&self, step: u64, is_image: bool) -> Batch {
        let InputConfig { channels, frames, height, width, .. } = self.input;
        let frames = if is_image { 1 } else { frames };
        let pixels = normal(step, &[self.batch, channels, frames, height, width]);
        Batch { views: vec![pixels], ..blank_batch(self.batch, step) }
    }

    fn reference_config(&self) -> Value {
        let input = &self.input;
        let [width, depth, heads] = self.encoder;
        let [decoder_width, decoder_depth, decoder_heads] = self.decoder;
        let numbers = json!({
            "image_size": [input.height, input.width],
            "patch_size": input.patch, "num_channels": input.channels, "num_frames": input.frames,
            "tubelet_size": input.patch_frames, "hidden_size": width, "num_hidden_layers": depth,
            "num_attention_heads": heads, "intermediate_size": 4 * width, "decoder_hidden_size": decoder_width,
            "decoder_num_hidden_layers": decoder_depth, "decoder_num_attention_heads": decoder_heads,
            "decoder_intermediate_size": 4 * decoder_width,
        });
        parity::training_numbers(self.steps.len(), numbers)
    }
}

fn tiny(overrides: &[&str]) -> Result<Config, Error> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    Config::read(&root().join("configs/tiny/omnimae.json"), &overrides)
}

/// Returns the tiny model and its initial weights.
fn initialized(overrides: &[&str]) -> Result<(Box<dyn Method>, FlatParams), Error> {
    let config = tiny(overrides)?;
    let method = config.method.build(&config.input)?;
    let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    Ok((method, flat))
}

fn bytes(first: u64, n: u64, is_image: bool) -> Batch {
    let clips = clips(first, n).0;
    let pixels = if is_image { clips.narrow(2, 3, 1).contiguous() } else { clips };
    Batch { views: vec![pixels], ..blank_batch(n as i64, first) }
}

/// Hides `int(ratio · tokens)`: at 0.9 of 8 × 14 × 14 that keeps 157; truncating the number of kept tokens would give
/// 156.
fn the_number_of_hidden_tokens_matches_the_official_recipe() -> Outcome {
    let input = json!({"frames": 16, "patch_frames": 2, "height": 224, "width": 224, "patch": 16});
    let small = shape([24, 1, 2]);
    for (image, clip, kept) in [(0.75, 0.9, [49, 157]), (0.9, 0.95, [20, 79])] {
        let config = json!({
            "encoder": small, "decoder": small, "image_mask": {"ratio": image}, "clip_mask": {"ratio": clip},
        });
        let method = omnimae::OmniMae::new(&serde_json::from_value(config)?, &serde_json::from_value(input.clone())?)?;
        for (frames, kept, tokens) in [(1, kept[0], 196), (16, kept[1], 1568)] {
            let pixels = Tensor::zeros([2, 3, frames, 224, 224], (Kind::Uint8, Device::Cpu));
            let mask = method.sample_mask(&Batch { views: vec![pixels], ..blank_batch(2, 0) });
            assert_eq!((mask.keep.size(), mask.drop.size()), (vec![2, kept], vec![2, tokens - kept]));
            assert_eq!(rows(&Tensor::cat(&[&mask.keep, &mask.drop], 1), 1), (0..tokens).collect::<BTreeSet<i64>>());
        }
    }
    Ok(())
}

fn the_mask_of_a_clip_is_not_a_tube() -> Outcome {
    let (method, _) = initialized(&[])?;
    let mask = method.sample_mask(&bytes(0, 40, false));
    let positions =
        |sample: i64| rows(&mask.keep, sample).iter().map(|token| token % 16).collect::<BTreeSet<i64>>().len();
    // 16 of 64 tokens in 4 slots: a tube would keep 4 patches, a random mask keeps about 11.
    let mean = (0..40).map(positions).sum::<usize>() as f64 / 40.0;
    assert!((9.5..=12.5).contains(&mean), "{mean} patches per clip");
    Ok(())
}

fn initialization_matches_the_official_code() -> Outcome {
    let (method, _) = initialized(&[])?;
    let specs = method.params().specs();
    let shape_of = |name: &str| specs.iter().find(|spec| spec.name == name).map(|spec| spec.shape.clone());
    assert_eq!(shape_of("encoder.blocks.0.attn.qkv.bias"), Some(vec![3 * 96]), "keys have a bias");
    assert_eq!(shape_of("decoder.mask_token"), Some(vec![1, 1, 96]), "of the width of the encoder");
    assert_eq!(shape_of("decoder.embed.bias"), Some(vec![48]));
    assert_eq!(shape_of("encoder.cls_token"), None);
    for spec in specs {
        let vector = spec.shape.len() == 1;
        assert_eq!(spec.weight_decay, !vector, "{} has weight decay; the mask token has it", spec.name);
        let expected = match spec.name.as_str() {
            "encoder.embed.bias" => Init::Uniform(1.0 / 128f64.sqrt()),
            "decoder.pred.weight" => Init::Normal(0.02),
            "decoder.mask_token" => Init::Zero,
            name if name.ends_with("weight") && vector => Init::One,
            name if name.ends_with("weight") => Init::Xavier,
            _ => Init::Zero,
        };
        assert_eq!(spec.init, expected, "{}", spec.name);
    }
    Ok(())
}

fn bytes_and_normalized_pixels_give_the_same_loss() -> Outcome {
    for normalize in [true, false] {
        let (method, flat) = initialized(&[&format!("method.omnimae.target.normalize={normalize}")])?;
        for is_image in [true, false] {
            let batch = bytes(0, 6, is_image);
            let floats = Batch { views: vec![method.normalize(&batch)?], ..bytes(0, 6, is_image) };
            let frames = if is_image { 2 } else { 8 };
            assert_eq!(floats.view().size(), [6, 1, frames, 32, 32], "an image is repeated");
            let loss = |batch| no_grad(|| method.terms(&flat.leaves, batch)).map(|mut terms| terms.remove(0).sum);
            let a = loss(&batch)?.double_value(&[]);
            let b = loss(&floats)?.double_value(&[]);
            assert!((a / b - 1.0).abs() < 1e-5, "{a} against {b}");
        }
    }
    Ok(())
}

fn reconstructions_show_visible_patches_unchanged() -> Outcome {
    let (method, flat) = initialized(&[])?;
    let batch = bytes(0, 2, true);
    let visible = no_grad(|| method.draw(&flat.leaves, &batch))?;
    let image = batch.view().to_kind(Kind::Float) / 255.0;
    assert!((&visible.original - &image).abs().max().double_value(&[]) < 1e-6);
    for token in rows(&method.sample_mask(&batch).keep, 1) {
        let patch = |x: &Tensor| x.get(1).get(0).get(0).narrow(0, token / 4 * 8, 8).narrow(1, token % 4 * 8, 8);
        assert!((patch(&visible.predicted) - patch(&image)).abs().max().double_value(&[]) < 1e-6, "token {token}");
    }
    assert_eq!(no_grad(|| method.encode(&flat.leaves, &batch))?.mean.size(), [2, 96]);
    Ok(())
}

/// Both modalities use the same tensors: a step on either updates all of them.
fn images_and_clips_train_every_tensor() -> Outcome {
    for is_image in [true, false] {
        let (method, flat) = initialized(&[])?;
        let mut stepper = stepper(method, flat)?;
        stepper.step(&[bytes(0, 4, is_image)], LR, |_, _| Ok(()))?;
        assert!(stepper.flat.steps.eq(1.0).all().int64_value(&[]) == 1, "still {is_image}");
    }
    Ok(())
}

fn an_invalid_config_is_rejected() -> Outcome {
    for (line, words) in [
        ("input.frames=2", "one time slot of 2 frames"),
        ("method.omnimae.image_mask.ratio=0.01", "method.omnimae.image_mask.ratio is 0.01, which keeps 16 of 16"),
        ("method.omnimae.clip_mask.ratio=1", "method.omnimae.clip_mask.ratio is 1"),
        ("view.image=null", "give view.image"),
        ("view.image.hflip=2", "view.image: view.hflip is 2"),
        ("view.clip=null", "view.image is the view of images beside videos"),
    ] {
        let error = tiny(&[line]).expect_err(line);
        assert!(error.code == ExitCode::Usage && error.message.contains(words), "{line}: {error}");
    }
    let line = "view.image={\"hflip\": 0.5}".to_string();
    let error = Config::read(&root().join("configs/tiny/videomae.json"), &[line]).expect_err("clips alone");
    assert!(error.code == ExitCode::Usage && error.message.contains("samples of one kind"), "{error}");
    Ok(())
}

fn it_learns_images_and_clips() -> Outcome {
    let (method, flat) = initialized(&[])?;
    let mut stepper = stepper(method, flat)?;
    let mut losses = [vec![], vec![]];
    for step in 0..160 {
        let is_image = step % 2 == 0;
        let outcome = stepper.step(&[bytes(step * 16, 16, is_image)], LR, |_, _| Ok(()))?;
        losses[usize::from(is_image)].push(outcome.loss);
    }
    for (losses, kind) in losses.iter().zip(["clips", "pictures"]) {
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let first = mean(&losses[..10]);
        let last = mean(&losses[70..]);
        assert!(last < 0.8 * first, "the loss of {kind} went from {first} to {last}");
    }
    Ok(())
}
