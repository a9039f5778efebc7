//! OmniMAE against layers of other people's code, on pictures and on clips: losses, gradients and weights after AdamW steps
//! of either; what it hides; and that it learns both.

use crate::parity::{self, LR, stepper};
use crate::support::{Outcome, normal, root};
use crate::videomae::{blank, clips, rows, shape};
use occlude::config::Config;
use occlude::fault::{Code, Fault};
use occlude::grid::Input;
use occlude::method::{Batch, Method, omnimae};
use occlude::optim::flat::Flat;
use occlude::part::weights::Init;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    clips_agree,
    pictures_agree,
    grey_pictures_and_clips_by_turns_agree,
    colour_pictures_and_clips_by_turns_agree,
    as_many_are_hidden_as_the_official_recipe_hides,
    a_clips_mask_is_no_tube,
    it_begins_as_the_official_code_begins,
    bytes_and_normalised_pixels_are_the_same_sample,
    a_picture_shows_what_is_visible_as_it_is,
    pictures_and_clips_move_every_tensor,
    a_config_that_cannot_be_is_refused,
    it_learns_pictures_and_clips,
];

struct Case {
    batch: i64,
    input: Input,
    encoder: [i64; 3],
    decoder: [i64; 3],
    /// Of each step, whether it is of pictures.
    steps: &'static [bool],
}

fn grey(steps: &'static [bool]) -> Case {
    let (mean, std) = (vec![0.0], vec![1.0]);
    Case {
        batch: 5,
        input: Input { channels: 1, frames: 6, height: 20, width: 20, patch: 4, patch_frames: 3, mean, std },
        encoder: [24, 1, 3],
        decoder: [16, 1, 2],
        steps,
    }
}

fn colour(steps: &'static [bool]) -> Case {
    let (mean, std) = (vec![], vec![]);
    Case {
        batch: 3,
        input: Input { channels: 3, frames: 6, height: 42, width: 30, patch: 6, patch_frames: 2, mean, std },
        encoder: [60, 3, 5],
        decoder: [36, 2, 3],
        steps,
    }
}

fn clips_agree() -> Outcome {
    grey(&[false, false, false]).check()
}

fn pictures_agree() -> Outcome {
    colour(&[true, true, true]).check()
}

fn grey_pictures_and_clips_by_turns_agree() -> Outcome {
    grey(&[true, false, true, true, false]).check()
}

fn colour_pictures_and_clips_by_turns_agree() -> Outcome {
    colour(&[false, true, true, false]).check()
}

impl Case {
    fn check(&self) -> Outcome {
        let numbers = json!({
            "encoder": shape(self.encoder), "decoder": shape(self.decoder),
            "image_mask": {"ratio": 0.75}, "clip_mask": {"ratio": 0.9},
        });
        let method = omnimae::OmniMae::new(&serde_json::from_value(numbers)?, &self.input)?;
        let flat = parity::moved(&method)?;
        let batches: Vec<Batch> = (0..).zip(self.steps).map(|(step, &still)| self.batch(step, still)).collect();
        let mut asked = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            asked.push((format!("input.{step}"), batch.pixels.shallow_clone()));
            asked.push((format!("drop.{step}"), method.mask(batch).drop));
        }
        let reply = parity::reply(&["omnimae.py"], &flat, &parity::ours, asked, &self.theirs())?;
        parity::agree(Box::new(method), flat, batches, &reply, &parity::ours)
    }

    fn batch(&self, step: u64, still: bool) -> Batch {
        let Input { channels, frames, height, width, .. } = self.input;
        let frames = if still { 1 } else { frames };
        Batch { pixels: normal(step, &[self.batch, channels, frames, height, width]), ..blank(self.batch, step) }
    }

    fn theirs(&self) -> Value {
        let (input, [width, depth, heads], [narrow, short, few]) = (&self.input, self.encoder, self.decoder);
        let numbers = json!({
            "image_size": [input.height, input.width],
            "patch_size": input.patch, "num_channels": input.channels, "num_frames": input.frames,
            "tubelet_size": input.patch_frames, "hidden_size": width, "num_hidden_layers": depth,
            "num_attention_heads": heads, "intermediate_size": 4 * width, "decoder_hidden_size": narrow,
            "decoder_num_hidden_layers": short, "decoder_num_attention_heads": few, "decoder_intermediate_size": 4 * narrow,
        });
        parity::training(self.steps.len(), numbers)
    }
}

fn tiny(overrides: &[&str]) -> Result<Config, Fault> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    Config::read(&root().join("configs/tiny/omnimae.json"), &overrides)
}

/// The tiny model, its first weights, and n samples as bytes: pictures or clips.
fn begun(overrides: &[&str]) -> Result<(Box<dyn Method>, Flat), Fault> {
    let config = tiny(overrides)?;
    let method = config.method.build(&config.input)?;
    let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
    Ok((method, flat))
}

fn bytes(first: u64, n: u64, still: bool) -> Batch {
    let clips = clips(first, n).0;
    let pixels = if still { clips.narrow(2, 3, 1).contiguous() } else { clips };
    Batch { pixels, ..blank(n as i64, first) }
}

/// `int(ratio · tokens)` hidden: at 0.9 of 8 × 14 × 14 that keeps 157, where truncating what is kept would keep 156.
fn as_many_are_hidden_as_the_official_recipe_hides() -> Outcome {
    let input = json!({"frames": 16, "patch_frames": 2, "height": 224, "width": 224, "patch": 16});
    let small = shape([24, 1, 2]);
    for (image, clip, kept) in [(0.75, 0.9, [49, 157]), (0.9, 0.95, [20, 79])] {
        let config = json!({
            "encoder": small, "decoder": small, "image_mask": {"ratio": image}, "clip_mask": {"ratio": clip},
        });
        let method = omnimae::OmniMae::new(&serde_json::from_value(config)?, &serde_json::from_value(input.clone())?)?;
        for (frames, kept, tokens) in [(1, kept[0], 196), (16, kept[1], 1568)] {
            let pixels = Tensor::zeros([2, 3, frames, 224, 224], (Kind::Uint8, Device::Cpu));
            let mask = method.mask(&Batch { pixels, ..blank(2, 0) });
            assert_eq!((mask.keep.size(), mask.drop.size()), (vec![2, kept], vec![2, tokens - kept]));
            assert_eq!(rows(&Tensor::cat(&[&mask.keep, &mask.drop], 1), 1), (0..tokens).collect::<BTreeSet<i64>>());
        }
    }
    Ok(())
}

fn a_clips_mask_is_no_tube() -> Outcome {
    let (method, _) = begun(&[])?;
    let mask = method.mask(&bytes(0, 40, false));
    let places = |sample: i64| rows(&mask.keep, sample).iter().map(|token| token % 16).collect::<BTreeSet<i64>>().len();
    // 16 of 64 tokens of 4 slots: a tube would keep 4 places, chance keeps about 11.
    let mean = (0..40).map(places).sum::<usize>() as f64 / 40.0;
    assert!((9.5..=12.5).contains(&mean), "{mean} places a clip");
    Ok(())
}

fn it_begins_as_the_official_code_begins() -> Outcome {
    let (method, _) = begun(&[])?;
    let specs = method.table().specs();
    let shape_of = |name: &str| specs.iter().find(|spec| spec.name == name).map(|spec| spec.shape.clone());
    assert_eq!(shape_of("encoder.blocks.0.attn.qkv.bias"), Some(vec![3 * 96]), "keys have a bias");
    assert_eq!(shape_of("decoder.mask_token"), Some(vec![1, 1, 96]), "of the encoder's width");
    assert_eq!(shape_of("decoder.embed.bias"), Some(vec![48]));
    assert_eq!(shape_of("encoder.cls_token"), None);
    for spec in specs {
        let vector = spec.shape.len() == 1;
        assert_eq!(spec.decays, !vector, "{} decays; the mask token does", spec.name);
        let wanted = match spec.name.as_str() {
            "encoder.embed.bias" => Init::Uniform(1.0 / 128f64.sqrt()),
            "decoder.pred.weight" => Init::Normal(0.02),
            "decoder.mask_token" => Init::Zero,
            name if name.ends_with("weight") && vector => Init::One,
            name if name.ends_with("weight") => Init::Xavier,
            _ => Init::Zero,
        };
        assert_eq!(spec.init, wanted, "{}", spec.name);
    }
    Ok(())
}

fn bytes_and_normalised_pixels_are_the_same_sample() -> Outcome {
    for normalize in [true, false] {
        let (method, flat) = begun(&[&format!("method.omnimae.target.normalize={normalize}")])?;
        for still in [true, false] {
            let batch = bytes(0, 6, still);
            let floats = Batch { pixels: method.normalised(&batch)?, ..bytes(0, 6, still) };
            let frames = if still { 2 } else { 8 };
            assert_eq!(floats.pixels.size(), [6, 1, frames, 32, 32], "a picture is repeated");
            let loss = |batch| no_grad(|| method.loss(&flat.leaves, batch)).map(|mut terms| terms.remove(0).sum);
            let (a, b) = (loss(&batch)?.double_value(&[]), loss(&floats)?.double_value(&[]));
            assert!((a / b - 1.0).abs() < 1e-5, "{a} against {b}");
        }
    }
    Ok(())
}

fn a_picture_shows_what_is_visible_as_it_is() -> Outcome {
    let (method, flat) = begun(&[])?;
    let batch = bytes(0, 2, true);
    let shown = no_grad(|| method.reconstruct(&flat.leaves, &batch))?;
    let picture = batch.pixels.to_kind(Kind::Float) / 255.0;
    assert!((&shown.original - &picture).abs().max().double_value(&[]) < 1e-6);
    for token in rows(&method.mask(&batch).keep, 1) {
        let patch = |x: &Tensor| x.get(1).get(0).get(0).narrow(0, token / 4 * 8, 8).narrow(1, token % 4 * 8, 8);
        assert!((patch(&shown.guessed) - patch(&picture)).abs().max().double_value(&[]) < 1e-6, "token {token}");
    }
    assert_eq!(no_grad(|| method.features(&flat.leaves, &batch))?.mean.size(), [2, 96]);
    Ok(())
}

/// Both kinds go through the same tensors: a step of either moves all of them.
fn pictures_and_clips_move_every_tensor() -> Outcome {
    for still in [true, false] {
        let (method, flat) = begun(&[])?;
        let mut stepper = stepper(method, flat)?;
        stepper.step(&[bytes(0, 4, still)], LR, |_, _| Ok(()))?;
        assert!(stepper.flat.steps.eq(1.0).all().int64_value(&[]) == 1, "still {still}");
    }
    Ok(())
}

fn a_config_that_cannot_be_is_refused() -> Outcome {
    for (line, words) in [
        ("input.frames=2", "one time slot of 2 frames"),
        ("method.omnimae.image_mask.ratio=0.01", "method.omnimae.image_mask.ratio is 0.01, which keeps 16 of 16"),
        ("method.omnimae.clip_mask.ratio=1", "method.omnimae.clip_mask.ratio is 1"),
        ("view.still=null", "give view.still"),
        ("view.still.flip=2", "view.still: view.flip is 2"),
        ("view.clip=null", "view.still is how still pictures are shown beside videos"),
    ] {
        let fault = tiny(&[line]).expect_err(line);
        assert!(fault.code == Code::Usage && fault.message.contains(words), "{line}: {fault}");
    }
    let line = "view.still={\"flip\": 0.5}".to_string();
    let fault = Config::read(&root().join("configs/tiny/videomae.json"), &[line]).expect_err("clips alone");
    assert!(fault.code == Code::Usage && fault.message.contains("samples of one kind"), "{fault}");
    Ok(())
}

fn it_learns_pictures_and_clips() -> Outcome {
    let (method, flat) = begun(&[])?;
    let mut stepper = stepper(method, flat)?;
    let mut losses = [vec![], vec![]];
    for step in 0..160 {
        let still = step % 2 == 0;
        let outcome = stepper.step(&[bytes(step * 16, 16, still)], LR, |_, _| Ok(()))?;
        losses[usize::from(still)].push(outcome.loss);
    }
    for (losses, kind) in losses.iter().zip(["clips", "pictures"]) {
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses[..10]), mean(&losses[70..]));
        assert!(last < 0.8 * first, "the loss of {kind} went from {first} to {last}");
    }
    Ok(())
}
