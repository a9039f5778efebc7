//! VideoMAE against other people's code: losses, gradients and weights after three AdamW steps; its tubes; and that it
//! learns.

use crate::parity::{self, LR, stepper};
use crate::support::{Outcome, normal, oracle, read, root};
use occlude::config::Config;
use occlude::fault::Code;
use occlude::grid::{Grid, Input};
use occlude::method::{Batch, Method, videomae};
use occlude::op::shuffle::Origin;
use occlude::optim::flat::Flat;
use occlude::part::encoder::{position, vit::Shape};
use occlude::part::mask;
use occlude::part::weights::Init;
use occlude::rng::{Draw, Purpose};
use occlude::run::evaluate::{Feature, features::Encoder};
use occlude::run::{exchange, step::Stepper};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    a_grey_clip_with_one_block_agrees,
    a_colour_clip_with_normalised_cubes_agrees,
    a_wide_clip_of_raw_pixels_agrees,
    positions_are_the_official_table,
    a_tube_hides_the_same_places_in_every_slot,
    as_many_are_hidden_as_the_official_code_hides,
    it_begins_as_the_official_code_begins,
    bytes_and_normalised_pixels_are_the_same_sample,
    a_picture_shows_what_is_visible_as_it_is,
    features_are_the_mean_where_there_is_no_class_token,
    it_learns_moving_shapes,
];

const STEPS: usize = 3;

struct Case {
    batch: i64,
    input: Input,
    encoder: Shape,
    decoder: Shape,
    ratio: f64,
    normalize: bool,
}

pub fn shape([width, depth, heads]: [i64; 3]) -> Shape {
    Shape { width, depth, heads, mlp_ratio: 4 }
}

/// [frames, height, width] in cubes of [frames, side]. transformers takes ImageNet's statistics out of colours and none
/// out of anything else.
fn input(channels: i64, [frames, height, width]: [i64; 3], [patch_frames, patch]: [i64; 2]) -> Input {
    let (mean, std) = if channels == 3 { (vec![], vec![]) } else { (vec![0.0], vec![1.0]) };
    Input { channels, frames, height, width, patch, patch_frames, mean, std }
}

fn a_grey_clip_with_one_block_agrees() -> Outcome {
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

fn a_colour_clip_with_normalised_cubes_agrees() -> Outcome {
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

fn a_wide_clip_of_raw_pixels_agrees() -> Outcome {
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
    fn method(&self) -> Result<videomae::VideoMae, occlude::fault::Fault> {
        let config = json!({
            "encoder": self.encoder, "decoder": self.decoder, "mask": {"ratio": self.ratio},
            "target": {"normalize": self.normalize},
        });
        videomae::VideoMae::new(&serde_json::from_value(config).expect("numbers"), &self.input)
    }

    fn check(&self) -> Outcome {
        let method = self.method()?;
        let grid = *method.grid();
        let flat = parity::moved(&method)?;
        let batches: Vec<Batch> = (0..STEPS as u64).map(|step| self.batch(step)).collect();
        let mut asked = Vec::new();
        for (step, batch) in batches.iter().enumerate() {
            asked.push((format!("input.{step}"), batch.pixels.shallow_clone()));
            asked.push((format!("drop.{step}"), method.mask(batch).drop));
        }
        let official = |name: &str, tensor: &Tensor| exchange::official("videomae", name, tensor, &grid);
        let reply = parity::reply(&["videomae.py", "steps"], &flat, &official, asked, &self.theirs())?;
        parity::agree(Box::new(method), flat, batches, &reply, &official)
    }

    fn batch(&self, step: u64) -> Batch {
        let Input { channels, frames, height, width, .. } = self.input;
        Batch { pixels: normal(step, &[self.batch, channels, frames, height, width]), ..blank(self.batch, step) }
    }

    fn theirs(&self) -> Value {
        let (input, encoder, decoder) = (&self.input, &self.encoder, &self.decoder);
        let numbers = json!({
            "image_size": [input.height, input.width],
            "patch_size": input.patch, "num_channels": input.channels, "num_frames": input.frames,
            "tubelet_size": input.patch_frames, "norm_pix_loss": self.normalize,
            "hidden_size": encoder.width, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
            "intermediate_size": 4 * encoder.width, "decoder_hidden_size": decoder.width,
            "decoder_num_hidden_layers": decoder.depth, "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": 4 * decoder.width,
        });
        parity::training(STEPS, numbers)
    }
}

pub fn blank(batch: i64, epoch: u64) -> Batch {
    let origins: Vec<Origin> = (0..batch as u64).map(|id| Origin { id, epoch, repeat: 0 }).collect();
    Batch { pixels: Tensor::new(), origins: Origin::table(&origins, Device::Cpu), text: None, valid: None, seed: 9 }
}

fn positions_are_the_official_table() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("positions.safetensors");
    for (frames, rows, cols, width) in [(8, 14, 14, 384), (3, 3, 5, 36), (1, 1, 7, 4)] {
        let grid = Grid { frames, rows, cols, channels: 3, patch_frames: 2, patch: 4 };
        let (tokens, wide) = (grid.tokens().to_string(), width.to_string());
        oracle("videomae.py", &["positions", &tokens, &wide, path.to_str().unwrap()])?;
        let off = (position::by_number(&grid, width) - &read(&path)?["positions"]).abs().max().double_value(&[]);
        assert!(off <= 1e-6, "a table of {tokens} tokens, {width} wide, is off by {off:e}");
    }
    Ok(())
}

pub fn rows(tokens: &Tensor, row: i64) -> BTreeSet<i64> {
    Vec::<i64>::try_from(tokens.get(row)).expect("numbers").into_iter().collect()
}

fn a_tube_hides_the_same_places_in_every_slot() -> Outcome {
    let grid = Grid { frames: 5, rows: 3, cols: 7, channels: 1, patch_frames: 2, patch: 4 };
    let tubes = mask::tube(&grid, 0.75, 3, &blank(40, 1).origins);
    let (mut patterns, mut hidden) = (BTreeSet::new(), [0; 21]);
    for sample in 0..40 {
        let (keep, drop) = (rows(&tubes.keep, sample), rows(&tubes.drop, sample));
        assert_eq!((keep.len(), drop.len()), (5 * 6, 5 * 15), "of 21 places 15 are hidden in each of 5 slots");
        let all: BTreeSet<i64> = keep.union(&drop).copied().collect();
        assert_eq!(all, (0..105).collect(), "every token is kept or dropped");
        let places: BTreeSet<i64> = drop.iter().map(|token| token % 21).collect();
        assert_eq!(places.len(), 15, "the same places in every slot");
        places.iter().for_each(|&place| hidden[place as usize] += 1);
        patterns.insert(places);
    }
    assert!(patterns.len() > 35, "samples share {} patterns", patterns.len());
    assert!(hidden.iter().all(|&times| (15..40).contains(&times)), "places are hidden evenly: {hidden:?}");
    let restored = Tensor::cat(&[&tubes.keep, &tubes.drop], 1).gather(1, &tubes.restore(), false);
    assert_eq!(rows(&restored, 0).len(), 105);
    assert!(restored.equal(&Tensor::arange(105, (Kind::Int64, Device::Cpu)).expand([40, 105], false)));
    // A picture is a clip of one slot: the tube is then the random mask of a picture.
    let still = Grid { frames: 1, ..grid };
    let (tube, random) = (mask::tube(&still, 0.75, 3, &blank(4, 1).origins), mask_of_a_picture(&still));
    assert!(tube.keep.narrow(1, 0, 5).equal(&random.narrow(1, 0, 5)));
    Ok(())
}

fn mask_of_a_picture(grid: &Grid) -> Tensor {
    mask::random(grid, 0.75, 3, &blank(4, 1).origins).keep
}

/// `int(ratio * places)` hidden: at 0.9 of 14 × 14 that keeps 20 a slot, where truncating what is kept would keep 19.
fn as_many_are_hidden_as_the_official_code_hides() -> Outcome {
    let grid = |rows, cols| Grid { frames: 8, rows, cols, channels: 3, patch_frames: 2, patch: 16 };
    for (rows, cols, ratio, kept) in [(14, 14, 0.9, 20), (14, 14, 0.75, 49), (10, 1, 0.9, 1), (3, 7, 0.75, 6)] {
        assert_eq!(grid(rows, cols).kept_places(ratio), kept, "{rows} × {cols} at {ratio}");
    }
    let fault = tiny(&["method.videomae.mask.ratio=0.05"]).expect_err("nothing is hidden");
    assert!(fault.code == Code::Usage && fault.message.contains("keeps 16 of 16 patches"), "{fault}");
    Ok(())
}

fn tiny(overrides: &[&str]) -> Result<Config, occlude::fault::Fault> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    Config::read(&root().join("configs/tiny/videomae.json"), &overrides)
}

fn it_begins_as_the_official_code_begins() -> Outcome {
    let config = tiny(&[])?;
    let method = config.method.build(&config.input)?;
    let names: BTreeSet<&str> = method.table().specs().iter().map(|spec| spec.name.as_str()).collect();
    for absent in ["encoder.cls_token", "encoder.blocks.0.attn.qkv.bias", "decoder.embed.bias"] {
        assert!(!names.contains(absent), "{absent}");
    }
    for spec in method.table().specs() {
        let leaf = spec.name.rsplit('.').next().expect("a name");
        let vector = spec.shape.len() == 1;
        assert_eq!(spec.decays, !vector && leaf != "mask_token", "{} decays", spec.name);
        let wanted = match (spec.name.as_str(), leaf) {
            ("encoder.embed.weight" | "encoder.embed.bias", _) => Init::Uniform(1.0 / 128f64.sqrt()),
            ("decoder.mask_token", _) => Init::Truncated(0.02),
            (_, "weight") if vector => Init::One,
            (_, "weight") => Init::Xavier,
            _ => Init::Zero,
        };
        assert_eq!(spec.init, wanted, "{}", spec.name);
    }
    let token = method.table().specs().iter().find(|spec| spec.name == "decoder.mask_token").expect("a mask token");
    let values: Vec<f32> = (0..100).flat_map(|seed| token.draw(seed)).collect();
    let deviation = (values.iter().map(|v| f64::from(v * v)).sum::<f64>() / values.len() as f64).sqrt();
    assert!(values.iter().all(|v| v.abs() <= 0.02), "cut at one deviation");
    // A standard normal within ±1 has a deviation of 0.5396.
    assert!((deviation / (0.02 * 0.5396) - 1.0).abs() < 0.05, "{deviation}");
    Ok(())
}

fn bytes_and_normalised_pixels_are_the_same_sample() -> Outcome {
    for normalize in [true, false] {
        let config = tiny(&[&format!("method.videomae.target.normalize={normalize}")])?;
        let method = config.method.build(&config.input)?;
        let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
        let bytes = Batch { pixels: clips(0, 6).0, ..blank(6, 0) };
        let floats = Batch { pixels: method.normalised(&bytes)?, ..blank(6, 0) };
        let loss = |batch| no_grad(|| method.loss(&flat.leaves, batch)).map(|mut terms| terms.remove(0).sum);
        let (a, b) = (loss(&bytes)?.double_value(&[]), loss(&floats)?.double_value(&[]));
        assert!((a / b - 1.0).abs() < 1e-5, "{a} against {b}");
    }
    Ok(())
}

fn a_picture_shows_what_is_visible_as_it_is() -> Outcome {
    for normalize in [true, false] {
        let config = tiny(&[&format!("method.videomae.target.normalize={normalize}")])?;
        let method = config.method.build(&config.input)?;
        let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
        let batch = Batch { pixels: clips(0, 2).0, ..blank(2, 0) };
        let shown = no_grad(|| method.reconstruct(&flat.leaves, &batch))?;
        let clip = batch.pixels.to_kind(Kind::Float) / 255.0;
        assert!((&shown.original - &clip).abs().max().double_value(&[]) < 1e-6);
        for sample in 0..2 {
            let mask = method.mask(&batch);
            for token in rows(&mask.keep, sample) {
                let (slot, row, col) = (token / 16, token / 4 % 4, token % 4);
                let cube = |x: &Tensor| {
                    x.get(sample).narrow(1, slot * 2, 2).narrow(2, row * 8, 8).narrow(3, col * 8, 8).contiguous()
                };
                for picture in [&shown.masked, &shown.guessed] {
                    assert!((cube(picture) - cube(&clip)).abs().max().double_value(&[]) < 1e-6, "token {token}");
                }
            }
            for token in rows(&mask.drop, sample) {
                let (slot, row, col) = (token / 16, token / 4 % 4, token % 4);
                let grey = shown.masked.get(sample).select(1, slot * 2).select(1, row * 8).select(1, col * 8);
                assert!((grey.double_value(&[0]) - 0.25).abs() < 1e-6, "hidden places are the mean's grey");
            }
        }
    }
    Ok(())
}

fn features_are_the_mean_where_there_is_no_class_token() -> Outcome {
    let encoder = |path: &str, asked| {
        let config = Config::read(&root().join(path), &[])?;
        let method = config.method.build(&config.input)?;
        let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
        Encoder::new(config, method, flat, asked)
    };
    let (image, video) = ("configs/tiny/mae.json", "configs/tiny/videomae.json");
    assert_eq!(encoder(video, None)?.feature, Feature::Mean);
    assert_eq!(encoder(video, Some(Feature::Mean))?.none().size(), [0, 96]);
    assert_eq!(encoder(image, None)?.feature, Feature::Class);
    assert_eq!(encoder(image, Some(Feature::Mean))?.feature, Feature::Mean);
    let fault = encoder(video, Some(Feature::Class)).err().expect("there is no class token");
    assert!(fault.code == Code::Usage && fault.message.contains("--feature mean"), "{fault}");
    Ok(())
}

/// Grey clips of 8 frames of 32 × 32 in which a square, bright on dark, moves up, down, left or right or stands still;
/// uint8 [n, 1, 8, 32, 32] and int64 [n], which of these.
pub fn clips(first: u64, n: u64) -> (Tensor, Tensor) {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for id in first..first + n {
        let mut draw = Draw::new(5, id, 0, Purpose::Order, 0);
        let motion = draw.below(5) as i64;
        let (dy, dx) = [(0, 0), (0, 2), (0, -2), (2, 0), (-2, 0)][motion as usize];
        let (side, light) = (6 + draw.below(6) as i64, 120 + draw.below(120) as u8);
        let (top, left) = (draw.below(32) as i64, draw.below(32) as i64);
        for t in 0..8 {
            for y in 0..32 {
                for x in 0..32 {
                    // What leaves on one side comes in on the other.
                    let (v, u) = ((y - top - dy * t).rem_euclid(32), (x - left - dx * t).rem_euclid(32));
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
    let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
    let mut stepper = stepper(method, flat)?;
    let right = |stepper: &Stepper| -> Result<f64, occlude::fault::Fault> {
        let features = |first, n| -> Result<(Tensor, Tensor), occlude::fault::Fault> {
            let (pixels, labels) = clips(first, n);
            let batch = Batch { pixels, ..blank(n as i64, 0) };
            Ok((no_grad(|| stepper.method.features(&stepper.flat.leaves, &batch))?.mean, labels))
        };
        let (train, test) = (features(100_000, 1500)?, features(200_000, 500)?);
        Ok(linear(&train, &test))
    };
    let before = right(&stepper)?;
    let mut losses = Vec::new();
    for step in 0..200 {
        let batch = Batch { pixels: clips(step * 32, 32).0, ..blank(32, step) };
        losses.push(stepper.step(&[batch], LR, |_, _| Ok(()))?.loss);
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[190..]));
    let after = right(&stepper)?;
    assert!(last < 0.7 * first, "the loss went from {first} to {last}");
    assert!(after > before, "motion is read from {after} of trained features and {before} of random ones");
    Ok(())
}

/// The share of `test` that a linear classifier, least squares on `train`'s standardised features, gets right.
fn linear(train: &(Tensor, Tensor), test: &(Tensor, Tensor)) -> f64 {
    let (mean, deviation) = (train.0.mean_dim(0, true, Kind::Double), train.0.std_dim(0, true, true));
    let ready = |x: &Tensor| {
        let x = (x.to_kind(Kind::Double) - &mean) / (&deviation + 1e-6);
        Tensor::cat(&[&x, &x.narrow(1, 0, 1).ones_like()], 1)
    };
    let (x, y) = (ready(&train.0), train.1.one_hot(5).to_kind(Kind::Double));
    let square = x.transpose(0, 1).matmul(&x) + Tensor::eye(x.size()[1], (Kind::Double, Device::Cpu));
    let weights = Tensor::linalg_solve(&square, &x.transpose(0, 1).matmul(&y), true);
    let guesses = ready(&test.0).matmul(&weights).argmax(1, false);
    guesses.eq_tensor(&test.1).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}
