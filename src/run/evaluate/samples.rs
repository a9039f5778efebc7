//! Labelled samples on their way to a frozen encoder: the one place where evaluation meets data set, view and feed.

use super::ranks::Ranks;
use crate::config::Config;
use crate::data::caption::Tokenizer;
use crate::data::decode::Limits;
use crate::data::mix::Mix;
use crate::data::order::{Order, rows};
use crate::data::set::DataSet;
use crate::fault::{Fault, Result};
use crate::feed::{Feed, Source, ViewFn};
use crate::grid::Grid;
use crate::part::view::View;
use crate::part::view::crop::{Crop, Interpolation};
use crate::run::open;
use serde::Serialize;
use std::sync::Arc;

/// The random views on which the paper's recipe trains its classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Augmentation {
    /// The paper's: a box of 8 to 100 % of the area, 3:4 to 4:3, bicubic, mirrored half the time
    Paper,
    /// The one that the checkpoint was trained with, for pictures that mirrors and hard crops destroy
    Run,
}

impl Augmentation {
    /// `Paper` draws the box as torchvision does, up to ten times until one fits; the official crop draws once and
    /// cuts what does not fit.
    fn view(self, config: &Config) -> View {
        match self {
            // The paper's is for pictures.
            _ if config.view.sound.is_some() => config.view.clone(),
            Augmentation::Run => config.view.clone(),
            Augmentation::Paper => {
                let crop = Crop { scale: [0.08, 1.0], interpolation: Interpolation::Bicubic, ..Crop::default() };
                let paper = |view: &View| View { crop: crop.clone(), center: view.center, ..View::default() };
                match &config.view.still {
                    Some(still) => View { still: Some(Box::new(paper(still))), ..config.view.clone() },
                    None => paper(&config.view),
                }
            }
        }
    }
}

/// Opens a data set whose samples carry classes.
pub fn open(url: &str) -> Result<Arc<Mix>> {
    let set = Arc::new(Mix::one(DataSet::open(url)?));
    match set.labelled()? {
        true => Ok(set),
        false => Err(Fault::usage(format!("{url} has no labels (.cls members); a probe wants a labelled set"))),
    }
}

/// How many samples fall to this rank in a sweep.
pub fn share(set: &Mix, ranks: &Ranks) -> u64 {
    let share = rows(set.len(), ranks.rank(), ranks.size());
    share.end - share.start
}

/// This rank's share of a set in evaluation's view, each sample once, `batch` rows at a time.
pub fn sweep(set: &Arc<Mix>, batch: u64, config: &Config, grid: Grid, ranks: &Ranks) -> Result<Feed> {
    captioned(set, batch, None, config, grid, ranks)
}

/// As `sweep`, with captions where a tokenizer is given.
pub fn captioned(
    set: &Arc<Mix>,
    batch: u64,
    captions: Option<Arc<Tokenizer>>,
    config: &Config,
    grid: Grid,
    ranks: &Ranks,
) -> Result<Feed> {
    let view = config.view.clone();
    let view: ViewFn = Arc::new(move |sample, _, _, _, out| view.eval(&grid, sample, out));
    let source = Source { captions, ..source(set, view, config.train.seed, config, grid, ranks)? };
    Feed::sweep(source, batch, ranks.rank(), ranks.size())
}

/// This rank's rows of the first `steps` runs of `piece` samples of one epoch, in random order and in random views.
/// Each epoch has a `seed` of its own, which everything that is random in it follows: order, boxes, mirrors and what
/// stands in for a sample that cannot be decoded.
pub fn epoch(
    set: &Arc<Mix>,
    augmentation: Augmentation,
    (piece, steps): (u64, u64),
    seed: u64,
    config: &Config,
    grid: Grid,
    ranks: &Ranks,
) -> Result<Feed> {
    let view = augmentation.view(config);
    let view: ViewFn = Arc::new(move |sample, id, epoch, _, out| view.train(&grid, sample, seed, id, epoch, 0, out));
    let order = Order::mixed(&set.sizes(), seed, config.data.open_shards);
    let source = source(set, view, seed, config, grid, ranks)?;
    Feed::train(source, order, piece, ranks.rank(), ranks.size(), 0..steps)
}

fn source(set: &Arc<Mix>, view: ViewFn, seed: u64, config: &Config, grid: Grid, ranks: &Ranks) -> Result<Source> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Source {
        set: set.clone(),
        stills: open::stills(config, set)?,
        cache: None,
        medium: config.view.medium(),
        view,
        captions: None,
        shape: config.view.shape(&grid),
        limits: Limits::default(),
        seed,
        threads: (cores / ranks.neighbours()).max(1),
        prefetch_bytes: 64 << 20,
        max_bad_share: config.data.max_bad_share,
    })
}

/// How many classes a set has: as many as it has names for, else one more than the largest label; collective, for
/// each rank reads the labels of its share.
pub fn classes(set: &Mix, ranks: &mut Ranks) -> Result<i64> {
    let named = set.sets()[0].classes.len() as i64;
    if named > 0 {
        return Ok(named);
    }
    let mut largest = 0;
    for index in rows(set.len(), ranks.rank(), ranks.size()) {
        let (shard, row) = set.sample(index)?;
        // A sample without a readable label is the feed's to name.
        largest = largest.max(shard.label(row).ok().flatten().unwrap_or(0));
    }
    Ok(ranks.largest(largest)? + 1)
}
