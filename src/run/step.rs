//! The gradient step, on one page: forward and backward of each micro-batch, reduction over ranks while the last
//! backward goes on, one decision by all ranks, the update.

use crate::device::{Channel, Reduce, World};
use crate::fault::{Fault, Result};
use crate::method::{Batch, Method};
use crate::optim::bucket::{Buckets, Wire};
use crate::optim::{flat::Flat, update::Updater};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// What moves in a step, on this rank.
pub struct Stepper {
    pub method: Box<dyn Method>,
    pub flat: Flat,
    pub updater: Updater,
    pub buckets: Buckets,
    world: Arc<dyn World>,
    /// Small messages: counts, losses, flags.
    flags: Box<dyn Channel>,
    /// How long to wait for another rank.
    pub deadline: Duration,
}

/// What a step did, the same on every rank but for `local_loss`, `seconds` and `comm_wait`.
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
    pub comm_wait: Duration,
}

impl Stepper {
    pub fn new(
        method: Box<dyn Method>,
        flat: Flat,
        updater: Updater,
        world: Arc<dyn World>,
        wire: impl Into<Wire>,
        deadline: Duration,
    ) -> Result<Stepper> {
        let buckets = Buckets::new(&flat, wire, world.channel("gradients")?)?;
        let flags = world.channel("flags")?;
        Ok(Stepper { method, flat, updater, buckets, world, flags, deadline })
    }

    /// One step over this rank's share of a global batch, cut into micro-batches; a rank without samples brings none.
    /// `before_update` sees the reduced gradients before clipping.
    pub fn step(
        &mut self,
        micro: &[Batch],
        lr: f64,
        before_update: impl FnOnce(&Stepper, &Outcome) -> Result<()>,
    ) -> Result<Outcome> {
        let samples: i64 = micro.iter().map(|batch| batch.pixels.size()[0]).sum();
        let counts = self.total(self.method.counts(samples).iter().map(|(_, count)| *count).collect())?;

        self.buckets.gathered(self.deadline)?;
        self.flat.zero_gradient();
        self.buckets.begin();
        let mut sums = vec![0.0; counts.len()];
        for (index, batch) in micro.iter().enumerate() {
            self.buckets.arm(index + 1 == micro.len());
            let terms = self.method.loss(&self.flat.leaves, batch)?;
            let mut objective = Tensor::zeros([], (Kind::Float, batch.pixels.device()));
            for (term, count) in terms.iter().zip(&counts) {
                objective += &term.sum / *count;
            }
            objective.backward();
            terms.iter().zip(&mut sums).for_each(|(term, sum)| *sum += term.sum.double_value(&[]));
        }
        let waiting = Instant::now();
        self.buckets.finish(self.deadline)?;
        let comm_wait = waiting.elapsed();

        let outcome = self.judge(samples, &sums, &counts, comm_wait)?;
        before_update(self, &outcome)?;
        if outcome.bad_ranks.is_empty() {
            let used = self.used()?;
            self.updater.update(&mut self.flat, &used, lr, outcome.clip_scale)?;
            self.buckets.spread();
        }
        Ok(outcome)
    }

    /// Global losses and norm, and whether every rank found its own finite.
    fn judge(&mut self, samples: i64, sums: &[f64], counts: &[f64], comm_wait: Duration) -> Result<Outcome> {
        let grad_norm = f64::from(self.buckets.square_sum(&self.flat, self.deadline)?.double_value(&[]) as f32).sqrt();
        let rank = self.world.rank();
        let mut report = sums.to_vec();
        report.extend((0..self.world.size()).map(|r| f64::from(r == rank && !sums.iter().all(|sum| sum.is_finite()))));
        let report = self.total(report)?;
        let (totals, bad) = report.split_at(sums.len());
        let mut bad_ranks: Vec<usize> = (0..bad.len()).filter(|&r| bad[r] > 0.0).collect();
        if bad_ranks.is_empty() && !grad_norm.is_finite() {
            // Every rank holds the same sum, so every rank decides the same.
            bad_ranks = (0..self.world.size()).collect();
        }
        let own = self.method.counts(samples);
        let terms: Vec<_> =
            own.iter().zip(totals.iter().zip(counts)).map(|((name, _), (sum, n))| (*name, sum / n)).collect();
        Ok(Outcome {
            loss: terms.iter().map(|(_, mean)| mean).sum(),
            local_loss: own.iter().zip(sums).map(|((_, count), sum)| sum / count).sum(),
            terms,
            grad_norm,
            clip_scale: self.updater.clip_scale(grad_norm),
            bad_ranks,
            comm_wait,
        })
    }

    /// Which tensors received a gradient on any rank.
    fn used(&mut self) -> Result<Vec<bool>> {
        let used: Vec<f32> = self.buckets.used().into_iter().map(|used| f32::from(u8::from(used))).collect();
        let used = self.flags.all_reduce(&Tensor::from_slice(&used), Reduce::Max).wait(self.deadline)?;
        Vec::<f32>::try_from(&used).map(|all| all.into_iter().map(|used| used > 0.0).collect()).map_err(Fault::from)
    }

    /// Numbers summed over ranks.
    fn total(&mut self, numbers: Vec<f64>) -> Result<Vec<f64>> {
        let sum = self.flags.all_reduce(&Tensor::from_slice(&numbers), Reduce::Sum).wait(self.deadline)?;
        Vec::<f64>::try_from(&sum).map_err(Fault::from)
    }
}
