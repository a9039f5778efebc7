//! Image sheets of a model's reconstructions: masked | reconstructed | original.

use crate::checkpoint;
use crate::checkpoint::weights::{SavedModel, load_model};
use crate::config::Config;
use crate::data::decode::ImageLimits;
use crate::data::modality::{Modality, SampleDecoder};
use crate::data::set::DataSet;
use crate::data::video::{self, Sampling};
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::loader::LoaderOptions;
use crate::log::image_grid::{self, Tile};
use crate::method::{Batch, MaskPolicy, Method, Reconstruct, Reconstruction, Step};
use crate::op::shuffle::SampleKey;
use crate::part::batch::Side;
use crate::part::buffers::Buffers;
use crate::part::params::Weights;
use crate::rng;
use crate::view::View;
use crate::view::clip::ClipConfig;
use crate::view::log_mel::LogMel;
use image::RgbImage;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor, no_grad};

/// Number of samples on the sheet of a training.
const SHEET_SAMPLES: usize = 8;
const HEADINGS: [&str; 3] = ["masked", "reconstructed", "original"];

/// A model whose predictions are drawn.
pub struct Subject<'a> {
    pub method: &'a dyn Method,
    pub weights: &'a Weights,
    pub buffers: &'a Buffers,
    /// Makes spectrograms of waveforms, where the loader's samples are waveforms.
    pub log_mel: Option<&'a LogMel>,
}

/// Draws the first samples of the training set under fixed masks, the same at every step. If the method reads images
/// beside videos, both kinds are shown.
pub fn sheet(subject: &Subject, options: &LoaderOptions, config: &Config) -> Result<RgbImage> {
    let channels = options.shape[0] as u32;
    let modality = options.modality;
    let model = SheetModel::new(config, subject)?;
    let view = sheet_view(config, modality, model.device());
    let grid = subject.method.model().patchify().grid;
    let mut decoder = SampleDecoder::new(options.limits);
    let ranges = sample_ranges(options);
    let mut rows = Vec::new();
    for range in &ranges {
        let shape = options.row_shape(range.start);
        let mut samples = Vec::new();
        for index in range.clone().take(SHEET_SAMPLES / ranges.len()) {
            // The data loader reports unreadable samples; the sheet shows the others.
            let (shard, row) = options.mixture.find_sample(index)?;
            let Ok(bytes) = shard.read(row, modality.extensions()) else { continue };
            let mut pixels = vec![0; options.row_bytes(shape)];
            let sample = decoder.open(&bytes, modality, channels);
            if let Ok(valid) = sample.and_then(|sample| view.eval_view(&grid, sample, &mut pixels)) {
                samples.push(SheetSample { id: options.mixture.id(index)?, pixels, valid });
            }
        }
        rows.extend(model.reconstruct(&samples, shape)?);
    }
    Ok(image_grid::compose(&HEADINGS, &rows))
}

/// Returns the view that shows a whole sample: of a video, frames from all of it.
fn sheet_view(config: &Config, modality: Modality, device: Device) -> View {
    match modality {
        Modality::Audio => config.view.for_device(device),
        Modality::Image => {
            let clip = ClipConfig { sampling: Sampling::Segments, multi_scale: None, repeats: 1 };
            let image = config.view.image.as_ref().map(|_| Box::default());
            View { clip: Some(clip), image, ..View::default() }
        }
    }
}

/// Returns the sample ranges of the first image set and of the first video set, or all samples if the method reads
/// samples of one kind.
fn sample_ranges(options: &LoaderOptions) -> Vec<Range<u64>> {
    let mixture = &options.mixture;
    let first_set =
        |single_frame: bool| options.single_frame_sets.iter().position(|&is_image| is_image == single_frame);
    let samples = |set: usize| mixture.set_range(mixture.sets()[..set].iter().map(DataSet::len).sum());
    let mut ranges: Vec<Range<u64>> = [true, false].into_iter().filter_map(first_set).map(samples).collect();
    if ranges.is_empty() {
        ranges.push(0..mixture.len());
    }
    ranges
}

/// `occlude reconstruct`: reconstructs a user's own files with a checkpoint's model. Writes one sheet for each file
/// into `out` and returns their paths. All files are read before the first sheet is written.
pub fn reconstruct_files(checkpoint: &str, inputs: &[PathBuf], out: &Path) -> Result<Vec<PathBuf>> {
    let loaded = checkpoint::load_from_url(checkpoint)?;
    let SavedModel { config, method, flat, buffers } = load_model(&loaded, Device::Cpu)?;
    let subject = Subject { method: method.as_ref(), weights: &flat.leaves, buffers: &buffers, log_mel: None };
    let model = SheetModel::new(&config, &subject)?;
    let grid = method.model().patchify().grid;
    let mut decoder = SampleDecoder::new(ImageLimits::default());
    let mut samples = Vec::new();
    for path in inputs {
        samples.push(read_sample(path, &config, &grid, &mut decoder)?);
    }
    std::fs::create_dir_all(out).map_err(|error| Error::disk(out.display(), error))?;
    let mut written = Vec::new();
    for (index, (path, (sample, shape))) in inputs.iter().zip(samples).enumerate() {
        let sheet = image_grid::compose(&HEADINGS, &model.reconstruct(&[sample], shape)?);
        let stem = path.file_stem().map_or_else(|| "input".into(), |stem| stem.to_string_lossy());
        let file = out.join(format!("{index:03}-{stem}.png"));
        image_grid::save_png(&sheet, &file)?;
        written.push(file);
    }
    Ok(written)
}

/// Reads a user's file as the model's input, with its shape [C, T, Y, X].
pub fn read_sample(
    path: &Path,
    config: &Config,
    grid: &Grid,
    decoder: &mut SampleDecoder,
) -> Result<(SheetSample, [i64; 4])> {
    let modality = config.view.modality();
    let bytes = std::fs::read(path).map_err(|error| Error::usage(format!("{}: {error}", path.display())))?;
    let is_single_image = config.method.requirements().images_beside_video && !video::is_video(&bytes);
    let shape = if is_single_image { grid.image().pixel_shape() } else { grid.pixel_shape() };
    let values = shape.iter().product::<i64>() as usize;
    let mut pixels = vec![0; values * modality.kind().elt_size_in_bytes()];
    let valid = decoder
        .open(&bytes, modality, config.input.channels as u32)
        .and_then(|sample| config.view.eval_view(grid, sample, &mut pixels))
        .map_err(|error| Error::usage(format!("{}: {}", path.display(), error.message)))?;
    let id = rng::hash_id(&[&path.display().to_string()]);
    Ok((SheetSample { id, pixels, valid }, shape))
}

/// One sample of a sheet.
pub struct SheetSample {
    pub id: u64,
    /// The model's input [C, T, Y, X] as bytes.
    pub pixels: Vec<u8>,
    /// Number of rows that are not padding.
    pub valid: u32,
}

/// A subject that can reconstruct, and what its inputs have in common.
struct SheetModel<'a> {
    reconstruct: &'a dyn Reconstruct,
    mask: &'a dyn MaskPolicy,
    weights: &'a Weights,
    buffers: &'a Buffers,
    log_mel: Option<&'a LogMel>,
    modality: Modality,
    seed: u64,
}

impl<'a> SheetModel<'a> {
    fn new(config: &Config, subject: &Subject<'a>) -> Result<SheetModel<'a>> {
        let (Some(reconstruct), Some(mask)) = (subject.method.capabilities().reconstruct, subject.method.mask()) else {
            let name = config.method.name();
            return Err(Error::usage(format!("{name} predicts no pixels: there is nothing to draw")));
        };
        Ok(SheetModel {
            reconstruct,
            mask,
            weights: subject.weights,
            buffers: subject.buffers,
            log_mel: subject.log_mel,
            modality: config.view.modality(),
            seed: config.train.seed,
        })
    }

    fn device(&self) -> Device {
        self.weights.0[0].device()
    }

    /// Returns one row of tiles for each sample; all samples have the shape [C, T, Y, X].
    fn reconstruct(&self, samples: &[SheetSample], shape: [i64; 4]) -> Result<Vec<Vec<Tile>>> {
        let shape = [&[samples.len() as i64][..], &shape].concat();
        let pixels: Vec<u8> = samples.iter().flat_map(|sample| &sample.pixels).copied().collect();
        let pixels = Tensor::f_from_data_size(&pixels, &shape, self.modality.kind())?.to_device(self.device());
        let keys: Vec<SampleKey> =
            samples.iter().map(|sample| SampleKey { id: sample.id, epoch: 0, repeat: 0 }).collect();
        let valid = samples.iter().map(|sample| sample.valid).collect();
        let side = Side { valid: Some(valid), ..Side::default() };
        let batch = Batch::new(pixels, &keys, self.seed).with_side(side).with_spectrograms(self.log_mel)?;
        let step = Step::with_buffers(self.weights, self.buffers);
        let Reconstruction { masked, predicted, original } =
            no_grad(|| self.reconstruct.reconstruct(&step, &batch, self.mask))?;
        let row = |index: i64| {
            let columns = [&masked, &predicted, &original];
            columns.iter().map(|column| tile(&column.get(index), self.modality)).collect()
        };
        Ok((0..samples.len() as i64).map(row).collect())
    }
}

/// Maximum number of frames of a video that are shown side by side.
const MAX_FRAMES: i64 = 4;

/// Converts [C, T, Y, X] in 0..1 to a tile with evenly spaced frames side by side. A spectrogram is rotated, so that
/// time runs to the right and high frequencies are at the top.
pub fn tile(x: &Tensor, modality: Modality) -> Tile {
    let x = match modality {
        Modality::Image => x.shallow_clone(),
        Modality::Audio => x.transpose(2, 3).flip([2]),
    };
    let frames = x.size()[1];
    // Half of the frames at most, because an image may have been repeated to two frames.
    let count = (frames / 2).clamp(1, MAX_FRAMES);
    let frames: Vec<Tensor> = (0..count).map(|index| x.select(1, index * frames / count)).collect();
    let strip = (Tensor::cat(&frames, 2) * 255.0).round().to_kind(Kind::Uint8).to_device(Device::Cpu); // [C, Y, n·X]
    let [channels, height, width] = crate::op::sizes(&strip);
    let width = width as u32;
    let height = height as u32;
    if channels == 3 {
        let interleaved = strip.permute([1, 2, 0]).contiguous();
        return Tile::from_rgb(width, height, crate::bridge::bytes(&interleaved).to_vec());
    }
    Tile::from_gray(width, height, crate::bridge::bytes(&strip.get(0).contiguous()))
}
