//! Everything that a training needs before its first step: what the user got wrong ends here, before any work.

use super::checkpoint::{self, Loaded, Which};
use super::lease::{Lease, TIME_TO_LIVE};
use super::log::Log;
use super::roof::peak::Peak;
use super::spool::{self, Spool};
use super::state;
use super::step::Stepper;
use crate::config::{self, Config};
use crate::data::cache::Cache;
use crate::data::caption::Tokenizer;
use crate::data::decode::Limits;
use crate::data::medium::Medium;
use crate::data::mix::Mix;
use crate::data::order::Order;
use crate::data::set::DataSet;
use crate::data::store::Store;
use crate::device::{self, Beat, Limits as Patience, Phase, Pulse, World};
use crate::fault::{Code, Fault, Result};
use crate::feed::Source;
use crate::grid::Grid;
use crate::optim::bucket::Wire;
use crate::optim::flat::Flat;
use crate::optim::schedule::Schedule;
use crate::optim::update::Updater;
use crate::part::work::Work;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Where to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the run's newest whole checkpoint, else from the start.
    Auto,
    /// From the start, in a run that has no checkpoint yet.
    Never,
    /// From this checkpoint or run, which stays untouched. A run that has checkpoints of its own goes on from them, for
    /// a scheduler gives the same command again; it is taken back only by one of its own.
    From(String),
    /// As `From`, with its weights alone: no moments, from step 0, under any recipe whose model has the same tensors.
    Weights(String),
}

impl FromStr for Resume {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            url => Resume::From(url.to_string()),
        })
    }
}

/// A training, ready for step `first`.
pub struct Opened {
    pub store: Store,
    pub folder: PathBuf,
    pub stepper: Stepper,
    pub schedule: Schedule,
    pub source: Source,
    pub order: Option<Order>,
    /// Samples of the data set.
    pub samples: u64,
    pub first: u64,
    pub steps: u64,
    pub deadline: Duration,
    /// Rank 0 only.
    pub log: Option<Log>,
    /// Still pictures a second at full use of the devices, where the method reads those beside clips.
    pub still: Option<f64>,
    /// Rank 0 of a run in an object store.
    pub spool: Option<Spool>,
    /// Rank 0 only.
    pub lease: Option<Lease>,
    pub beat: Beat,
    pulse: Option<Pulse>,
}

impl Opened {
    /// Tells the heartbeat where this rank is.
    pub fn beat(&self, step: u64, phase: Phase) {
        self.beat.at(step, phase);
    }

    /// Takes leave of the other ranks.
    pub fn close(&mut self) {
        if let Some(pulse) = self.pulse.take() {
            pulse.finish();
        }
    }
}

pub fn open(config: &Config, run: &str, resume: &Resume, world: &Arc<dyn World>) -> Result<Opened> {
    shares(config, world.size())?;
    let set = training_set(config)?;
    let captions = tokenizer(config)?;
    agree(config, &set, captions.as_deref(), world.as_ref())?;
    let deadline = Duration::from_secs_f64(config.world.deadline_s);
    let patience = Duration::from_secs_f64(config.world.frozen_s);
    let patience = Patience { silence: patience, ..Patience::default() }.with(Phase::Compute, deadline);
    let away = Duration::from_secs_f64(config.data.patience_s);
    let patience = patience.with(Phase::Data, away + Duration::from_secs(600));
    let pulse = Pulse::start(world, patience)?;
    let beat = pulse.beat();

    let store = Store::open(run)?;
    let folder = spool::folder(&store);
    let steps = config.steps(set.len());
    let mut stepper = stepper(config, world, deadline)?;
    let mut channel = world.channel("opening")?;
    let mut lease = None;
    let mut loaded = None;
    if world.rank() == 0 {
        writable(&store, &folder, state::bytes_needed(&stepper.flat, config.optim.ema.is_some()))?;
        lease = Some(Lease::acquire(&store, TIME_TO_LIVE).map_err(early)?);
        loaded = find(config, &store, resume)?;
    }
    let first = state::begin(&mut stepper, loaded.as_ref(), channel.as_mut())?;
    let schedule = config.optim.schedule(set.len(), config.train.global_batch, steps * config.train.global_batch);
    if world.rank() == 0 {
        tell(run, first, steps, &schedule);
    }
    let spool = if world.rank() == 0 { Spool::open(&store, first)? } else { None };
    let peak = Peak::here(world.as_ref(), config.train.dtype.kind())?;
    tracing::debug!("model FLOP utilisation is told of {:.2} TFLOP/s a rank: {}", peak.flops / 1e12, peak.source);
    let ceiling = |work: Work| peak.samples_per_s(work.training_flops(), world.size());
    let still = stepper.method.still().map(|(_, work)| ceiling(work));
    let ceiling = ceiling(stepper.method.work(config.train.global_batch));
    let log = match world.rank() {
        0 => Some(begin_log(config, &folder, first, steps)?.with_ceiling(ceiling)),
        _ => None,
    };
    Ok(Opened {
        schedule,
        source: source(config, set.clone(), captions, world.as_ref(), *stepper.method.grid())?,
        order: Some(order(config, &set)?),
        samples: set.len(),
        store,
        folder,
        stepper,
        first,
        steps,
        deadline,
        log,
        still,
        spool,
        lease,
        beat,
        pulse: Some(pulse),
    })
}

/// What the config trains on.
pub(super) fn training_set(config: &Config) -> Result<Arc<Mix>> {
    let set = Mix::open(&config.data.train.list(), Duration::from_secs_f64(config.data.patience_s))?;
    // One window gives way to the next; some room for replacements.
    set.sets().iter().for_each(|set| set.hold(2 * config.data.open_shards + 8));
    set.sets().iter().try_for_each(|set| fits(set, config.view.medium()))?;
    set.sets().iter().try_for_each(|set| captioned(set, config.view.caption.is_some()))?;
    Ok(Arc::new(set))
}

/// Which sets of a mixture hold still pictures; none where the method reads samples of one kind.
pub(super) fn stills(config: &Config, set: &Mix) -> Result<Vec<bool>> {
    match config.view.still {
        None => Ok(Vec::new()),
        Some(_) => set.sets().iter().map(|set| set.moving().map(|moving| !moving)).collect(),
    }
}

/// The order of training's samples; of still pictures and clips, whole steps of either.
pub(super) fn order(config: &Config, set: &Mix) -> Result<Order> {
    let mut kinds: Vec<usize> = stills(config, set)?.into_iter().map(usize::from).collect();
    kinds.resize(set.sets().len(), 0);
    let (seed, open) = (config.train.seed, config.data.open_shards);
    let order = Order::by_turns(&set.sizes(), &kinds, config.train.global_batch, seed, open);
    Ok(order.repeating(0, config.view.clip.as_ref().map_or(1, |clip| clip.repeats)))
}

/// Refuses a set of sounds where pictures are wanted, and the other way round, by its first sample.
fn fits(set: &DataSet, wanted: Medium) -> Result<()> {
    let (shard, row) = set.sample(0)?;
    let has = |medium: Medium| shard.member(row, medium.extensions()).is_some();
    let (other, remedy) = match wanted {
        Medium::Picture => (Medium::Sound, "configure view.sound"),
        Medium::Sound => (Medium::Picture, "leave view.sound out"),
    };
    match has(other) && !has(wanted) {
        true => Err(Fault::usage(format!(
            "data set {} holds {}, and the config's view is of {}; {remedy}, or give another data set",
            set.name,
            other.plural(),
            wanted.plural()
        ))),
        false => Ok(()),
    }
}

/// Refuses a set without captions where they are wanted, by its first sample.
pub(super) fn captioned(set: &DataSet, wanted: bool) -> Result<()> {
    let (shard, row) = set.sample(0)?;
    match !wanted || shard.has(row, "txt") {
        true => Ok(()),
        false => Err(Fault::usage(format!(
            "data set {} has no captions (.txt members), and the config reads some; pack it from a list with the column \
             caption",
            set.name
        ))),
    }
}

/// The config's tokenizer, of which the model must have room for every token.
pub(super) fn tokenizer(config: &Config) -> Result<Option<Arc<Tokenizer>>> {
    let (Some(caption), Some(text)) = (&config.view.caption, config.method.text()) else { return Ok(None) };
    let tokenizer = Tokenizer::open(&caption.tokenizer, caption.length as usize)?;
    let (file, size, pads) = (&caption.tokenizer, tokenizer.size() as i64, tokenizer.padding());
    if size > text.vocabulary {
        return Err(Fault::usage(format!(
            "{file} has {size} tokens and the model's text tower {}: give it as many (vocabulary)",
            text.vocabulary
        )));
    }
    match text.mask {
        Some(mask) if mask.padding != pads => Err(Fault::usage(format!(
            "{file} pads captions with token {pads}, and the text tower's mask takes {} for padding: set mask.padding to {pads}",
            mask.padding
        ))),
        _ => Ok(Some(Arc::new(tokenizer))),
    }
}

/// A batch that the ranks can share.
fn shares(config: &Config, world: usize) -> Result<()> {
    let batch = config.train.global_batch;
    if batch < world as u64 {
        return Err(Fault::usage(format!(
            "train.global_batch is {batch}, which {world} ranks cannot share; give at least {world}, or start fewer ranks"
        )));
    }
    if config.method.needs().whole_batch && !batch.is_multiple_of(world as u64) {
        let near = batch / world as u64 * world as u64;
        return Err(Fault::usage(format!(
            "train.global_batch is {batch}, of which {world} ranks have no equal shares, and the loss compares all ranks' \
             samples; give {near} or {}, or start another number of ranks",
            near + world as u64
        )));
    }
    Ok(())
}

/// Ranks that differ in config, build or data would add up gradients that do not belong together.
fn agree(config: &Config, set: &Mix, captions: Option<&Tokenizer>, world: &dyn World) -> Result<()> {
    let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_string();
    let program = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    let settings = config::leaves(&config.resolved());
    let mut texts =
        vec![("build", format!("{} {}", env!("CARGO_PKG_VERSION"), hash(&program))), ("data set", hash(&set.digest()))];
    texts.extend(captions.map(|captions| ("tokenizer", captions.digest().to_owned())));
    texts.extend(settings.iter().map(|(path, value)| (path.as_str(), value.to_string())));
    device::agree(world, &texts)
}

/// The model and its optimizer as the config wants them on this rank.
pub(super) fn stepper(config: &Config, world: &Arc<dyn World>, deadline: Duration) -> Result<Stepper> {
    let mut method = config.method.build(&config.input)?;
    if config.train.recompute {
        method.recompute();
    }
    let (table, seed, kind, device) = (method.table(), config.train.seed, config.train.dtype.kind(), world.device());
    let wire = Wire { bytes: (config.world.bucket_mb * 1e6) as usize, kind: config.world.wire.kind() };
    let flat = match config.world.shard_optimizer && world.size() > 1 {
        true => Flat::sharded(table, seed, (kind, device), wire.bytes, (world.rank(), world.size()))?,
        false => Flat::new(table, seed, kind, device)?,
    };
    let updater = Updater::new(&flat, &config.optim);
    let log_mel = config.view.on(device).log_mel(method.grid(), device)?;
    let mut stepper = Stepper::new(method, flat, updater, world.clone(), wire, deadline)?;
    stepper.log_mel = log_mel;
    Ok(stepper)
}

/// The run can be written, and a checkpoint fits: told now, not after the first hour.
fn writable(store: &Store, folder: &Path, needed: u64) -> Result<()> {
    if store.local().is_none() {
        store.put(".probe", b"probe")?;
        return store.delete(".probe");
    }
    std::fs::create_dir_all(folder).map_err(|error| {
        Fault::usage(format!("{}: {error}; give --run a folder that can be written", folder.display()))
    })?;
    let probe = folder.join(".probe");
    std::fs::write(&probe, b"probe").and_then(|()| std::fs::remove_file(&probe)).map_err(|error| {
        Fault::usage(format!("{} cannot be written: {error}; give --run another folder", folder.display()))
    })?;
    match store.free_bytes() {
        Some(free) if free < needed => Err(Fault::usage(format!(
            "{} has {} MB free, and one checkpoint of this model takes {} MB; free some, or give --run another disk",
            folder.display(),
            free / 1_000_000,
            needed.div_ceil(1_000_000)
        ))),
        _ => Ok(()),
    }
}

/// What fails before the first step for want of permission or space is for the user to mend.
fn early(fault: Fault) -> Fault {
    if fault.code == Code::Disk { Fault::usage(fault.message) } else { fault }
}

/// The checkpoint to go on from.
fn find(config: &Config, store: &Store, resume: &Resume) -> Result<Option<Loaded>> {
    let loaded = match resume {
        Resume::Auto => checkpoint::find(store, Which::Latest)?,
        Resume::From(url) => Some(match checkpoint::find(store, Which::Latest)? {
            Some(own) if !within(&Store::open(url)?, store) => {
                let (run, step) = (store.url(), own.manifest.step);
                tracing::info!("{run} has begun from {url} before; it goes on from its own checkpoint of step {step}");
                own
            }
            _ => checkpoint::open(url)?,
        }),
        Resume::Weights(url) => Some(match checkpoint::find(store, Which::Latest)? {
            Some(own) => own,
            // The model's own check of names and shapes follows.
            None => return checkpoint::open(url).map(|loaded| Some(state::weights_alone(loaded))),
        }),
        Resume::Never => match checkpoint::find(store, Which::Latest)? {
            None => None,
            Some(found) => {
                return Err(Fault::usage(format!(
                    "{} holds a checkpoint of step {} and --resume never was given; give another --run, or --resume auto \
                     to go on",
                    store.url(),
                    found.manifest.step
                )));
            }
        },
    };
    if let Some(loaded) = &loaded {
        state::same(config, loaded)?;
    }
    Ok(loaded)
}

/// Where a training goes on, and what its user may not have meant.
fn tell(run: &str, first: u64, steps: u64, schedule: &Schedule) {
    match first {
        0 => {}
        _ if first >= steps => tracing::info!("{run} has done its {steps} steps already; nothing is left to train"),
        _ => tracing::info!("{run} goes on after step {first} of {steps}"),
    }
    if schedule.warmup >= schedule.total {
        tracing::warn!(
            "optim.warmup lasts {} samples and the training {}: the learning rate never reaches its peak of {}",
            schedule.warmup,
            schedule.total,
            schedule.peak
        );
    }
}

/// Whether `inner` is `outer` or lies in it.
fn within(inner: &Store, outer: &Store) -> bool {
    format!("{}/", inner.url()).starts_with(&format!("{}/", outer.url()))
}

fn begin_log(config: &Config, folder: &Path, first: u64, steps: u64) -> Result<Log> {
    let text = serde_json::to_string_pretty(&config.resolved()).expect("a config is JSON");
    let path = folder.join("config.json");
    std::fs::write(&path, text + "\n").map_err(|error| Fault::disk(path.display(), error))?;
    Log::resume(folder, first, steps, config.log.every_s)
}

/// The conveyor's end of the config.
pub(super) fn source(
    config: &Config,
    set: Arc<Mix>,
    captions: Option<Arc<Tokenizer>>,
    world: &dyn World,
    grid: Grid,
) -> Result<Source> {
    let (view, seed) = (config.view.on(world.device()), config.train.seed);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cache = config.data.cache.as_ref();
    let cache = cache.map(|cache| Cache::open(Path::new(&cache.folder), (cache.limit_gb * 1e9) as u64).map(Arc::new));
    Ok(Source {
        stills: stills(config, &set)?,
        set,
        cache: cache.transpose()?,
        medium: view.medium(),
        shape: view.shape(&grid),
        view: Arc::new(move |sample, id, epoch, repeats, out| {
            view.train_all(&grid, sample, seed, id, epoch, repeats, out)
        }),
        captions,
        limits: Limits::default(),
        seed,
        threads: config.data.threads.unwrap_or((cores / world.local_size()).max(1)),
        prefetch_bytes: (config.data.prefetch_mb as usize) << 20,
        max_bad_share: config.data.max_bad_share,
    })
}
