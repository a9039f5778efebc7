//! Tests of VideoMAE against transformers: losses, gradients and weights after three AdamW steps; its tubes; and that
//! it learns.

use crate::support::method_ext::{MethodExt, sample, untrained};
use crate::support::parity::{self, LR, stepper};
use crate::support::{Outcome, normal, oracle, read, root};
use occlude::config::Config;
use occlude::error::ExitCode;
use occlude::evaluate::Feature;
use occlude::evaluate::features::FeatureExtractor;
use occlude::grid::{Grid, InputConfig};
use occlude::interop;
use occlude::method::{Batch, videomae};
use occlude::op::shuffle::SampleKey;
use occlude::optim::flat::FlatParams;
use occlude::part::encoder::{position, vit::Shape};
use occlude::part::mask::{self, TubeMask};
use occlude::part::params::Init;
use occlude::rng::{Philox, Purpose};
use occlude::train::step::Stepper;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    a_grayscale_clip_with_one_block_matches_transformers,
    a_color_clip_with_normalized_cubes_matches_transformers,
    a_wide_clip_of_raw_pixels_matches_transformers,
    positions_match_the_official_table,
    a_tube_mask_hides_the_same_patches_in_every_frame,
    the_number_of_hidden_tokens_matches_the_official_code,
    initialization_matches_the_official_code,
    bytes_and_normalized_pixels_give_the_same_loss,
    reconstructions_show_visible_patches_unchanged,
    features_are_the_mean_without_a_class_token,
    it_learns_moving_shapes,
];

const STEPS: usize = 3;

struct Case {
    batch: i64,
    input: InputConfig,
    encoder: Shape,
    decoder: Shape,
    ratio: f64,
    normalize: bool,
}

pub fn shape([width, depth, heads]: [i64; 3]) -> Shape {
    Shape { width, depth, heads, mlp_ratio: 4 }
}

/// [frames, height, width] in cubes of [frames, side]. transformers undoes the ImageNet normalization of color clips,
/// and none of other clips.
fn input(channels: i64, [frames, height, width]: [i64; 3], [patch_frames, patch]: [i64; 2]) -> InputConfig {
    let (mean, std) = if channels == 3 { (vec![], vec![]) } else { (vec![0.0], vec![1.0]) };
    InputConfig { channels, frames, height, width, patch, patch_frames, mean, std }
}

fn a_grayscale_clip_with_one_block_matches_transformers() -> Outcome {
    Case {
        batch: 5,
        input: input(1, [6, 20, 20], [3, 4]),
        encoder: shape([24, 1, 3]),
        decoder: shape([16, 1, 2]),
        ratio: 0.75,
        normalize: true,
    }
    .check()
}

fn a_color_clip_with_normalized_cubes_matches_transformers() -> Outcome {
    Case {
        batch: 3,
        input: input(3, [6, 42, 42], [2, 6]),
        encoder: shape([60, 3, 5]),
        decoder: shape([36, 2, 3]),
        ratio: 0.9,
        normalize: true,
    }
    .check()
}

fn a_wide_clip_of_raw_pixels_matches_transformers() -> Outcome {
    Case {
        batch: 2,
        input: input(3, [3, 24, 56], [1, 8]),
        encoder: shape([44, 2, 11]),
        decoder: shape([28, 3, 7]),
        ratio: 0.5,
        normalize: false,
    }
    .check()
}

impl Case {
    fn method(&self) -> Result<videomae::VideoMae, occlude::error::Error> {
        let config = json!({
            "encoder": self.encoder, "decoder": self.decoder, "mask": {"ratio": self.ratio},
            "target": {"normalize": self.normalize},
        });
        videomae::VideoMae::new(&serde_json::from_value(config).expect("numbers"), &self.input)
    }

    fn check(&self) -> Outcome {
        let method = self.method()?;
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS as u64).map(|step| self.batch(step)).collect();
        let mut request = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            request.push((format!("input.{step}"), batch.view().shallow_clone()));
            request.push((format!("drop.{step}"), method.sample_mask(batch).drop));
        }
        let official = |name: &str, tensor: &Tensor| interop::to_official("videomae", name, tensor, &grid);
        let reply =
            parity::oracle_reply(&["videomae.py", "steps"], &flat, &official, request, &self.reference_config())?;
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &official)
    }

    fn batch(&self, step: u64) -> Batch {
        let InputConfig { channels, frames, height, width, .. } = self.input;
        Batch {
            views: vec![normal(step, &[self.batch, channels, frames, height, width])],
            ..blank_batch(self.batch, step)
        }
    }

    fn reference_config(&self) -> Value {
        let input = &self.input;
        let encoder = &self.encoder;
        let decoder = &self.decoder;
        let numbers = json!({
            "image_size": [input.height, input.width],
            "patch_size": input.patch, "num_channels": input.channels, "num_frames": input.frames,
            "tubelet_size": input.patch_frames, "norm_pix_loss": self.normalize,
            "hidden_size": encoder.width, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
            "intermediate_size": 4 * encoder.width, "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth, "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": 4 * decoder.width,
        });
        parity::training_numbers(STEPS, numbers)
    }
}

/// Returns a batch without pixels.
pub fn blank_batch(batch: i64, epoch: u64) -> Batch {
    let keys: Vec<SampleKey> = (0..batch as u64).map(|id| SampleKey { id, epoch, repeat: 0 }).collect();
    Batch::new(Tensor::zeros([batch, 0], (Kind::Float, Device::Cpu)), &keys, 9)
}

fn positions_match_the_official_table() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("positions.safetensors");
    for (frames, rows, cols, width) in [(8, 14, 14, 384), (3, 3, 5, 36), (1, 1, 7, 4)] {
        let grid = Grid { frames, rows, cols, channels: 3, patch_frames: 2, patch: 4 };
        let tokens = grid.tokens().to_string();
        let wide = width.to_string();
        oracle("videomae.py", &["positions", &tokens, &wide, path.to_str().unwrap()])?;
        let difference = (position::sincos_1d(&grid, width) - &read(&path)?["positions"]).abs().max().double_value(&[]);
        assert!(difference <= 1e-6, "a table of {tokens} tokens, {width} wide, is off by {difference:e}");
    }
    Ok(())
}

pub fn rows(tokens: &Tensor, row: i64) -> BTreeSet<i64> {
    Vec::<i64>::try_from(tokens.get(row)).expect("numbers").into_iter().collect()
}

fn a_tube_mask_hides_the_same_patches_in_every_frame() -> Outcome {
    let grid = Grid { frames: 5, rows: 3, cols: 7, channels: 1, patch_frames: 2, patch: 4 };
    let tubes = sample(&TubeMask { ratio: 0.75 }, &grid, &blank_batch(40, 1));
    let mut patterns = BTreeSet::new();
    let mut hidden = [0; 21];
    for sample in 0..40 {
        let keep = rows(&tubes.keep, sample);
        let drop = rows(&tubes.drop, sample);
        assert_eq!((keep.len(), drop.len()), (5 * 6, 5 * 15), "of 21 patches 15 are hidden in each of 5 slots");
        let all: BTreeSet<i64> = keep.union(&drop).copied().collect();
        assert_eq!(all, (0..105).collect(), "every token is kept or dropped");
        let positions: BTreeSet<i64> = drop.iter().map(|token| token % 21).collect();
        assert_eq!(positions.len(), 15, "the same patches in every slot");
        positions.iter().for_each(|&patch| hidden[patch as usize] += 1);
        patterns.insert(positions);
    }
    assert!(patterns.len() > 35, "samples share {} patterns", patterns.len());
    assert!(hidden.iter().all(|&times| (15..40).contains(&times)), "patches are hidden uniformly: {hidden:?}");
    let restored = Tensor::cat(&[&tubes.keep, &tubes.drop], 1).gather(1, &tubes.restore(), false);
    assert_eq!(rows(&restored, 0).len(), 105);
    assert!(restored.equal(&Tensor::arange(105, (Kind::Int64, Device::Cpu)).expand([40, 105], false)));
    // An image is a clip of one slot: its tube mask is the random mask of an image.
    let is_image = Grid { frames: 1, ..grid };
    let tube = sample(&TubeMask { ratio: 0.75 }, &is_image, &blank_batch(4, 1));
    let random = mask_of_an_image(&is_image);
    assert!(tube.keep.narrow(1, 0, 5).equal(&random.narrow(1, 0, 5)));
    Ok(())
}

fn mask_of_an_image(grid: &Grid) -> Tensor {
    let batch = blank_batch(4, 1);
    mask::random_keep(grid, grid.visible(0.75), batch.seed, &batch.keys).keep
}

/// Hides `int(ratio * patches)`: at 0.9 of 14 × 14 that keeps 20 per slot; truncating the number of kept patches would
/// give 19.
fn the_number_of_hidden_tokens_matches_the_official_code() -> Outcome {
    let grid = |rows, cols| Grid { frames: 8, rows, cols, channels: 3, patch_frames: 2, patch: 16 };
    for (rows, cols, ratio, kept) in [(14, 14, 0.9, 20), (14, 14, 0.75, 49), (10, 1, 0.9, 1), (3, 7, 0.75, 6)] {
        assert_eq!(grid(rows, cols).visible_per_frame(ratio), kept, "{rows} × {cols} at {ratio}");
    }
    let error = tiny(&["method.videomae.mask.ratio=0.05"]).expect_err("nothing is hidden");
    assert!(error.code == ExitCode::Usage && error.message.contains("keeps 16 of 16 patches"), "{error}");
    Ok(())
}

fn tiny(overrides: &[&str]) -> Result<Config, occlude::error::Error> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    Config::read(&root().join("configs/tiny/videomae.json"), &overrides)
}

fn initialization_matches_the_official_code() -> Outcome {
    let config = tiny(&[])?;
    let method = config.method.build(&config.input)?;
    let names: BTreeSet<&str> = method.params().specs().iter().map(|spec| spec.name.as_str()).collect();
    for absent in ["encoder.cls_token", "encoder.blocks.0.attn.qkv.bias", "decoder.embed.bias"] {
        assert!(!names.contains(absent), "{absent}");
    }
    for spec in method.params().specs() {
        let leaf = spec.name.rsplit('.').next().expect("a name");
        let vector = spec.shape.len() == 1;
        assert_eq!(spec.weight_decay, !vector && leaf != "mask_token", "{} has weight decay", spec.name);
        let expected = match (spec.name.as_str(), leaf) {
            ("encoder.embed.weight" | "encoder.embed.bias", _) => Init::Uniform(1.0 / 128f64.sqrt()),
            ("decoder.mask_token", _) => Init::TruncatedNormal(0.02),
            (_, "weight") if vector => Init::One,
            (_, "weight") => Init::Xavier,
            _ => Init::Zero,
        };
        assert_eq!(spec.init, expected, "{}", spec.name);
    }
    let token = method.params().specs().iter().find(|spec| spec.name == "decoder.mask_token").expect("a mask token");
    let values: Vec<f32> = (0..100).flat_map(|seed| token.initial_values(seed)).collect();
    let deviation = (values.iter().map(|v| f64::from(v * v)).sum::<f64>() / values.len() as f64).sqrt();
    assert!(values.iter().all(|v| v.abs() <= 0.02), "truncated at one standard deviation");
    // A standard normal truncated to ±1 has a standard deviation of 0.5396.
    assert!((deviation / (0.02 * 0.5396) - 1.0).abs() < 0.05, "{deviation}");
    Ok(())
}

fn bytes_and_normalized_pixels_give_the_same_loss() -> Outcome {
    for normalize in [true, false] {
        let config = tiny(&[&format!("method.videomae.target.normalize={normalize}")])?;
        let method = config.method.build(&config.input)?;
        let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
        let bytes = Batch { views: vec![clips(0, 6).0], ..blank_batch(6, 0) };
        let floats = Batch { views: vec![method.normalize(&bytes)?], ..blank_batch(6, 0) };
        let loss = |batch| no_grad(|| method.terms(&flat.leaves, batch)).map(|mut terms| terms.remove(0).sum);
        let a = loss(&bytes)?.double_value(&[]);
        let b = loss(&floats)?.double_value(&[]);
        assert!((a / b - 1.0).abs() < 1e-5, "{a} against {b}");
    }
    Ok(())
}

fn reconstructions_show_visible_patches_unchanged() -> Outcome {
    for normalize in [true, false] {
        let config = tiny(&[&format!("method.videomae.target.normalize={normalize}")])?;
        let method = config.method.build(&config.input)?;
        let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
        let batch = Batch { views: vec![clips(0, 2).0], ..blank_batch(2, 0) };
        let visible = no_grad(|| method.draw(&flat.leaves, &batch))?;
        let clip = batch.view().to_kind(Kind::Float) / 255.0;
        assert!((&visible.original - &clip).abs().max().double_value(&[]) < 1e-6);
        for sample in 0..2 {
            let mask = method.sample_mask(&batch);
            for token in rows(&mask.keep, sample) {
                let slot = token / 16;
                let row = token / 4 % 4;
                let col = token % 4;
                let cube = |x: &Tensor| {
                    x.get(sample).narrow(1, slot * 2, 2).narrow(2, row * 8, 8).narrow(3, col * 8, 8).contiguous()
                };
                for image in [&visible.masked, &visible.predicted] {
                    assert!((cube(image) - cube(&clip)).abs().max().double_value(&[]) < 1e-6, "token {token}");
                }
            }
            for token in rows(&mask.drop, sample) {
                let slot = token / 16;
                let row = token / 4 % 4;
                let col = token % 4;
                let gray = visible.masked.get(sample).select(1, slot * 2).select(1, row * 8).select(1, col * 8);
                assert!((gray.double_value(&[0]) - 0.25).abs() < 1e-6, "hidden patches have the gray of the mean");
            }
        }
    }
    Ok(())
}

fn features_are_the_mean_without_a_class_token() -> Outcome {
    let encoder =
        |path: &str, request| FeatureExtractor::new(untrained(Config::read(&root().join(path), &[])?)?, request, None);
    let image = "configs/tiny/mae.json";
    let video = "configs/tiny/videomae.json";
    assert_eq!(encoder(video, None)?.feature, Feature::Mean);
    assert_eq!(encoder(video, Some(Feature::Mean))?.empty_features().size(), [0, 96]);
    assert_eq!(encoder(image, None)?.feature, Feature::Class);
    assert_eq!(encoder(image, Some(Feature::Mean))?.feature, Feature::Mean);
    let error = encoder(video, Some(Feature::Class)).err().expect("there is no class token");
    assert!(error.code == ExitCode::Usage && error.message.contains("--feature mean"), "{error}");
    Ok(())
}

/// Grayscale clips of 8 frames of 32 × 32 in which a square, bright on dark, moves up, down, left or right, or does not
/// move; uint8 [n, 1, 8, 32, 32] and the class, int64 [n].
pub fn clips(first: u64, n: u64) -> (Tensor, Tensor) {
    let mut pixels = Vec::new();
    let mut labels = Vec::new();
    for id in first..first + n {
        let mut draw = Philox::new(5, id, 0, Purpose::Order, 0);
        let motion = draw.uniform_int(5) as i64;
        let (dy, dx) = [(0, 0), (0, 2), (0, -2), (2, 0), (-2, 0)][motion as usize];
        let side = 6 + draw.uniform_int(6) as i64;
        let light = 120 + draw.uniform_int(120) as u8;
        let top = draw.uniform_int(32) as i64;
        let left = draw.uniform_int(32) as i64;
        for t in 0..8 {
            for y in 0..32 {
                for x in 0..32 {
                    // Pixels that leave on one side enter on the other.
                    let v = (y - top - dy * t).rem_euclid(32);
                    let u = (x - left - dx * t).rem_euclid(32);
                    pixels.push(if v < side && u < side { light } else { 20 + (y + x) as u8 });
                }
            }
        }
        labels.push(motion);
    }
    (Tensor::from_slice(&pixels).view([n as i64, 1, 8, 32, 32]), Tensor::from_slice(&labels))
}

fn it_learns_moving_shapes() -> Outcome {
    let config = tiny(&[])?;
    let method = config.method.build(&config.input)?;
    let flat = FlatParams::new(method.params(), 3, Kind::Float, Device::Cpu)?;
    let mut stepper = stepper(method, flat)?;
    let accuracy = |stepper: &Stepper| -> Result<f64, occlude::error::Error> {
        let features = |first, n| -> Result<[Tensor; 2], occlude::error::Error> {
            let (pixels, labels) = clips(first, n);
            let batch = Batch { views: vec![pixels], ..blank_batch(n as i64, 0) };
            Ok([no_grad(|| stepper.method.encode(&stepper.flat.leaves, &batch))?.mean, labels])
        };
        let train = features(100_000, 1500)?;
        let test = features(200_000, 500)?;
        Ok(linear_accuracy(train.each_ref(), test.each_ref()))
    };
    let before = accuracy(&stepper)?;
    let mut losses = Vec::new();
    for step in 0..200 {
        let batch = Batch { views: vec![clips(step * 32, 32).0], ..blank_batch(32, step) };
        losses.push(stepper.step(&[batch], LR, |_, _| Ok(()))?.loss);
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let first = mean(&losses[..10]);
    let last = mean(&losses[190..]);
    let after = accuracy(&stepper)?;
    assert!(last < 0.7 * first, "the loss went from {first} to {last}");
    assert!(after > before, "motion is classified from {after} of trained features and {before} of random ones");
    Ok(())
}

/// Returns the accuracy on `test` of a linear classifier, fitted by least squares to the standardized features of
/// `train`.
fn linear_accuracy(train: [&Tensor; 2], test: [&Tensor; 2]) -> f64 {
    let mean = train[0].mean_dim(0, true, Kind::Double);
    let deviation = train[0].std_dim(0, true, true);
    let standardize = |x: &Tensor| {
        let x = (x.to_kind(Kind::Double) - &mean) / (&deviation + 1e-6);
        Tensor::cat(&[&x, &x.narrow(1, 0, 1).ones_like()], 1)
    };
    let x = standardize(train[0]);
    let y = train[1].one_hot(5).to_kind(Kind::Double);
    let square = x.transpose(0, 1).matmul(&x) + Tensor::eye(x.size()[1], (Kind::Double, Device::Cpu));
    let weights = Tensor::linalg_solve(&square, &x.transpose(0, 1).matmul(&y), true);
    let predicted = standardize(test[0]).matmul(&weights).argmax(1, false);
    predicted.eq_tensor(test[1]).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}
