//! Everything that a training needs before its first step: a mistake of the user ends here, before any work.

use super::learned_buffers;
use super::state;
use super::step::Stepper;
use crate::checkpoint::lease::{Lease, TIME_TO_LIVE};
use crate::checkpoint::weights::{check_same_config, weights_only};
use crate::checkpoint::{self, CheckpointSelector, LoadedCheckpoint};
use crate::config::{self, Config};
use crate::data::caption::Tokenizer;
use crate::data::mixture::Mixture;
use crate::data::order::SampleOrder;
use crate::data::store::Store;
use crate::dist::{self, Heartbeat, HeartbeatTimeouts, Phase, ProgressHandle, World};
use crate::error::{Error, ExitCode, Result};
use crate::grid::Grid;
use crate::loader::LoaderOptions;
use crate::log::RunLog;
use crate::log::upload::{self, Uploader};
use crate::method::Progress;
use crate::optim::bucket::GradReduce;
use crate::optim::flat::{FlatOptions, FlatParams, ShardOptions};
use crate::optim::schedule::Schedule;
use crate::optim::update::Updater;
use crate::setup::{loader_options, open_tokenizer, open_training_set, sample_order};
use crate::timing::peak::Peak;
use crate::train::controls::StepRates;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// The checkpoint that a training continues from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the run's newest intact checkpoint, otherwise from the start.
    Auto,
    /// From the start, in a run that has no checkpoint yet.
    Never,
    /// From this checkpoint or run, which stays untouched. A run that has checkpoints of its own goes on from them,
    /// because a scheduler repeats the same command; only one of its own takes it back.
    Url(String),
    /// Like `Url`, but loads the weights alone: no moments, from step 0, under any recipe whose model has the same
    /// tensors.
    Weights(String),
}

impl FromStr for Resume {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            url => Resume::Url(url.to_string()),
        })
    }
}

/// A training, ready for step `first_step`.
pub struct Session {
    pub store: Store,
    pub folder: PathBuf,
    pub stepper: Stepper,
    pub schedule: Schedule,
    pub loader: LoaderOptions,
    pub sample_order: Option<SampleOrder>,
    /// Samples of the data set.
    pub num_samples: u64,
    pub first_step: u64,
    pub total_steps: u64,
    /// Rank 0 only.
    pub log: Option<RunLog>,
    /// Images per second at full use of the devices, where the method reads images beside videos.
    pub peak_images_per_s: Option<f64>,
    /// Rank 0 of a run in an object store.
    pub uploader: Option<Uploader>,
    /// Rank 0 only.
    pub lease: Option<Lease>,
    pub progress: ProgressHandle,
    heartbeat: Option<Heartbeat>,
}

impl Session {
    /// Opens everything; collective.
    pub fn open(config: &Config, run: &str, resume: &Resume, world: &Arc<dyn World>) -> Result<Session> {
        check_batch_split(config, world.size())?;
        let mixture = open_training_set(config)?;
        let tokenizer = open_tokenizer(config)?;
        check_agreement(config, &mixture, tokenizer.as_deref(), world.as_ref())?;
        let heartbeat = start_heartbeat(config, world)?;
        let store = Store::open(run)?;
        let folder = upload::local_folder(&store);
        let total_steps = config.total_steps(mixture.len());
        let mut stepper = build_stepper(config, world)?;
        let mut channel = world.open_channel("opening")?;
        let mut lease = None;
        let mut loaded = None;
        if world.rank() == 0 {
            check_writable(&store, &folder, state::checkpoint_bytes(&stepper))?;
            lease = Some(Lease::acquire(&store, TIME_TO_LIVE).map_err(as_usage_error)?);
            loaded = find_checkpoint(config, &store, resume)?;
        }
        let restored = state::restore(&mut stepper, loaded.as_ref(), channel.as_mut())?;
        let first_step = restored.unwrap_or(0);
        let grid = stepper.method.model().patchify().grid;
        let loader = loader_options(config, mixture.clone(), tokenizer, world.as_ref(), grid)?;
        let batch = config.train.global_batch;
        let schedule = config.optim.schedule(mixture.len(), batch, total_steps * batch);
        let mut log = None;
        let mut uploader = None;
        let peak = Peak::detect(world.as_ref(), config.train.dtype.kind())?;
        tracing::debug!("MFU is relative to {:.2} TFLOP/s a rank: {}", peak.flops / 1e12, peak.source);
        let peak_rate =
            |grid: &Grid| peak.samples_per_s(stepper.method.cost(grid, batch).training_flops(), world.size());
        let has_images = config.method.requirements().images_beside_video;
        let peak_images_per_s = has_images.then(|| peak_rate(&Grid { frames: 1, ..grid }));
        if world.rank() == 0 {
            log_start(run, first_step, total_steps, &schedule);
            uploader = Uploader::open(&store, first_step)?;
            log = Some(start_log(config, &folder, first_step, total_steps)?.with_peak_samples_per_s(peak_rate(&grid)));
        }
        if restored.is_none() {
            heartbeat.progress_handle().report(0, Phase::Data);
            let folder = (world.rank() == 0).then_some(folder.as_path());
            learned_buffers::learn(&stepper, config, &loader, channel.as_mut(), folder)?;
        }
        Ok(Session {
            loader,
            sample_order: Some(sample_order(config, &mixture)?),
            num_samples: mixture.len(),
            store,
            folder,
            stepper,
            schedule,
            first_step,
            total_steps,
            log,
            peak_images_per_s,
            uploader,
            lease,
            progress: heartbeat.progress_handle(),
            heartbeat: Some(heartbeat),
        })
    }

    /// Returns the learning rate and the progress of a step.
    pub fn rates(&self, config: &Config, step: u64) -> StepRates {
        let global_batch = config.train.global_batch;
        let samples = step * global_batch;
        let total_samples = self.total_steps * global_batch;
        let progress = Progress { samples, global_batch, epoch_samples: self.num_samples, total_samples };
        StepRates { lr: self.schedule.lr_at(samples), progress }
    }

    /// Reports to the heartbeat where this rank is.
    pub fn report_progress(&self, step: u64, phase: Phase) {
        self.progress.report(step, phase);
    }

    /// Leaves the other ranks.
    pub fn close(&mut self) {
        if let Some(heartbeat) = self.heartbeat.take() {
            heartbeat.finish();
        }
    }
}

/// Builds the model and its optimizer as the config wants them on this rank; collective.
pub fn build_stepper(config: &Config, world: &Arc<dyn World>) -> Result<Stepper> {
    let mut method = config.method.build(&config.input)?;
    method.model_mut().set_recompute(config.train.recompute);
    let params = method.model().params();
    let seed = config.train.seed;
    let kind = config.train.dtype.kind();
    let device = world.device();
    let reduce =
        GradReduce { bucket_bytes: (config.world.bucket_mb * 1e6) as usize, kind: config.world.grad_dtype.kind() };
    let flat = if config.world.shard_optimizer && world.size() > 1 {
        let shards = ShardOptions { bucket_bytes: reduce.bucket_bytes, rank: world.rank(), world_size: world.size() };
        FlatParams::new_sharded(params, FlatOptions { seed, kind, device }, shards)?
    } else {
        FlatParams::new(params, seed, kind, device)?
    };
    let updater = Updater::new(&flat, &config.optim);
    let log_mel = config.view.for_device(device).log_mel(&method.model().patchify().grid, device)?;
    let timeout = Duration::from_secs_f64(config.world.collective_timeout_s);
    let mut stepper = Stepper::new(method, flat, updater, world.clone(), reduce, timeout)?;
    stepper.log_mel = log_mel;
    Ok(stepper)
}

/// Checks that the ranks can divide a batch.
fn check_batch_split(config: &Config, ranks: usize) -> Result<()> {
    let batch = config.train.global_batch;
    if batch < ranks as u64 {
        return Err(Error::usage(format!(
            "train.global_batch is {batch}, which {ranks} ranks cannot share; give at least {ranks}, or start fewer ranks"
        )));
    }
    if config.method.requirements().whole_batch && !batch.is_multiple_of(ranks as u64) {
        let below = batch / ranks as u64 * ranks as u64;
        return Err(Error::usage(format!(
            "train.global_batch is {batch}, which {ranks} ranks cannot divide equally, and the loss compares all ranks' \
             samples; give {below} or {}, or start another number of ranks",
            below + ranks as u64
        )));
    }
    Ok(())
}

/// Checks that ranks have the same config, build and data: otherwise they would add gradients that do not belong
/// together.
fn check_agreement(config: &Config, mixture: &Mixture, tokenizer: Option<&Tokenizer>, world: &dyn World) -> Result<()> {
    let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_string();
    let program = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    let settings = config::leaves(&config.to_json());
    let build = format!("{} {}", env!("CARGO_PKG_VERSION"), hash(&program));
    let mut values = vec![("build", build), ("data set", hash(&mixture.digest()))];
    values.extend(tokenizer.map(|tokenizer| ("tokenizer", tokenizer.digest().to_owned())));
    values.extend(settings.iter().map(|(path, value)| (path.as_str(), value.to_string())));
    dist::check_agreement(world, &values)
}

fn start_heartbeat(config: &Config, world: &Arc<dyn World>) -> Result<Heartbeat> {
    let silence = Duration::from_secs_f64(config.world.heartbeat_timeout_s);
    let collective = Duration::from_secs_f64(config.world.collective_timeout_s);
    let store = Duration::from_secs_f64(config.data.store_timeout_s);
    let timeouts = HeartbeatTimeouts { silence, ..HeartbeatTimeouts::default() };
    let timeouts = timeouts.with_phase(Phase::Compute, collective);
    Heartbeat::start(world, timeouts.with_phase(Phase::Data, store + Duration::from_secs(600)))
}

/// Checks that the run can be written and a checkpoint fits, now and not after the first hour.
fn check_writable(store: &Store, folder: &Path, needed: u64) -> Result<()> {
    if store.local_path().is_none() {
        store.put(".probe", b"probe")?;
        return store.delete(".probe");
    }
    std::fs::create_dir_all(folder).map_err(|error| {
        Error::usage(format!("{}: {error}; give --run a folder that can be written", folder.display()))
    })?;
    let probe = folder.join(".probe");
    std::fs::write(&probe, b"probe").and_then(|()| std::fs::remove_file(&probe)).map_err(|error| {
        Error::usage(format!("{} cannot be written: {error}; give --run another folder", folder.display()))
    })?;
    match store.free_bytes() {
        Some(free) if free < needed => Err(Error::usage(format!(
            "{} has {} MB free, and one checkpoint of this model takes {} MB; free some, or give --run another disk",
            folder.display(),
            free / 1_000_000,
            needed.div_ceil(1_000_000)
        ))),
        _ => Ok(()),
    }
}

/// Before the first step, missing permission or space is for the user to mend.
fn as_usage_error(error: Error) -> Error {
    if error.code == ExitCode::Disk { Error::usage(error.message) } else { error }
}

/// Finds the checkpoint to go on from.
fn find_checkpoint(config: &Config, store: &Store, resume: &Resume) -> Result<Option<LoadedCheckpoint>> {
    let latest = || checkpoint::load_from_run(store, CheckpointSelector::Latest);
    let loaded = match resume {
        Resume::Auto => latest()?,
        Resume::Url(url) => Some(match latest()? {
            Some(own) if !is_within(&Store::open(url)?, store) => {
                let run = store.url();
                let step = own.manifest.step;
                tracing::info!(
                    "{run} was started from {url} before; it continues from its own checkpoint of step {step}"
                );
                own
            }
            _ => checkpoint::load_from_url(url)?,
        }),
        Resume::Weights(url) => Some(match latest()? {
            Some(own) => own,
            // The model's own check of names and shapes follows.
            None => return checkpoint::load_from_url(url).map(|loaded| Some(weights_only(loaded))),
        }),
        Resume::Never => match latest()? {
            None => None,
            Some(found) => {
                return Err(Error::usage(format!(
                    "{} holds a checkpoint of step {} and --resume never was given; give another --run, or --resume auto \
                     to go on",
                    store.url(),
                    found.manifest.step
                )));
            }
        },
    };
    if let Some(loaded) = &loaded {
        check_same_config(config, loaded)?;
    }
    Ok(loaded)
}

/// Logs where a training goes on, and what its user may not have meant.
fn log_start(run: &str, first_step: u64, total_steps: u64, schedule: &Schedule) {
    match first_step {
        0 => {}
        _ if first_step >= total_steps => {
            tracing::info!("{run} has done its {total_steps} steps already; nothing is left to train");
        }
        _ => tracing::info!("{run} goes on after step {first_step} of {total_steps}"),
    }
    if schedule.warmup_samples >= schedule.total_samples {
        tracing::warn!(
            "optim.warmup lasts {} samples and the training {}: the learning rate never reaches its peak of {}",
            schedule.warmup_samples,
            schedule.total_samples,
            schedule.peak_lr
        );
    }
}

/// Returns whether `inner` is `outer` or lies in it.
fn is_within(inner: &Store, outer: &Store) -> bool {
    format!("{}/", inner.url()).starts_with(&format!("{}/", outer.url()))
}

fn start_log(config: &Config, folder: &Path, first_step: u64, total_steps: u64) -> Result<RunLog> {
    let text = serde_json::to_string_pretty(&config.to_json()).expect("a config is JSON");
    let path = folder.join("config.json");
    std::fs::write(&path, text + "\n").map_err(|error| Error::disk(path.display(), error))?;
    RunLog::resume(folder, first_step, total_steps, config.log.interval_s)
}
