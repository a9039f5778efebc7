//! `occlude sample`: images sampled from a model that generates them, or completions of the upper half of one's own
//! images.

use crate::checkpoint;
use crate::checkpoint::weights::{SavedModel, load_model};
use crate::data::decode::ImageLimits;
use crate::data::modality::{Modality, SampleDecoder};
use crate::error::{Error, Result};
use crate::log::image_grid::{self, Tile};
use crate::method::{Batch, Generate, Step, check_number};
use crate::op::shuffle::SampleKey;
use crate::reconstruct::{read_sample, tile};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor, no_grad};

/// Samples that are computed at a time.
const BATCH: i64 = 16;
/// Images in a row of the sheet.
const COLUMNS: usize = 8;

/// Options of the command line.
pub struct SampleOptions {
    /// URL of a run or a checkpoint.
    pub checkpoint: String,
    /// The PNG to write.
    pub out: PathBuf,
    /// Number of images, or of completions of each file.
    pub count: i64,
    pub temperature: f64,
    pub seed: u64,
    /// Files to complete.
    pub inputs: Vec<PathBuf>,
}

/// Samples and writes one sheet.
///
/// # Errors
/// ExitCode::Usage if the model generates no images, an option is out of range or a file cannot be read.
pub fn sample(options: &SampleOptions) -> Result<()> {
    check_number("--temperature", options.temperature, 0.01..=100.0)?;
    check_number("--count", options.count as f64, 1.0..=1024.0)?;
    let loaded = checkpoint::load_from_url(&options.checkpoint)?;
    let SavedModel { config, method, flat, buffers } = load_model(&loaded, Device::Cpu)?;
    let Some(generate) = method.capabilities().generate else {
        return Err(Error::usage(format!(
            "{} of this config samples no images: occlude sample wants an autoregressive method, and occlude reconstruct \
             draws what others predict",
            config.method.name()
        )));
    };
    let grid = method.model().patchify().grid;
    let step = Step::with_buffers(&flat.leaves, &buffers);
    let generator = Generator { generate, step: &step, options };
    let [channels, _, height, width] = grid.pixel_shape();
    if options.inputs.is_empty() {
        let empty = Tensor::zeros([1, channels, 1, height, width], (Kind::Uint8, Device::Cpu));
        let tiles = generator.tiles(&empty, 0)?;
        let rows: Vec<Vec<Tile>> = tiles.chunks(COLUMNS).map(<[Tile]>::to_vec).collect();
        return image_grid::save_png(&image_grid::compose(&[], &rows), &options.out);
    }
    let mut decoder = SampleDecoder::new(ImageLimits::default());
    let mut images = Vec::new();
    for path in &options.inputs {
        let (sample, shape) = read_sample(path, &config, &grid, &mut decoder)?;
        images.push(Tensor::from_slice(&sample.pixels).view(shape).unsqueeze(0));
    }
    let half = grid.rows / 2;
    let mut rows = Vec::new();
    for image in &images {
        let original = image.squeeze_dim(0).to_kind(Kind::Float) / 255.0; // [C, 1, Y, X]
        let given = original.copy();
        let _ = given.narrow(2, half, grid.rows - half).fill_(0.5);
        let mut row = vec![tile(&given, Modality::Image)];
        row.extend(generator.tiles(image, half * grid.cols)?);
        row.push(tile(&original, Modality::Image));
        rows.push(row);
    }
    let mut headings = vec![""; options.count as usize + 2];
    headings[0] = "given";
    headings[1] = "sampled";
    headings[options.count as usize + 1] = "original";
    image_grid::save_png(&image_grid::compose(&headings, &rows), &options.out)
}

/// A model that samples, with its options.
struct Generator<'a> {
    generate: &'a dyn Generate,
    step: &'a Step<'a>,
    options: &'a SampleOptions,
}

impl Generator<'_> {
    /// Samples images that begin with the first `kept` pixels of an image uint8 [1, C, 1, Y, X].
    fn tiles(&self, image: &Tensor, kept: i64) -> Result<Vec<Tile>> {
        let mut tiles = Vec::new();
        for first in (0..self.options.count).step_by(BATCH as usize) {
            let samples = BATCH.min(self.options.count - first);
            let keys: Vec<SampleKey> =
                (first..first + samples).map(|id| SampleKey { id: id as u64, epoch: 0, repeat: 0 }).collect();
            let batch = Batch::new(image.repeat([samples, 1, 1, 1, 1]), &keys, self.options.seed);
            let images = no_grad(|| self.generate.generate(self.step, &batch, kept, self.options.temperature))?;
            tiles.extend((0..samples).map(|index| tile(&images.get(index), Modality::Image)));
        }
        Ok(tiles)
    }
}
