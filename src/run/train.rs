//! The training loop: open the run, then rows → step → log, and now and then a checkpoint and pictures.

use super::checkpoint::{Keep, Saver};
use super::log::Line;
use super::open::{Opened, Resume, open};
use super::step::Outcome;
use super::{dump, reconstruct, state};
use crate::config::Config;
use crate::data::order;
use crate::device::{Phase, Reduce, Request, Requests, World};
use crate::fault::{Code, Fault, Result};
use crate::feed::{Feed, Rows};
use crate::method::Batch;
use crate::op::shuffle::Origin;
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
    let mut refused = 0;

    for step in run.first..run.steps {
        let began = Instant::now();
        run.beat(step, Phase::Data);
        let rows = feed.next().expect("rows for every step")?;
        run.beat(step, Phase::Compute);
        let waited = rows.waited;
        let micro = micro_batches(config, &rows, world)?;
        let lr = run.schedule.at(step * config.train.global_batch);
        let outcome = run.stepper.step(&micro, lr, |stepper, outcome| match step < dump_until {
            true => {
                dump::write(&run.folder, step, world.rank(), stepper, &micro, outcome, lr, config.optim.weight_decay)
            }
            false => Ok(()),
        })?;
        refused = judge(&outcome, refused, step, config, world.as_ref())?;
        if let Some(log) = &mut run.log {
            log.step(&line(config, step, run.samples, &outcome, lr, began.elapsed(), waited))?;
        }

        let done = step + 1;
        run.beat(done, Phase::Reduce);
        let request = agree(asked.as_mut(), requests, run.deadline)?;
        let last = done == run.steps;
        let due = done % config.checkpoint.every_steps == 0;
        run.beat(done, Phase::Save);
        if due || last || request.stop || request.save {
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
        let pictures = config.log.pictures_every_steps;
        if let (Some(log), true) = (&mut run.log, pictures > 0 && (done % pictures == 0 || last)) {
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

/// This rank's rows as batches on its device, cut to the micro-batch.
fn micro_batches(config: &Config, rows: &Rows, world: &Arc<dyn World>) -> Result<Vec<Batch>> {
    let own = order::rows(config.train.global_batch, world.rank(), world.size());
    let most = config.train.micro_batch.unwrap_or(own.end - own.start).max(1) as usize;
    let mut batches = Vec::new();
    for first in (0..rows.ids.len()).step_by(most) {
        let end = (first + most).min(rows.ids.len());
        let origin = |i: usize| Origin { id: rows.ids[i], epoch: rows.epochs[i], repeat: 0 };
        batches.push(Batch {
            pixels: rows.to_device(first..end, world.device())?,
            origins: (first..end).map(origin).collect(),
            seed: config.train.seed,
        });
    }
    Ok(batches)
}

/// How many steps in a row have been refused; too many end the training.
fn judge(outcome: &Outcome, before: u64, step: u64, config: &Config, world: &dyn World) -> Result<u64> {
    if outcome.bad_ranks.is_empty() {
        return Ok(0);
    }
    let refused = before + 1;
    if world.rank() == 0 {
        tracing::warn!(
            "step {step} was refused: loss or gradient not finite on rank {:?} (loss {}, gradient norm {}); the weights \
             stay as they were",
            outcome.bad_ranks,
            outcome.loss,
            outcome.grad_norm
        );
    }
    if refused < config.train.bad_steps.max(1) {
        return Ok(refused);
    }
    Err(Fault::failed(format!(
        "{refused} steps in a row were refused, the last one step {step}: loss or gradient not finite on rank {:?}. The \
         weights are those of the last good step. Lower the learning rate, set optim.clip, or train in fp32.",
        outcome.bad_ranks
    )))
}

fn line(
    config: &Config,
    step: u64,
    samples: u64,
    outcome: &Outcome,
    lr: f64,
    took: Duration,
    waited: Duration,
) -> Line {
    let seconds = took.as_secs_f64();
    let seen = (step + 1) * config.train.global_batch;
    Line {
        step: step + 1,
        epoch: seen as f64 / samples as f64,
        samples: seen,
        loss: outcome.loss,
        terms: outcome.terms.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        lr,
        weight_decay: Some(config.optim.weight_decay),
        grad_norm: outcome.grad_norm,
        samples_per_s: config.train.global_batch as f64 / seconds,
        data_wait: waited.as_secs_f64() / seconds,
        comm_wait: outcome.comm_wait.as_secs_f64() / seconds,
        mfu: None,
        seconds,
    }
}
