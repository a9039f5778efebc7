//! The training loop: open the run, then rows → step → log, and now and then a checkpoint and pictures.
//!
//! A step's outcome may come while the next one is under way. It is judged and logged then, after the same step on every
//! rank; before anything is saved or shown, the last one is waited for.

use super::checkpoint::{Keep, Saver};
use super::ledger::{Ledger, Taken};
use super::log::Line;
use super::open::{Opened, Resume, open};
use super::pace::{Pace, Share};
use super::step::Outcome;
use super::{dump, reconstruct, state};
use crate::config::Config;
use crate::data::order;
use crate::device::{Phase, Reduce, Request, Requests, World};
use crate::fault::{Code, Fault, Result};
use crate::feed::{Feed, Rows};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Tensor;

/// What the command line says beyond the config.
pub struct Order {
    pub run: String,
    pub resume: Resume,
    /// Write the first so many steps whole, for comparison with other implementations.
    pub dump_steps: u64,
}

/// Trains to the end, or until asked to stop (a fault with [`Code::Stopped`] after saving).
pub fn train(config: &Config, order: &Order, world: &Arc<dyn World>, requests: &Requests) -> Result<()> {
    let mut run = open(config, &order.run, &order.resume, world)?;
    let mut asked = world.channel("requests")?;
    let mut feed = Feed::train(
        run.source.clone(),
        run.order.take().expect("an order of samples"),
        config.train.global_batch,
        world.rank(),
        world.size(),
        run.first..run.steps,
    )?;
    let keep = Keep { last: config.checkpoint.keep_last, every: config.checkpoint.keep_every };
    let mut saver = run.lease.take().map(|lease| Saver::new(run.store.clone(), keep, Arc::new(lease))).transpose()?;
    let dump_until = run.first + order.dump_steps;
    let mut pace = Pace::new(config.train.graph, config.train.global_batch, &run.stepper, world)?;
    let mut ledger = Ledger::new(config.train.bad_steps, world.rank() == 0);

    for step in run.first..run.steps {
        let began = Instant::now();
        run.beat(step, Phase::Data);
        let rows = feed.next().expect("rows for every step")?;
        run.beat(step, Phase::Compute);
        let lr = run.schedule.at(step * config.train.global_batch);
        let frames = rows.pixels.size()[2];
        ledger.taken(Taken { step, lr, began, waited: rows.waited, frames });
        let share = share(config, rows, world.as_ref());
        let outcome = match step < dump_until {
            true => Some(dumped(&mut run, step, &share, lr, config, world.rank())?),
            false => pace.step(&mut run.stepper, &share, lr)?,
        };
        told(outcome, &mut ledger, &mut run, config)?;

        let done = step + 1;
        run.beat(done, Phase::Reduce);
        let request = agree(asked.as_mut(), requests, run.deadline)?;
        let last = done == run.steps;
        let due = done % config.checkpoint.every_steps == 0;
        run.beat(done, Phase::Save);
        let pictures = if config.method.needs().pictures { config.log.pictures_every_steps } else { 0 };
        let shown = pictures > 0 && (done % pictures == 0 || last);
        let saved = due || last || request.stop || request.save;
        if saved || shown {
            told(pace.settle(&run.stepper)?, &mut ledger, &mut run, config)?;
        }
        if saved {
            let snapshot = state::snapshot(&run.stepper, done, config, world.as_ref())?;
            if let (Some(saver), Some(snapshot)) = (&mut saver, snapshot) {
                if let Some(log) = &mut run.log {
                    log.sync()?;
                }
                saver.save(snapshot)?;
                if let Some(spool) = &mut run.spool {
                    spool.send()?;
                }
            }
        }
        if let (Some(log), true) = (&mut run.log, shown) {
            run.beat.at(done, Phase::Evaluate);
            log.picture(done, "reconstruction", &reconstruct::sheet(&run.stepper, &run.source, config)?)?;
        }
        if request.stop && !last {
            run.beat(done, Phase::Save);
            finish(saver, &mut run, asked.as_mut())?;
            run.close();
            return Err(Fault::new(Code::Stopped, format!("saved after step {done} and stopped, as requested")));
        }
    }
    run.beat(run.steps, Phase::Save);
    finish(saver, &mut run, asked.as_mut())?;
    run.close();
    Ok(())
}

/// Waits until the last checkpoint is whole, and the log with it, on every rank.
fn finish(saver: Option<Saver>, run: &mut Opened, channel: &mut dyn crate::device::Channel) -> Result<()> {
    if let Some(log) = &mut run.log {
        log.sync()?;
    }
    if let Some(spool) = run.spool.take() {
        spool.finish()?;
    }
    if let Some(saver) = saver {
        saver.finish()?;
    }
    // Saving a large model to slow storage takes its time; the heartbeat ends it where it hangs.
    channel.barrier().wait(Duration::from_secs(24 * 3600)).map(drop)
}

/// What any rank has been asked, known to all of them after the same step.
fn agree(channel: &mut dyn crate::device::Channel, requests: &Requests, deadline: Duration) -> Result<Request> {
    let own = requests.poll();
    let flags = Tensor::from_slice(&[i64::from(own.stop), i64::from(own.save)]);
    let flags = channel.all_reduce(&flags, Reduce::Max).wait(deadline)?;
    Ok(Request { stop: flags.int64_value(&[0]) > 0, save: flags.int64_value(&[1]) > 0 })
}

/// This rank's rows as a step takes them.
fn share(config: &Config, rows: Rows, world: &dyn World) -> Share {
    let own = order::rows(config.train.global_batch, world.rank(), world.size()).count();
    Share {
        origins: rows.origins(),
        pixels: rows.pixels,
        text: rows.text,
        valid: Some(rows.valid),
        seed: config.train.seed,
        micro: config.train.micro_batch.map_or(own, |most| most as usize),
    }
}

/// A step that is written out between its backward and its update.
fn dumped(run: &mut Opened, step: u64, share: &Share, lr: f64, config: &Config, rank: usize) -> Result<Outcome> {
    let micro = share.batches(run.stepper.flat.master.device())?;
    run.stepper.step(&micro, lr, |stepper, outcome| {
        dump::write(&run.folder, step, rank, stepper, &micro, outcome, lr, config.optim.weight_decay)
    })
}

/// Judges an outcome, if one has come, and writes it down.
fn told(outcome: Option<Outcome>, ledger: &mut Ledger, run: &mut Opened, config: &Config) -> Result<()> {
    let Some(outcome) = outcome else { return Ok(()) };
    let (taken, took) = ledger.told(&outcome)?;
    match &mut run.log {
        Some(log) => log.step(&line(config, &taken, (run.samples, run.still), &outcome, took)),
        None => Ok(()),
    }
}

/// `still` is the most still pictures a second that the devices could take, where there are some beside clips.
fn line(
    config: &Config,
    taken: &Taken,
    (samples, still): (u64, Option<f64>),
    outcome: &Outcome,
    took: Duration,
) -> Line {
    let seconds = took.as_secs_f64();
    let seen = (taken.step + 1) * config.train.global_batch;
    Line {
        step: taken.step + 1,
        epoch: seen as f64 / samples as f64,
        samples: seen,
        loss: outcome.loss,
        terms: outcome.terms.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        lr: taken.lr,
        weight_decay: Some(config.optim.weight_decay),
        grad_norm: outcome.grad_norm,
        samples_per_s: config.train.global_batch as f64 / seconds,
        data_wait: taken.waited.as_secs_f64() / seconds,
        comm_wait: outcome.comm_wait.as_secs_f64() / seconds,
        mfu: still.filter(|_| taken.frames == 1).map(|most| config.train.global_batch as f64 / seconds / most),
        seconds,
    }
}
