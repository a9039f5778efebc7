//! The data loaders of evaluations: labeled samples in order, or one epoch of random views.

use super::ranks::Ranks;
use crate::config::Config;
use crate::data::caption::Tokenizer;
use crate::data::decode::ImageLimits;
use crate::data::mixture::Mixture;
use crate::data::order::{SampleOrder, rank_block_rows, rank_rows};
use crate::data::set::DataSet;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::loader::{DataLoader, Labels, LoaderOptions, UpdateBlocks, ViewFn};
use crate::setup;
use crate::view::crop::{Crop, Interpolation};
use crate::view::{View, ViewKey};
use serde::Serialize;
use std::sync::Arc;

/// Number of samples of a loaded block, which is one forward pass of the encoder. Blocks are the same on any number of
/// ranks, because the rounding of matrix products depends on their number of rows.
pub const ENCODER_BATCH: u64 = 64;

/// The random views on which the paper's recipe trains its classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Augmentation {
    /// The paper's: a crop of 8 to 100 % of the area, 3:4 to 4:3, bicubic, flipped half the time
    Paper,
    /// The views of the checkpoint's training, for images that flips and small crops destroy
    Run,
}

impl Augmentation {
    /// Returns the view. `Paper` samples the crop as torchvision does, up to ten times until one fits; the crop of the
    /// official code is sampled once and clipped.
    fn view(self, config: &Config) -> View {
        let view = &config.view;
        // The paper's augmentation is for images.
        if self == Augmentation::Run || view.audio.is_some() {
            return view.clone();
        }
        match &view.image {
            Some(image) => View { image: Some(Box::new(paper_view(image))), ..view.clone() },
            None => paper_view(view),
        }
    }
}

fn paper_view(view: &View) -> View {
    let crop = Crop { scale: [0.08, 1.0], interpolation: Interpolation::Bicubic, ..Crop::default() };
    View { crop, center_crop: view.center_crop, ..View::default() }
}

/// Opens a data set whose samples have labels.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if they have none.
pub fn open_labeled(url: &str) -> Result<Arc<Mixture>> {
    let set = Arc::new(Mixture::from_set(DataSet::open(url)?));
    if !set.has_labels()? {
        return Err(Error::usage(format!("{url} has no labels (.cls members); a probe needs a labeled set")));
    }
    Ok(set)
}

/// Returns the number of samples in this rank's part of a set.
pub fn local_len(set: &Mixture, ranks: &Ranks) -> u64 {
    let rows = rank_block_rows(set.len(), ENCODER_BATCH, ranks.rank(), ranks.size());
    rows.end - rows.start
}

/// Loads this rank's part of a set in the evaluation view, each sample once, in blocks of [`ENCODER_BATCH`].
pub fn sequential(set: &Arc<Mixture>, config: &Config, grid: Grid, ranks: &Ranks) -> Result<DataLoader> {
    sequential_with_captions(set, None, config, grid, ranks)
}

/// Loads as [`sequential`] does, with captions if a tokenizer is given.
pub fn sequential_with_captions(
    set: &Arc<Mixture>,
    tokenizer: Option<Arc<Tokenizer>>,
    config: &Config,
    grid: Grid,
    ranks: &Ranks,
) -> Result<DataLoader> {
    let view = config.view.clone();
    let view: ViewFn = Arc::new(move |sample, _, _, _, out| view.eval_view(&grid, sample, out));
    let options = LoaderOptions { tokenizer, ..loader_options(set, view, config.train.seed, config, grid, ranks)? };
    DataLoader::sequential(options, ENCODER_BATCH, ranks.rank(), ranks.size())
}

/// The samples of one epoch of training, and their views.
pub struct TrainEpoch {
    pub augmentation: Augmentation,
    /// Number of samples of an update, over all ranks.
    pub batch: u64,
    /// Number of updates.
    pub updates: u64,
    /// Determines order, views and the replacements of samples that cannot be decoded.
    pub seed: u64,
}

/// Loads this rank's part of the updates of one epoch, in random order and in random views, in blocks of
/// [`ENCODER_BATCH`].
pub fn train_epoch(
    set: &Arc<Mixture>,
    epoch: &TrainEpoch,
    config: &Config,
    grid: Grid,
    ranks: &Ranks,
) -> Result<DataLoader> {
    let &TrainEpoch { augmentation, batch, updates, seed } = epoch;
    let view = augmentation.view(config);
    let view: ViewFn =
        Arc::new(move |sample, id, epoch, _, out| view.train_view(&grid, sample, ViewKey { seed, id, epoch }, 0, out));
    let order = SampleOrder::with_sources(&set.weighted_sizes(), seed, config.data.shuffle_shards);
    let options = loader_options(set, view, seed, config, grid, ranks)?;
    let blocks = UpdateBlocks { global_batch: batch, block: ENCODER_BATCH, updates: 0..updates };
    DataLoader::for_training_in_blocks(options, order, blocks, ranks.rank(), ranks.size())
}

fn loader_options(
    set: &Arc<Mixture>,
    view: ViewFn,
    seed: u64,
    config: &Config,
    grid: Grid,
    ranks: &Ranks,
) -> Result<LoaderOptions> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(LoaderOptions {
        mixture: set.clone(),
        labels: if set.has_labels()? { Labels::Required } else { Labels::Ignored },
        single_frame_sets: setup::image_sets(config, set)?,
        cache: None,
        modality: config.view.modality(),
        view,
        tokenizer: None,
        shape: config.view.shape(&grid),
        limits: ImageLimits::default(),
        seed,
        threads: (cores / ranks.local_size()).max(1),
        prefetch_bytes: 64 << 20,
        max_corrupt_fraction: config.data.max_corrupt_fraction,
    })
}

/// Returns the number of classes of a set: the number of its class names, else one more than the maximum label;
/// collective, because each rank reads the labels of its part.
pub fn count_classes(set: &Mixture, ranks: &mut Ranks) -> Result<i64> {
    let named = set.sets()[0].classes.len() as i64;
    if named > 0 {
        return Ok(named);
    }
    let mut max_label = 0;
    for index in rank_rows(set.len(), ranks.rank(), ranks.size()) {
        let (shard, row) = set.find_sample(index)?;
        // The data loader reports samples without a readable label.
        max_label = max_label.max(shard.read_label(row).ok().flatten().unwrap_or(0));
    }
    Ok(ranks.all_reduce_max(max_label)? + 1)
}
