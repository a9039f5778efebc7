//! The gradient step on one page: forward and backward of each micro-batch, reduction over ranks while the last
//! backward runs, one decision by all ranks, the update of weights, teacher and buffers.
//!
//! [`Stepper::step`] is all of it, where the host reads the numbers and decides. [`Stepper::begin`],
//! [`Stepper::accumulate`] and [`Stepper::finish`] are the same in parts that wait for nothing: there the device
//! decides, what they queue can be captured as a graph, and the numbers are read when they have arrived.

use super::controls::{Controls, StepRates};
use super::outcome::{MAX_TERMS, Outcome, report_len, to_f64_vec};
use crate::bridge::record::scope;
use crate::dist::{Channel, ReduceOp, World};
use crate::error::{Error, Result};
use crate::method::{Batch, LossDenominators, LossOutput, Method, Step};
use crate::optim::bucket::{Buckets, GradReduce};
use crate::optim::teacher::TeacherAverage;
use crate::optim::{flat::FlatParams, update::Updater};
use crate::part::buffers::Buffers;
use crate::part::gather::AllGather;
use crate::part::loss::BufferUpdate;
use crate::part::teacher::Every;
use crate::view::log_mel::LogMel;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// Everything on this rank that moves in a step.
pub struct Stepper {
    pub method: Box<dyn Method>,
    pub flat: FlatParams,
    pub updater: Updater,
    pub buckets: Buckets,
    pub teacher: Option<TeacherAverage>,
    pub buffers: Buffers,
    /// The step's numbers on the device.
    pub controls: Controls,
    /// Makes spectrograms of waveforms, where the views are waveforms.
    pub log_mel: Option<LogMel>,
    /// How long to wait for another rank.
    pub timeout: Duration,
    world: Arc<dyn World>,
    /// Small messages: counts, losses, flags, buffer updates.
    flags: Box<dyn Channel>,
    ranks: AllGather,
    /// Names of the loss terms, known after the first loss.
    terms: Vec<&'static str>,
    /// Sums of the terms over this rank's samples so far, and their counts: f64 [2 · MAX_TERMS] on the device.
    sums: Tensor,
    /// Updates of the buffers by this rank's samples.
    buffer_updates: Vec<BufferUpdate>,
    /// 1 at this rank, else 0: f64 `[W]` on the device.
    rank_one_hot: Tensor,
}

/// Values of a step that are equal on all ranks after the exchange, on the device.
struct ReducedStep {
    /// The vector that [`Outcome::decode`] reads.
    report: Tensor,
    /// Number of ranks on which each parameter received a gradient, f64 `[n]`.
    used: Tensor,
}

impl Stepper {
    /// Opens the channels; collective.
    pub fn new(
        method: Box<dyn Method>,
        mut flat: FlatParams,
        updater: Updater,
        world: Arc<dyn World>,
        reduce: impl Into<GradReduce>,
        timeout: Duration,
    ) -> Result<Stepper> {
        let buckets = Buckets::new(&flat, reduce, world.open_channel("gradients")?)?;
        flat.leaves.on_use(buckets.wait_hook(timeout));
        let flags = world.open_channel("flags")?;
        let gathers = method.capabilities().gathers;
        let ranks = if gathers { AllGather::open(&world, timeout)? } else { AllGather::default() };
        let device = world.device();
        let one_hot: Vec<f64> = (0..world.size()).map(|rank| f64::from(u8::from(rank == world.rank()))).collect();
        let scheduled = method.scheduled(&StepRates::default().progress).len();
        Ok(Stepper {
            teacher: method.teacher().map(|options| TeacherAverage::new(options, &flat)),
            buffers: Buffers::new(&method.buffers(), flat.seed, device),
            controls: Controls::new(scheduled, device),
            sums: Tensor::zeros([2 * MAX_TERMS as i64], (Kind::Double, device)),
            rank_one_hot: Tensor::from_slice(&one_hot).to_device(device),
            log_mel: None,
            terms: Vec::new(),
            buffer_updates: Vec::new(),
            method,
            flat,
            updater,
            buckets,
            timeout,
            world,
            flags,
            ranks,
        })
    }

    /// Takes one step over this rank's part of a global batch, cut into micro-batches; a rank without samples passes
    /// none. `before_update` sees the reduced gradients before clipping.
    pub fn step(
        &mut self,
        micro_batches: &[Batch],
        rates: impl Into<StepRates>,
        before_update: impl FnOnce(&Stepper, &Outcome) -> Result<()>,
    ) -> Result<Outcome> {
        let rates = rates.into();
        self.set_controls(micro_batches, &rates)?;
        self.begin();
        for (index, batch) in micro_batches.iter().enumerate() {
            self.accumulate(batch, index + 1 == micro_batches.len())?;
        }
        let reduce_start = Instant::now();
        let gather_wait = self.buckets.gather_wait();
        let reduced = self.reduce()?;
        let comm_wait = reduce_start.elapsed() + gather_wait;
        let outcome = Outcome { comm_wait, ..self.decode_report(&to_f64_vec(&reduced.report)?) };
        before_update(self, &outcome)?;
        let accepted = outcome.bad_ranks.is_empty();
        if accepted {
            let _scope = scope("update");
            let used: Vec<bool> = to_f64_vec(&reduced.used)?.iter().map(|ranks| *ranks > 0.0).collect();
            self.updater.update(&mut self.flat, &used, rates.lr, outcome.clip_scale)?;
            let momentum = self.teacher_momentum(&rates);
            if let Some(teacher) = &mut self.teacher {
                teacher.follow(&self.flat, momentum);
                teacher.sync_weights(&self.flat, &self.buckets, self.timeout)?;
            }
            self.buckets.start_weight_gather();
        }
        self.update_buffers(&Tensor::from_slice(&[accepted]).to_device(self.sums.device()))?;
        Ok(outcome)
    }

    /// Sets the step's numbers, with counts summed over ranks; collective.
    pub fn set_controls(&mut self, micro_batches: &[Batch], rates: &StepRates) -> Result<()> {
        let mut local = LossDenominators::default();
        for batch in micro_batches {
            local = local + self.method.denominators(batch)?;
        }
        let sum = self.flags.all_reduce(&Tensor::from_slice(&local.to_array()), ReduceOp::Sum).wait(self.timeout)?;
        let sum = to_f64_vec(&sum)?;
        let global = LossDenominators::from_array(std::array::from_fn(|index| sum[index]));
        let values = self.host_controls(rates, local, global);
        self.controls.set(&values)
    }

    /// Lays out the step's numbers on the host.
    pub fn host_controls(&self, rates: &StepRates, local: LossDenominators, global: LossDenominators) -> Tensor {
        let scheduled = self.method.scheduled(&rates.progress);
        Controls::layout(self.updater.hyperparams(rates.lr), self.teacher_momentum(rates), local, global, &scheduled)
    }

    /// Returns how much of the teacher stays in this step: 1 if it does not move.
    fn teacher_momentum(&self, rates: &StepRates) -> f64 {
        let Some(teacher) = &self.teacher else { return 1.0 };
        let is_due = teacher.options.every == Every::Step || rates.progress.ends_epoch();
        if is_due { self.method.scheduled(&rates.progress)[teacher.options.momentum] } else { 1.0 }
    }

    /// Returns what the loss reads beside the batch.
    pub fn context(&self) -> Step<'_> {
        Step {
            weights: &self.flat.leaves,
            teacher: self.teacher.as_ref().map(|teacher| &teacher.weights),
            buffers: self.buffers.clone(),
            scheduled: self.controls.scheduled(),
            ranks: self.ranks.clone(),
        }
    }

    /// Sums the counts over ranks on the device, where only the samples tell them.
    pub fn reduce_counts(&mut self) -> Result<()> {
        let (local, global) = self.controls.counts();
        // Reduces in place, and the local counts are still wanted.
        let sum = self.flags.all_reduce(&local.copy(), ReduceOp::Sum).wait(self.timeout)?;
        crate::bridge::copy_non_blocking(&global, &sum)
    }

    /// Prepares for a step's first micro-batch.
    pub fn begin(&mut self) {
        self.flat.zero_grad();
        let _ = self.sums.zero_();
        self.buffer_updates.clear();
        self.buckets.begin_step();
    }

    /// Adds a micro-batch's gradients and losses. During the backward pass of the last one of the step, gradients are
    /// reduced as they become ready.
    pub fn accumulate(&mut self, batch: &Batch, is_last: bool) -> Result<()> {
        self.buckets.set_last_micro_batch(is_last);
        let objective = {
            let _scope = scope("forward");
            self.forward(batch)?
        };
        let _scope = scope("backward");
        Ok(objective.f_backward()?)
    }

    /// Runs the loss of a micro-batch and returns the objective: the sum of the terms' means over the global batch.
    pub fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        let batch = batch.with_spectrograms(self.log_mel.as_ref())?;
        let LossOutput { terms, buffers } = self.method.loss(&self.context(), &batch)?;
        if terms.is_empty() || terms.len() > MAX_TERMS {
            return Err(Error::failed(format!("a loss has {} terms; 1 to {MAX_TERMS} are possible", terms.len())));
        }
        self.terms = terms.iter().map(|term| term.name).collect();
        let objective = terms.iter().map(|term| self.controls.mean(term)).reduce(|sum, mean| sum + mean);
        let sums: Vec<Tensor> = terms.iter().map(|term| term.sum.detach()).collect();
        let mut local_sums = self.sums.narrow(0, 0, terms.len() as i64);
        local_sums += Tensor::stack(&sums, 0).to_kind(Kind::Double);
        let counts: Vec<Tensor> = terms.iter().map(|term| self.controls.local_count(term.per)).collect();
        self.sums.narrow(0, MAX_TERMS as i64, terms.len() as i64).copy_(&Tensor::cat(&counts, 0));
        self.add_buffer_updates(buffers)?;
        Ok(objective.expect("a term"))
    }

    /// After the last micro-batch: reduces, lets the device decide, and moves the weights that this rank updates; where
    /// the optimizer is sharded, [`Buckets::start_weight_gather`] brings them to the others under the next step's
    /// forward. Returns what [`Stepper::decode_report`] reads, on the device.
    pub fn finish(&mut self) -> Result<Tensor> {
        let ReducedStep { report, used } = self.reduce()?;
        let _scope = scope("update");
        let ranks = self.rank_one_hot.size()[0];
        let bad = report.narrow(0, 4 * MAX_TERMS as i64, ranks);
        let square = report.narrow(0, 4 * MAX_TERMS as i64 + ranks, 1);
        let accept = bad.sum(Kind::Double).eq(0.0).logical_and(&square.isfinite());
        self.updater.enqueue_update(&self.flat, &used, &self.controls.hyperparams(), &square.sqrt(), &accept)?;
        if let Some(teacher) = &mut self.teacher {
            let weight = self.controls.teacher_weight() * accept.to_kind(Kind::Double);
            teacher.follow_on_device(&self.flat, &weight.to_kind(Kind::Float))?;
            teacher.sync_weights(&self.flat, &self.buckets, self.timeout)?;
        }
        self.update_buffers(&accept)?;
        Ok(report)
    }

    /// Exchanges everything in one message: losses, ranks that are not finite, and which parameters were used;
    /// gradients have their own channel.
    fn reduce(&mut self) -> Result<ReducedStep> {
        let _scope = scope("reduce");
        // Weights that no forward pass has used.
        self.buckets.finish_weight_gather(self.timeout)?;
        self.buckets.finish(self.timeout)?;
        let local = &self.sums;
        let bad = &self.rank_one_hot * local.isfinite().all().logical_not();
        let used = self.used_params();
        let message = Tensor::cat(&[local, &bad, &used], 0);
        let message = self.flags.all_reduce(&message, ReduceOp::Sum).wait(self.timeout)?;
        let shared = local.size()[0] + bad.size()[0];
        let square = self.buckets.square_sum(&self.flat, self.timeout)?.to_kind(Kind::Double).view([1]);
        Ok(ReducedStep {
            report: Tensor::cat(&[local, &message.narrow(0, 0, shared), &square], 0),
            used: message.narrow(0, shared, used.size()[0]),
        })
    }

    /// 1 for each parameter that received a gradient on this rank, else 0: f64 `[n]`, made on the device.
    fn used_params(&self) -> Tensor {
        let used = self.buckets.used_params();
        let all = Tensor::ones([used.len() as i64], (Kind::Double, self.sums.device()));
        for (index, _) in used.iter().enumerate().filter(|(_, used)| !**used) {
            let _ = all.narrow(0, index as i64, 1).zero_();
        }
        all
    }

    /// Length of the vector that [`Stepper::finish`] returns.
    pub fn report_len(&self) -> i64 {
        report_len(self.world.size())
    }

    /// Reads the vector that [`Stepper::finish`] returns.
    pub fn decode_report(&self, report: &[f64]) -> Outcome {
        Outcome::decode(report, &self.terms, |norm| self.updater.clip_scale(norm))
    }

    /// Adds what a micro-batch moves to what the ones before did.
    fn add_buffer_updates(&mut self, updates: Vec<BufferUpdate>) -> Result<()> {
        if self.buffer_updates.is_empty() {
            self.buffer_updates = updates;
            return Ok(());
        }
        for (all, new) in self.buffer_updates.iter_mut().zip(updates) {
            let (BufferUpdate::Mean { sum, .. }, BufferUpdate::Mean { sum: more, .. }) = (all, new) else {
                return Err(Error::failed("micro-batches fill a queue; the method must require whole_batch"));
            };
            *sum += more;
        }
        Ok(())
    }

    /// Moves the buffers by what all ranks add, where `accept` (bool, on the device) is true; collective.
    fn update_buffers(&mut self, accept: &Tensor) -> Result<()> {
        for update in std::mem::take(&mut self.buffer_updates) {
            match update {
                BufferUpdate::Mean { buffer, sum, per, momentum } => {
                    let sum = self.flags.all_reduce(&sum.to_kind(Kind::Double), ReduceOp::Sum).wait(self.timeout)?;
                    self.buffers.move_to_mean(buffer, &(sum / self.controls.global_count(per)), momentum, accept);
                }
                BufferUpdate::Queue { buffer, rows } => {
                    let mut shape = rows.size();
                    shape[0] = -1;
                    let rows = rows.to_kind(Kind::Float).contiguous();
                    let all = self.flags.all_gather(&rows).wait(self.timeout)?; // [W, n, ..]
                    self.buffers.enqueue(buffer, &all.view(shape.as_slice()), accept)?;
                }
            }
        }
        Ok(())
    }
}
