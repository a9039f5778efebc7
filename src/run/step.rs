//! The gradient step, on one page: forward and backward of each micro-batch, reduction over ranks while the last
//! backward goes on, one decision by all ranks, the update.
//!
//! [`Stepper::step`] is the whole of it, where the host looks at the numbers and decides. [`Stepper::begin`],
//! [`Stepper::accumulate`] and [`Stepper::conclude`] are the same in parts that wait for nothing: there the device
//! decides, what they queue can be captured as a graph, and the numbers are read whenever they are there.

use crate::bridge::record::scope;
use crate::device::{Channel, Reduce, World};
use crate::fault::{Fault, Result};
use crate::method::{Batch, Method};
use crate::optim::bucket::{Buckets, Wire};
use crate::optim::{flat::Flat, update::Updater};
use crate::part::view::log_mel::LogMel;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// What moves in a step, on this rank.
pub struct Stepper {
    pub method: Box<dyn Method>,
    pub flat: Flat,
    pub updater: Updater,
    pub buckets: Buckets,
    /// Where samples of sounds come, makes the spectrograms that the method reads.
    pub log_mel: Option<LogMel>,
    world: Arc<dyn World>,
    /// Small messages: counts, losses, flags.
    flags: Box<dyn Channel>,
    /// How long to wait for another rank.
    pub deadline: Duration,
    /// The terms' sums over this rank's samples so far, f64 [terms] on the device.
    sums: Tensor,
    /// 1 at this rank, else 0: f64 [ranks] on the device.
    here: Tensor,
}

/// What a step did, the same on every rank but for `local_loss` and `comm_wait`.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The sum of the terms' means over the global batch.
    pub loss: f64,
    pub terms: Vec<(&'static str, f64)>,
    /// This rank's samples alone; not a number if it had none.
    pub local_loss: f64,
    pub grad_norm: f64,
    pub clip_scale: f64,
    /// Ranks whose loss was not finite, or all of them where only the summed gradient is not; if there are any, nothing
    /// has moved.
    pub bad_ranks: Vec<usize>,
    /// How long the host waited for other ranks' gradients and weights; where the device decides it waits for nobody.
    pub comm_wait: Duration,
}

/// What each term is divided by.
#[derive(Clone, Debug, PartialEq)]
pub struct Counts {
    /// Over this rank's samples.
    pub own: Vec<f64>,
    /// Over the global batch.
    pub all: Vec<f64>,
}

/// What all ranks know of a step once they have told each other, on the device.
struct Report {
    /// f64: this rank's sums [terms], all ranks' [terms], 1 for each rank whose own are not finite [ranks], and the
    /// squared norm of the gradient [1].
    numbers: Tensor,
    /// On how many ranks each tensor received a gradient, f64 [n].
    used: Tensor,
}

impl Stepper {
    pub fn new(
        mut method: Box<dyn Method>,
        mut flat: Flat,
        updater: Updater,
        world: Arc<dyn World>,
        wire: impl Into<Wire>,
        deadline: Duration,
    ) -> Result<Stepper> {
        let buckets = Buckets::new(&flat, wire, world.channel("gradients")?)?;
        flat.leaves.arrive_by(buckets.arrival(deadline));
        let flags = world.channel("flags")?;
        method.join(&world, deadline)?;
        let device = world.device();
        let here: Vec<f64> = (0..world.size()).map(|rank| f64::from(u8::from(rank == world.rank()))).collect();
        let here = Tensor::from_slice(&here).to_device(device);
        let sums = Tensor::zeros([method.counts(0).len() as i64], (Kind::Double, device));
        Ok(Stepper { method, flat, updater, buckets, log_mel: None, world, flags, deadline, sums, here })
    }

    /// One step over this rank's share of a global batch, cut into micro-batches; a rank without samples brings none.
    /// `before_update` sees the reduced gradients before clipping.
    pub fn step(
        &mut self,
        micro: &[Batch],
        lr: f64,
        before_update: impl FnOnce(&Stepper, &Outcome) -> Result<()>,
    ) -> Result<Outcome> {
        let own = self.counts_of(micro);
        let counts = Counts { all: self.total(&own)?, own };
        self.begin()?;
        for (index, batch) in micro.iter().enumerate() {
            self.accumulate(batch, &counts, index + 1 == micro.len())?;
        }
        let (waiting, waited) = (Instant::now(), self.buckets.waited());
        let report = self.reduce()?;
        let comm_wait = waiting.elapsed() + waited;
        let outcome = Outcome { comm_wait, ..self.outcome(&numbers(&report.numbers)?, &counts) };
        before_update(self, &outcome)?;
        if outcome.bad_ranks.is_empty() {
            let used: Vec<bool> = numbers(&report.used)?.iter().map(|ranks| *ranks > 0.0).collect();
            let _update = scope("update");
            self.updater.update(&mut self.flat, &used, lr, outcome.clip_scale)?;
            self.buckets.spread();
        }
        Ok(outcome)
    }

    /// What this rank's share of each term is divided by.
    pub fn counts(&self, samples: i64) -> Vec<f64> {
        self.method.counts(samples).into_iter().map(|(_, count)| count).collect()
    }

    /// The same for these samples: it may depend on how much of each is padding.
    fn counts_of(&self, micro: &[Batch]) -> Vec<f64> {
        let mut all = self.counts(0);
        for batch in micro {
            let counts = match &batch.valid {
                Some(valid) => self.method.counts_of(valid),
                None => self.method.counts(batch.pixels.size()[0]),
            };
            all.iter_mut().zip(counts).for_each(|(sum, (_, count))| *sum += count);
        }
        all
    }

    /// Before a step's first micro-batch.
    pub fn begin(&mut self) -> Result<()> {
        self.flat.zero_gradient();
        let _ = self.sums.zero_();
        self.buckets.begin();
        Ok(())
    }

    /// Adds a micro-batch's gradients and losses. Behind the `last` one of the step, gradients are reduced as they come.
    pub fn accumulate(&mut self, batch: &Batch, counts: &Counts, last: bool) -> Result<()> {
        self.buckets.arm(last);
        let forward = scope("forward");
        let terms = self.method.loss(&self.flat.leaves, &batch.heard(self.log_mel.as_ref())?)?;
        let means = terms.iter().zip(&counts.all).map(|(term, count)| &term.sum / *count);
        let objective = means.reduce(|sum, mean| sum + mean).expect("a method has a term");
        drop(forward);
        let backward = scope("backward");
        objective.f_backward()?;
        drop(backward);
        let sums: Vec<Tensor> = terms.iter().map(|term| term.sum.detach()).collect();
        self.sums += Tensor::stack(&sums, 0).to_kind(Kind::Double);
        Ok(())
    }

    /// After the last micro-batch: reduces, lets the device decide and moves the weights that this rank keeps; a sharded
    /// optimizer's come to the others by [`Buckets::spread`], under the next step's forward. `rates` are [`Updater::rates`]
    /// f64 [3] on the device. Returns the numbers that [`Stepper::outcome`] reads, on the device.
    pub fn conclude(&mut self, rates: &Tensor) -> Result<Tensor> {
        let Report { numbers, used } = self.reduce()?;
        let _update = scope("update");
        let (terms, ranks) = (self.sums.size()[0], self.here.size()[0]);
        let bad = numbers.narrow(0, 2 * terms, ranks);
        let square = numbers.narrow(0, 2 * terms + ranks, 1);
        let good = bad.sum(Kind::Double).eq(0.0).logical_and(&square.isfinite());
        self.updater.queue(&self.flat, &used, rates, &square.sqrt(), &good)?;
        Ok(numbers)
    }

    /// Every rank's part in one: gradients, and in one message losses, whose were not finite, and which tensors were used.
    fn reduce(&mut self) -> Result<Report> {
        let _reduce = scope("reduce");
        // Weights that no forward had a use for.
        self.buckets.gathered(self.deadline)?;
        self.buckets.finish(self.deadline)?;
        let own = &self.sums;
        let bad = &self.here * own.isfinite().all().logical_not();
        let used = self.used();
        let message = Tensor::cat(&[own, &bad, &used], 0);
        let message = self.flags.all_reduce(&message, Reduce::Sum).wait(self.deadline)?;
        let told = own.size()[0] + bad.size()[0];
        let square = self.buckets.square_sum(&self.flat, self.deadline)?.to_kind(Kind::Double).view([1]);
        Ok(Report {
            numbers: Tensor::cat(&[own, &message.narrow(0, 0, told), &square], 0),
            used: message.narrow(0, told, used.size()[0]),
        })
    }

    /// 1 for each tensor that received a gradient on this rank, else 0: f64 [n], made on the device.
    fn used(&self) -> Tensor {
        let used = self.buckets.used();
        let all = Tensor::ones([used.len() as i64], (Kind::Double, self.sums.device()));
        for (tensor, _) in used.iter().enumerate().filter(|(_, used)| !**used) {
            let _ = all.narrow(0, tensor as i64, 1).zero_();
        }
        all
    }

    /// How many numbers [`Stepper::conclude`] gives.
    pub fn told(&self) -> i64 {
        2 * self.sums.size()[0] + self.here.size()[0] + 1
    }

    /// What the numbers of [`Stepper::conclude`] say.
    pub fn outcome(&self, numbers: &[f64], counts: &Counts) -> Outcome {
        let (sums, rest) = numbers.split_at(counts.own.len());
        let (totals, rest) = rest.split_at(counts.own.len());
        let (bad, square) = rest.split_at(self.world.size());
        let grad_norm = square[0].sqrt();
        let mut bad_ranks: Vec<usize> = (0..bad.len()).filter(|&rank| bad[rank] > 0.0).collect();
        if bad_ranks.is_empty() && !grad_norm.is_finite() {
            // Every rank holds the same sum, so every rank decides the same.
            bad_ranks = (0..self.world.size()).collect();
        }
        let names = self.method.counts(0).into_iter().map(|(name, _)| name);
        let terms: Vec<_> =
            names.zip(totals.iter().zip(&counts.all)).map(|(name, (sum, count))| (name, sum / count)).collect();
        Outcome {
            loss: terms.iter().map(|(_, mean)| mean).sum(),
            local_loss: sums.iter().zip(&counts.own).map(|(sum, count)| sum / count).sum(),
            terms,
            grad_norm,
            clip_scale: self.updater.clip_scale(grad_norm),
            bad_ranks,
            comm_wait: Duration::ZERO,
        }
    }

    /// Numbers summed over ranks, on the host.
    fn total(&mut self, own: &[f64]) -> Result<Vec<f64>> {
        let sum = self.flags.all_reduce(&Tensor::from_slice(own), Reduce::Sum).wait(self.deadline)?;
        numbers(&sum)
    }
}

/// The values of an f64 tensor [n], once they are there.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Vec::<f64>::try_from(&tensor.to_device(Device::Cpu)).map_err(Fault::from)
}
