//! Pictures of what a model guesses: masked | reconstructed | original.

use super::picture::{self, Tile};
use super::step::Stepper;
use super::{checkpoint, state};
use crate::config::Config;
use crate::data::clip::Sampling;
use crate::data::decode::Limits;
use crate::data::medium::{Decoder, Medium};
use crate::fault::{Fault, Result};
use crate::feed::Source;
use crate::method::{Batch, Method, Reconstruction};
use crate::op::shuffle::Origin;
use crate::part::view::View;
use crate::part::view::clip::Clip;
use crate::part::weights::Weights;
use crate::rng;
use image::RgbImage;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor, no_grad};

/// How many samples a training shows.
const SHOWN: u64 = 8;
const HEADINGS: [&str; 3] = ["masked", "reconstructed", "original"];

/// The first samples of the training set under fixed masks, the same at every step.
pub fn sheet(stepper: &Stepper, source: &Source, config: &Config) -> Result<RgbImage> {
    let channels = source.shape[0] as u32;
    let medium = source.medium;
    let whole = match medium {
        Medium::Sound => config.view.clone(),
        Medium::Picture => {
            // Of a video, frames from all of it.
            let clip = Clip { sampling: Sampling::Segments, multi_scale: None };
            View { clip: Some(clip), ..View::default() }
        }
    };
    let mut decoder = Decoder::new(source.limits);
    let mut samples = Vec::new();
    for index in 0..SHOWN.min(source.set.len()) {
        // A sample that cannot be read is the feed's to report; the sheet shows the next ones.
        let (shard, row) = source.set.sample(index)?;
        let Ok(bytes) = shard.read(row, medium.extensions()) else { continue };
        let mut view = vec![0; source.row_bytes()];
        let opened = decoder.open(&bytes, medium, channels);
        if let Ok(valid) = opened.and_then(|sample| whole.eval(stepper.method.grid(), sample, &mut view)) {
            samples.push(Shown { id: source.set.id(index)?, view, valid });
        }
    }
    let weights = stepper.buckets.weights(&stepper.flat, stepper.deadline)?;
    picture_of(stepper.method.as_ref(), &weights, &samples, medium, config.train.seed)
}

/// `occlude reconstruct`: a user's own files through a checkpoint's model, a sheet for each into `out`.
pub fn files(checkpoint: &str, inputs: &[PathBuf], out: &Path) -> Result<Vec<PathBuf>> {
    let loaded = checkpoint::open(checkpoint)?;
    let (config, method, flat) = state::model(&loaded, Device::Cpu)?;
    let mut decoder = Decoder::new(Limits::default());
    let medium = config.view.medium();
    let mut views = Vec::new();
    for path in inputs {
        let bytes = std::fs::read(path).map_err(|error| Fault::usage(format!("{}: {error}", path.display())))?;
        let values = method.grid().pixels().iter().product::<i64>() as usize;
        let mut view = vec![0; values * medium.kind().elt_size_in_bytes()];
        let valid = decoder
            .open(&bytes, medium, config.input.channels as u32)
            .and_then(|sample| config.view.eval(method.grid(), sample, &mut view))
            .map_err(|fault| Fault::usage(format!("{}: {}", path.display(), fault.message)))?;
        views.push((path, view, valid));
    }
    std::fs::create_dir_all(out).map_err(|error| Fault::disk(out.display(), error))?;
    let mut written = Vec::new();
    for (number, (path, view, valid)) in views.into_iter().enumerate() {
        let id = rng::id(&[&path.display().to_string()]);
        let sheet = picture_of(method.as_ref(), &flat.leaves, &[Shown { id, view, valid }], medium, config.train.seed)?;
        let stem = path.file_stem().map_or_else(|| "input".into(), |stem| stem.to_string_lossy());
        let to = out.join(format!("{number:03}-{stem}.png"));
        picture::save_png(&sheet, &to)?;
        written.push(to);
    }
    Ok(written)
}

/// A sample to be shown.
struct Shown {
    id: u64,
    /// [C, T, Y, X], as bytes.
    view: Vec<u8>,
    /// Its rows that are not padding.
    valid: u32,
}

/// One row of pictures for each sample.
fn picture_of(
    method: &dyn Method,
    weights: &Weights,
    samples: &[Shown],
    medium: Medium,
    seed: u64,
) -> Result<RgbImage> {
    let shape = [&[samples.len() as i64][..], &method.grid().pixels()].concat();
    let pixels: Vec<u8> = samples.iter().flat_map(|sample| &sample.view).copied().collect();
    let pixels = Tensor::f_from_data_size(&pixels, &shape, medium.kind())?.to_device(weights.0[0].device());
    let origins: Vec<Origin> = samples.iter().map(|sample| Origin { id: sample.id, epoch: 0, repeat: 0 }).collect();
    let valid = samples.iter().map(|sample| sample.valid).collect();
    let batch = Batch::new(pixels, &origins, seed).with_valid(Some(valid));
    let Reconstruction { masked, guessed, original } = no_grad(|| method.reconstruct(weights, &batch))?;
    let rows: Vec<Vec<Tile>> = (0..samples.len() as i64)
        .map(|row| [&masked, &guessed, &original].iter().map(|all| tile(&all.get(row), medium)).collect())
        .collect();
    Ok(picture::grid(&HEADINGS, &rows))
}

/// The first frame of [C, T, Y, X] in 0..1; of a sound turned, so that time runs to the right and high tones lie high.
fn tile(x: &Tensor, medium: Medium) -> Tile {
    let frame = match medium {
        Medium::Picture => x.select(1, 0),
        Medium::Sound => x.select(1, 0).transpose(1, 2).flip([1]),
    };
    let frame = (frame * 255.0).round().to_kind(Kind::Uint8).to_device(Device::Cpu); // [C, Y, X]
    let [channels, height, width] = crate::op::sizes(&frame);
    let (width, height) = (width as u32, height as u32);
    if channels == 3 {
        let interleaved = frame.permute([1, 2, 0]).contiguous();
        return Tile::rgb(width, height, crate::bridge::bytes(&interleaved).to_vec());
    }
    Tile::grey(width, height, crate::bridge::bytes(&frame.get(0).contiguous()))
}
