//! The training loop: open the run, then rows → step → log, and now and then a checkpoint and pictures.
//!
//! A step's outcome may come while the next one is in flight. It is checked and logged then, after the same step on
//! every rank; before anything is saved or drawn, the last one is waited for.

pub mod controls; // the numbers of a step, on the device
pub mod outcome; // the result of a step
pub mod step; // the gradient step
pub mod capture; // parts of a step as CUDA graphs
pub mod staging; // host to device, under the step before
pub mod step_mode; // synchronous or pipelined
pub mod tracker; // steps in flight and refused steps
pub mod state; // snapshot and restore
pub mod learned_buffers; // from the training set, before the first step
pub mod dump; // a whole step on disk
pub mod session; // everything before the first step

use crate::checkpoint::{Retention, Saver};
use crate::config::Config;
use crate::data::order;
use crate::dist::{Channel, Phase, ReduceOp, SignalRequest, SignalRequests, World};
use crate::error::{Error, ExitCode, Result};
use crate::loader::{DataLoader, LoadedRows};
use crate::log::MetricsLine;
use crate::reconstruct;
use controls::StepRates;
use dump::StepDump;
use outcome::Outcome;
use session::{Resume, Session};
use std::sync::Arc;
use std::time::{Duration, Instant};
use step_mode::{LocalBatch, StepMode};
use tch::Tensor;
use tracker::{InFlight, StepTracker};

/// Options of the command line beside the config.
pub struct TrainOptions {
    pub run: String,
    pub resume: Resume,
    /// Number of first steps that are written whole, for comparison with other implementations.
    pub dump_steps: u64,
}

/// Trains to the end, or until asked to stop.
///
/// # Errors
/// [`ExitCode::Stopped`] after saving, if a signal asked for it.
pub fn train(config: &Config, options: &TrainOptions, world: &Arc<dyn World>, requests: &SignalRequests) -> Result<()> {
    let mut run = Session::open(config, &options.run, &options.resume, world)?;
    let mut channel = world.open_channel("requests")?;
    let steps = run.first_step..run.total_steps;
    let sample_order = run.sample_order.take().expect("an order of samples");
    let global_batch = config.train.global_batch;
    let loader = run.loader.clone();
    let mut loader =
        DataLoader::for_training(loader, sample_order, global_batch, world.rank(), world.size(), steps.clone())?;
    let retention = Retention { last: config.checkpoint.keep_last, every: config.checkpoint.keep_every };
    let saver = run.lease.take().map(|lease| Saver::new(run.store.clone(), retention, Arc::new(lease)));
    let mut saver = saver.transpose()?;
    let dump_until = run.first_step + options.dump_steps;
    let mut mode = StepMode::new(config.train.cuda_graph, global_batch, &run.stepper, world)?;
    let mut tracker = StepTracker::new(config.train.max_nonfinite_steps, world.rank() == 0);

    for step in steps {
        let start = Instant::now();
        run.report_progress(step, Phase::Data);
        let rows = loader.next().expect("rows for every step")?;
        run.report_progress(step, Phase::Compute);
        let rates = run.rates(config, step);
        let frames = rows.pixels.size()[2];
        tracker.push(InFlight { step, lr: rates.lr, start, data_wait: rows.wait_time, frames });
        let local = local_batch(config, rows, world.as_ref());
        let outcome = if step < dump_until {
            Some(dump_step(&mut run, step, &local, rates, config, world.rank())?)
        } else {
            mode.step(&mut run.stepper, &local, rates)?
        };
        record_outcome(outcome, &mut tracker, &mut run, config)?;

        let done = step + 1;
        run.report_progress(done, Phase::Reduce);
        let request = agree_on_requests(channel.as_mut(), requests, run.stepper.timeout)?;
        run.report_progress(done, Phase::Save);
        let due = Due::after(done, &run, config, request);
        if due.save || due.draw {
            record_outcome(mode.flush(&run.stepper)?, &mut tracker, &mut run, config)?;
        }
        if due.save {
            save(done, &mut run, &mut saver, config, world.as_ref())?;
        }
        if due.draw {
            draw(done, &mut run, config)?;
        }
        if request.stop && done < run.total_steps {
            finish(done, saver, &mut run, channel.as_mut())?;
            return Err(Error::new(ExitCode::Stopped, format!("saved after step {done} and stopped, as requested")));
        }
    }
    finish(run.total_steps, saver, &mut run, channel.as_mut())
}

/// Actions that are due after a step.
struct Due {
    save: bool,
    draw: bool,
}

impl Due {
    fn after(done: u64, run: &Session, config: &Config, request: SignalRequest) -> Due {
        let is_last = done == run.total_steps;
        let can_draw = run.stepper.method.capabilities().reconstruct.is_some();
        let interval = if can_draw { config.log.image_interval_steps } else { 0 };
        Due {
            save: done.is_multiple_of(config.checkpoint.every_steps) || is_last || request.stop || request.save,
            draw: interval > 0 && (done.is_multiple_of(interval) || is_last),
        }
    }
}

/// Hands a snapshot to the saver; collective.
fn save(done: u64, run: &mut Session, saver: &mut Option<Saver>, config: &Config, world: &dyn World) -> Result<()> {
    let snapshot = state::take_snapshot(&run.stepper, done, config, world)?;
    let (Some(saver), Some(snapshot)) = (saver, snapshot) else { return Ok(()) };
    if let Some(log) = &mut run.log {
        log.sync()?;
    }
    saver.save(snapshot)?;
    if let Some(uploader) = &mut run.uploader {
        uploader.upload()?;
    }
    Ok(())
}

/// Draws reconstructions, on rank 0.
fn draw(done: u64, run: &mut Session, config: &Config) -> Result<()> {
    let Some(log) = &mut run.log else { return Ok(()) };
    run.progress.report(done, Phase::Evaluate);
    let weights = run.stepper.buckets.weights(&run.stepper.flat, run.stepper.timeout)?;
    let subject = reconstruct::Subject {
        method: run.stepper.method.as_ref(),
        weights: &weights,
        buffers: &run.stepper.buffers,
        log_mel: run.stepper.log_mel.as_ref(),
    };
    log.save_image(done, "reconstruction", &reconstruct::sheet(&subject, &run.loader, config)?)
}

/// Waits until the last checkpoint and the log are on disk, on every rank, and leaves the other ranks.
fn finish(done: u64, saver: Option<Saver>, run: &mut Session, channel: &mut dyn Channel) -> Result<()> {
    run.report_progress(done, Phase::Save);
    if let Some(log) = &mut run.log {
        log.sync()?;
    }
    if let Some(uploader) = run.uploader.take() {
        uploader.finish()?;
    }
    if let Some(saver) = saver {
        saver.finish()?;
    }
    // Saving a large model to slow storage takes its time; the heartbeat ends it where it hangs.
    channel.barrier().wait(Duration::from_secs(24 * 3600)).map(drop)?;
    run.close();
    Ok(())
}

/// Returns what any rank was asked for, known to all of them after the same step.
fn agree_on_requests(channel: &mut dyn Channel, requests: &SignalRequests, timeout: Duration) -> Result<SignalRequest> {
    let local = requests.poll();
    let flags = Tensor::from_slice(&[i64::from(local.stop), i64::from(local.save)]);
    let flags = channel.all_reduce(&flags, ReduceOp::Max).wait(timeout)?;
    Ok(SignalRequest { stop: flags.int64_value(&[0]) > 0, save: flags.int64_value(&[1]) > 0 })
}

/// Turns this rank's rows into what a step takes.
fn local_batch(config: &Config, rows: LoadedRows, world: &dyn World) -> LocalBatch {
    let samples = order::rank_rows(config.train.global_batch, world.rank(), world.size()).count();
    LocalBatch {
        keys: rows.keys(),
        side: rows.side,
        views: vec![rows.pixels],
        seed: config.train.seed,
        micro_batch: config.train.micro_batch.map_or(samples, |size| size as usize),
    }
}

/// Takes a step that is written out between its backward pass and its update.
fn dump_step(
    run: &mut Session,
    step: u64,
    local: &LocalBatch,
    rates: StepRates,
    config: &Config,
    rank: usize,
) -> Result<Outcome> {
    let micro_batches = local.micro_batches(run.stepper.flat.master.device())?;
    let folder = &run.folder;
    run.stepper.step(&micro_batches, rates, |stepper, outcome| {
        let dump = StepDump {
            step,
            rank,
            method: config.method.name(),
            micro_batches: &micro_batches,
            outcome,
            lr: rates.lr,
            weight_decay: config.optim.weight_decay,
        };
        dump::write_step(folder, stepper, &dump)
    })
}

/// Checks an outcome, if one has come, and logs it.
fn record_outcome(
    outcome: Option<Outcome>,
    tracker: &mut StepTracker,
    run: &mut Session,
    config: &Config,
) -> Result<()> {
    let Some(outcome) = outcome else { return Ok(()) };
    let (step, took) = tracker.complete(&outcome)?;
    let line = metrics_line(config, run, &step, &outcome, took);
    match &mut run.log {
        Some(log) => log.record_step(&line),
        None => Ok(()),
    }
}

fn metrics_line(config: &Config, run: &Session, step: &InFlight, outcome: &Outcome, took: Duration) -> MetricsLine {
    let seconds = took.as_secs_f64();
    let global_batch = config.train.global_batch;
    let samples = (step.step + 1) * global_batch;
    let samples_per_s = global_batch as f64 / seconds;
    MetricsLine {
        step: step.step + 1,
        epoch: samples as f64 / run.num_samples as f64,
        samples,
        loss: outcome.loss,
        terms: outcome.terms.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        lr: step.lr,
        weight_decay: Some(config.optim.weight_decay),
        grad_norm: outcome.grad_norm,
        samples_per_s,
        data_wait: step.data_wait.as_secs_f64() / seconds,
        comm_wait: outcome.comm_wait.as_secs_f64() / seconds,
        // A step of images has a peak of its own; of others the log knows it.
        mfu: run.peak_images_per_s.filter(|_| step.frames == 1).map(|peak| samples_per_s / peak),
        seconds,
    }
}
