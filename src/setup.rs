//! From a config: the data set, the tokenizer, the order of samples and the data loader's options. Training, evaluation
//! and benchmarks share them.

use crate::config::Config;
use crate::data::cache::Cache;
use crate::data::caption::Tokenizer;
use crate::data::decode::ImageLimits;
use crate::data::mixture::Mixture;
use crate::data::modality::Modality;
use crate::data::order::SampleOrder;
use crate::data::set::DataSet;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::loader::{Labels, LoaderOptions};
use crate::view::ViewKey;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Opens what the config trains on.
///
/// # Errors
/// ExitCode::Usage if a set holds another modality than the config's view, or lacks captions or labels that the method
/// reads.
pub fn open_training_set(config: &Config) -> Result<Arc<Mixture>> {
    let timeout = Duration::from_secs_f64(config.data.store_timeout_s);
    let mixture = Mixture::open(&config.data.train.to_list(), timeout)?;
    for set in mixture.sets() {
        // One shuffle window gives way to the next; some room for replacements.
        set.set_max_open_shards(2 * config.data.shuffle_shards + 8);
        check_modality(set, config.view.modality())?;
        check_captions(set, config.view.caption.is_some())?;
        check_labels(set, config.method.requirements().classes)?;
    }
    Ok(Arc::new(mixture))
}

/// Returns for each set of a mixture whether it holds images beside sets of videos; empty where the method reads
/// samples of one kind.
pub fn image_sets(config: &Config, mixture: &Mixture) -> Result<Vec<bool>> {
    match config.view.image {
        None => Ok(Vec::new()),
        Some(_) => mixture.sets().iter().map(|set| set.is_video().map(|is_video| !is_video)).collect(),
    }
}

/// Returns the order of the training's samples; where there are images and videos, each step is of one kind.
pub fn sample_order(config: &Config, mixture: &Mixture) -> Result<SampleOrder> {
    let mut kinds: Vec<usize> = image_sets(config, mixture)?.into_iter().map(usize::from).collect();
    kinds.resize(mixture.sets().len(), 0);
    let order = SampleOrder::alternating(
        &mixture.weighted_sizes(),
        &kinds,
        config.train.global_batch,
        config.train.seed,
        config.data.shuffle_shards,
    );
    Ok(order.with_repeats(0, config.view.clip.as_ref().map_or(1, |clip| clip.repeats)))
}

/// Checks by its first sample that a set holds the wanted modality.
fn check_modality(set: &DataSet, wanted: Modality) -> Result<()> {
    let (shard, row) = set.find_sample(0)?;
    let holds = |modality: Modality| shard.member(row, modality.extensions()).is_some();
    let (other, remedy) = match wanted {
        Modality::Image => (Modality::Audio, "configure view.audio"),
        Modality::Audio => (Modality::Image, "leave view.audio out"),
    };
    if holds(wanted) || !holds(other) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "data set {} holds {}, and the config's view is of {}; {remedy}, or give another data set",
        set.name,
        other.plural(),
        wanted.plural()
    )))
}

/// Checks by its first sample that a set has captions where they are wanted.
pub fn check_captions(set: &DataSet, wanted: bool) -> Result<()> {
    let (shard, row) = set.find_sample(0)?;
    if !wanted || shard.has_member(row, "txt") {
        return Ok(());
    }
    Err(Error::usage(format!(
        "data set {} has no captions (.txt members), and the config reads some; pack it from a list with the column \
         caption",
        set.name
    )))
}

/// Checks by its class names and its first sample that a set has labels for a method with this many classes.
fn check_labels(set: &DataSet, classes: Option<i64>) -> Result<()> {
    let Some(classes) = classes else { return Ok(()) };
    if !set.has_labels()? {
        return Err(Error::usage(format!(
            "data set {} has no labels (.cls members), and the method learns from some; pack a folder of folders, one a \
             class, or choose a method without labels",
            set.name
        )));
    }
    let named = set.classes.len();
    if named as i64 > classes {
        return Err(Error::usage(format!(
            "data set {} has {named} classes and the method {classes}; set its classes to {named}",
            set.name
        )));
    }
    Ok(())
}

/// Opens the config's tokenizer; none where the method reads no captions.
///
/// # Errors
/// ExitCode::Usage if the model's vocabulary is smaller, or its mask pads with another token.
pub fn open_tokenizer(config: &Config) -> Result<Option<Arc<Tokenizer>>> {
    let (Some(caption), Some(text)) = (&config.view.caption, config.method.requirements().captions) else {
        return Ok(None);
    };
    let file = &caption.tokenizer;
    let tokenizer = Tokenizer::open(file, caption.context_length as usize)?;
    let size = tokenizer.vocab_size() as i64;
    if size > text.vocab_size {
        return Err(Error::usage(format!(
            "{file} has {size} tokens and the model's text encoder {}: give it as many (vocab_size)",
            text.vocab_size
        )));
    }
    let padding = tokenizer.padding_id();
    if let Some(mask) = text.mask.filter(|mask| mask.padding != padding) {
        return Err(Error::usage(format!(
            "{file} pads captions with token {padding}, and the text encoder's mask takes {} for padding: set \
             mask.padding to {padding}",
            mask.padding
        )));
    }
    Ok(Some(Arc::new(tokenizer)))
}

/// Returns the options of the training's data loader.
pub fn loader_options(
    config: &Config,
    mixture: Arc<Mixture>,
    tokenizer: Option<Arc<Tokenizer>>,
    world: &dyn World,
    grid: Grid,
) -> Result<LoaderOptions> {
    let view = config.view.for_device(world.device());
    let seed = config.train.seed;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cache = config.data.cache.as_ref();
    let cache = cache.map(|cache| Cache::open(Path::new(&cache.folder), (cache.limit_gb * 1e9) as u64).map(Arc::new));
    Ok(LoaderOptions {
        single_frame_sets: image_sets(config, &mixture)?,
        labels: config.method.requirements().classes.map_or(Labels::Ignored, |classes| Labels::Optional { classes }),
        mixture,
        cache: cache.transpose()?,
        modality: view.modality(),
        shape: view.shape(&grid),
        view: Arc::new(move |sample, id, epoch, repeats, out| {
            view.train_views(&grid, sample, ViewKey { seed, id, epoch }, repeats, out)
        }),
        tokenizer,
        limits: ImageLimits::default(),
        seed,
        threads: config.data.threads.unwrap_or((cores / world.local_size()).max(1)),
        prefetch_bytes: (config.data.prefetch_mb as usize) << 20,
        max_corrupt_fraction: config.data.max_corrupt_fraction,
    })
}
