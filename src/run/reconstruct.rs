//! Pictures of what a model guesses: masked | reconstructed | original.

use super::picture::{self, Tile};
use super::step::Stepper;
use super::{checkpoint, state};
use crate::config::Config;
use crate::data::clip::{self, Sampling};
use crate::data::decode::Limits;
use crate::data::medium::{Decoder, Medium};
use crate::data::set::DataSet;
use crate::fault::{Fault, Result};
use crate::feed::Source;
use crate::method::{Batch, Method, Reconstruction};
use crate::op::shuffle::Origin;
use crate::part::view::View;
use crate::part::view::clip::Clip;
use crate::part::view::log_mel::LogMel;
use crate::part::weights::Weights;
use crate::rng;
use image::RgbImage;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor, no_grad};

/// How many samples a training shows.
const SHOWN: usize = 8;
const HEADINGS: [&str; 3] = ["masked", "reconstructed", "original"];

/// The first samples of the training set under fixed masks, the same at every step; of still pictures and clips, some of
/// either.
pub fn sheet(stepper: &Stepper, source: &Source, config: &Config) -> Result<RgbImage> {
    let channels = source.shape[0] as u32;
    let medium = source.medium;
    let whole = match medium {
        Medium::Sound => config.view.on(stepper.flat.master.device()),
        Medium::Picture => {
            // Of a video, frames from all of it.
            let clip = Clip { sampling: Sampling::Segments, multi_scale: None, repeats: 1 };
            let still = config.view.still.as_ref().map(|_| Box::default());
            View { clip: Some(clip), still, ..View::default() }
        }
    };
    let mut decoder = Decoder::new(source.limits);
    let weights = stepper.buckets.weights(&stepper.flat, stepper.deadline)?;
    let (kinds, log_mel, mut rows) = (kinds(source), stepper.log_mel.as_ref(), Vec::new());
    for indices in &kinds {
        let shape = source.shape_of(indices.start);
        let mut samples = Vec::new();
        for index in indices.clone().take(SHOWN / kinds.len()) {
            // A sample that cannot be read is the feed's to report; the sheet shows the next ones.
            let (shard, row) = source.set.sample(index)?;
            let Ok(bytes) = shard.read(row, medium.extensions()) else { continue };
            let mut view = vec![0; source.row_bytes(shape)];
            let opened = decoder.open(&bytes, medium, channels);
            if let Ok(valid) = opened.and_then(|sample| whole.eval(stepper.method.grid(), sample, &mut view)) {
                samples.push(Shown { id: source.set.id(index)?, view, valid });
            }
        }
        let given = (&samples[..], shape, medium);
        rows.extend(rows_of((stepper.method.as_ref(), &weights, log_mel), given, config.train.seed)?);
    }
    Ok(picture::grid(&HEADINGS, &rows))
}

/// Samples of each kind that a training reads: those of the first set of still pictures and of the first of clips, or all
/// where they are of one kind.
fn kinds(source: &Source) -> Vec<Range<u64>> {
    let first = |kind: bool| source.stills.iter().position(|&still| still == kind);
    let samples = |set: usize| source.set.around(source.set.sets()[..set].iter().map(DataSet::len).sum());
    let mut kinds: Vec<Range<u64>> = [true, false].into_iter().filter_map(first).map(samples).collect();
    if kinds.is_empty() {
        kinds.push(0..source.set.len());
    }
    kinds
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
        let still = method.still().filter(|_| !clip::is_video(&bytes)).map(|(grid, _)| grid);
        let shape = still.unwrap_or(*method.grid()).pixels();
        let values = shape.iter().product::<i64>() as usize;
        let mut view = vec![0; values * medium.kind().elt_size_in_bytes()];
        let valid = decoder
            .open(&bytes, medium, config.input.channels as u32)
            .and_then(|sample| config.view.eval(method.grid(), sample, &mut view))
            .map_err(|fault| Fault::usage(format!("{}: {}", path.display(), fault.message)))?;
        views.push((path, shape, view, valid));
    }
    std::fs::create_dir_all(out).map_err(|error| Fault::disk(out.display(), error))?;
    let mut written = Vec::new();
    for (number, (path, shape, view, valid)) in views.into_iter().enumerate() {
        let id = rng::id(&[&path.display().to_string()]);
        let given = (&[Shown { id, view, valid }][..], shape, medium);
        let sheet =
            picture::grid(&HEADINGS, &rows_of((method.as_ref(), &flat.leaves, None), given, config.train.seed)?);
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

/// One row of pictures for each sample, all of one shape [C, T, Y, X].
fn rows_of(
    (method, weights, log_mel): (&dyn Method, &Weights, Option<&LogMel>),
    (samples, shape, medium): (&[Shown], [i64; 4], Medium),
    seed: u64,
) -> Result<Vec<Vec<Tile>>> {
    let shape = [&[samples.len() as i64][..], &shape].concat();
    let pixels: Vec<u8> = samples.iter().flat_map(|sample| &sample.view).copied().collect();
    let pixels = Tensor::f_from_data_size(&pixels, &shape, medium.kind())?.to_device(weights.0[0].device());
    let origins: Vec<Origin> = samples.iter().map(|sample| Origin { id: sample.id, epoch: 0, repeat: 0 }).collect();
    let valid = samples.iter().map(|sample| sample.valid).collect();
    let batch = Batch::new(pixels, &origins, seed).with_valid(Some(valid)).heard(log_mel)?;
    let Reconstruction { masked, guessed, original } = no_grad(|| method.reconstruct(weights, &batch))?;
    let rows: Vec<Vec<Tile>> = (0..samples.len() as i64)
        .map(|row| [&masked, &guessed, &original].iter().map(|all| tile(&all.get(row), medium)).collect())
        .collect();
    Ok(rows)
}

/// Frames of a clip that are shown side by side.
const FRAMES: i64 = 4;

/// Frames of [C, T, Y, X] in 0..1, from all of it; a sound turned, so that time runs to the right and high tones lie high.
fn tile(x: &Tensor, medium: Medium) -> Tile {
    let x = match medium {
        Medium::Picture => x.shallow_clone(),
        Medium::Sound => x.transpose(2, 3).flip([2]),
    };
    let frames = x.size()[1];
    // A still picture may have been repeated to two.
    let shown = (frames / 2).clamp(1, FRAMES);
    let frames: Vec<Tensor> = (0..shown).map(|at| x.select(1, at * frames / shown)).collect();
    let strip = (Tensor::cat(&frames, 2) * 255.0).round().to_kind(Kind::Uint8).to_device(Device::Cpu); // [C, Y, n·X]
    let [channels, height, width] = crate::op::sizes(&strip);
    let (width, height) = (width as u32, height as u32);
    if channels == 3 {
        let interleaved = strip.permute([1, 2, 0]).contiguous();
        return Tile::rgb(width, height, crate::bridge::bytes(&interleaved).to_vec());
    }
    Tile::grey(width, height, crate::bridge::bytes(&strip.get(0).contiguous()))
}
