//! Buckets reduce gradients over ranks while backward runs. A bucket is a range of the flat gradient; its reduction
//! starts when the gradient of its last tensor exists and all earlier buckets have started, so that every rank starts
//! them in the same order. Buckets that have not started by the end of backward are started then.
//!
//! With a sharded optimizer, the gradient is reduce-scattered. The updated weights are all-gathered while the
//! next forward runs, which waits for a bucket when it uses the first of its tensors.

use super::flat::FlatParams;
use super::layout::{ALIGN, BucketLayout, compute_layout};
use crate::bridge::GradHooks;
use crate::dist::{Channel, Pending, ReduceOp};
use crate::error::{Error, Result};
use crate::op::square_sum::square_sum;
use crate::part::params::Weights;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor, no_grad};

/// Options of the gradient reduction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradReduce {
    /// Minimum size of a bucket, counted in fp32. Not used with a sharded [`FlatParams`], which has its buckets
    /// already.
    pub bucket_bytes: usize,
    /// fp32 or bf16. In bf16 each rank's gradient is rounded before the sum, and the sum once more.
    pub kind: Kind,
}

impl From<usize> for GradReduce {
    /// Reduces buckets of at least `bucket_bytes` bytes in fp32.
    fn from(bucket_bytes: usize) -> GradReduce {
        GradReduce { bucket_bytes, kind: Kind::Float }
    }
}

/// An event of the last step, for tests and profiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BucketEvent {
    /// The gradient of the tensor with this index exists.
    GradReady(usize),
    /// The reduction of the bucket with this index started.
    ReduceStarted(usize),
}

/// The buckets of a [`FlatParams`], with a gradient hook on each of its leaves.
pub struct Buckets {
    state: Arc<Mutex<BucketState>>,
    _hooks: GradHooks,
}

struct BucketState {
    channel: Box<dyn Channel>,
    buckets: Vec<BucketViews>,
    is_sharded: bool,
    /// Bucket of each tensor.
    bucket_of: Vec<usize>,
    /// Number of tensors in each bucket.
    tensor_counts: Vec<usize>,
    /// Number of tensors of each bucket whose gradient does not exist yet in this backward pass.
    missing: Vec<usize>,
    /// Per tensor: it has received a gradient in this step.
    used: Vec<bool>,
    /// This backward pass reduces; false while gradients still accumulate.
    is_last_micro_batch: bool,
    reductions: Vec<Pending>,
    /// All-gathers of weights that have not finished, by bucket.
    gathers: Vec<Option<Pending>>,
    /// Time spent waiting for them since `begin_step`.
    gather_wait: Duration,
    /// The first error of a gather.
    gather_error: Option<Error>,
    events: Vec<BucketEvent>,
}

/// Views of one bucket in the flat buffers.
struct BucketViews {
    grad: Tensor,
    /// Copy of `grad` in the dtype of the reduction, where that is not fp32.
    staging: Option<Tensor>,
    reduced_grad: Tensor,
    compute_shard: Tensor,
    compute: Tensor,
}

impl BucketViews {
    fn new(flat: &FlatParams, reduce: GradReduce, full: &Range<usize>, bucket: usize) -> BucketViews {
        let shard = match &flat.sharding {
            Some(sharding) => sharding.range_in_shard(bucket),
            None => full.clone(),
        };
        let grad = narrow(&flat.grad, full);
        BucketViews {
            staging: (reduce.kind != Kind::Float).then(|| grad.to_kind(reduce.kind)),
            reduced_grad: narrow(&flat.reduced_grad, &shard),
            compute_shard: narrow(&flat.compute_shard, &shard),
            // Uses `.data()`, so that an all-gather that finishes during the forward pass does not bump the version
            // counter of tensors that autograd has saved.
            compute: narrow(&flat.compute.data(), full),
            grad,
        }
    }
}

fn narrow(buffer: &Tensor, range: &Range<usize>) -> Tensor {
    buffer.narrow(0, range.start as i64, range.len() as i64)
}

impl Buckets {
    /// Makes buckets over the leaves of `flat`, reduced over `channel`.
    pub fn new(flat: &FlatParams, reduce: impl Into<GradReduce>, channel: Box<dyn Channel>) -> Result<Buckets> {
        let reduce = reduce.into();
        let layout = match &flat.sharding {
            Some(sharding) => sharding.layout.clone(),
            None => compute_layout(&flat.specs, reduce.bucket_bytes / 4, ALIGN).1,
        };
        let BucketLayout { buckets, bucket_of } = layout;
        let mut tensor_counts = vec![0; buckets.len()];
        bucket_of.iter().for_each(|&bucket| tensor_counts[bucket] += 1);
        let views = |(bucket, range)| BucketViews::new(flat, reduce, range, bucket);
        let state = Arc::new(Mutex::new(BucketState {
            channel,
            buckets: buckets.iter().enumerate().map(views).collect(),
            is_sharded: flat.sharding.is_some(),
            used: vec![false; bucket_of.len()],
            missing: tensor_counts.clone(),
            bucket_of,
            tensor_counts,
            is_last_micro_batch: false,
            reductions: Vec::new(),
            gathers: Vec::new(),
            gather_wait: Duration::ZERO,
            gather_error: None,
            events: Vec::new(),
        }));
        let hook_state = state.clone();
        let hooks = GradHooks::register(&flat.leaves.0, move |tensor| lock(&hook_state).on_grad(tensor))?;
        Ok(Buckets { state, _hooks: hooks })
    }

    /// Resets the records of a step. Call it before the first backward pass.
    pub fn begin_step(&self) {
        let mut state = lock(&self.state);
        state.used.fill(false);
        state.events.clear();
        state.gather_wait = Duration::ZERO;
    }

    /// Prepares a backward pass: gradients are reduced during the last one of a step and only accumulate in the others.
    pub fn set_last_micro_batch(&self, is_last: bool) {
        let mut state = lock(&self.state);
        state.is_last_micro_batch = is_last;
        state.missing = state.tensor_counts.clone();
    }

    /// Starts the remaining reductions after the last backward pass, and waits for all. Afterwards `reduced_grad` is
    /// the sum over ranks, or this rank's shard of it.
    pub fn finish(&self, timeout: Duration) -> Result<()> {
        let (reductions, destinations) = {
            let mut state = lock(&self.state);
            state.start_reductions(true);
            state.is_last_micro_batch = false;
            (std::mem::take(&mut state.reductions), state.destinations())
        };
        for (reduction, destination) in reductions.into_iter().zip(destinations) {
            let sum = reduction.wait(timeout)?;
            if let Some(mut destination) = destination {
                no_grad(|| destination.copy_(&sum));
            }
        }
        Ok(())
    }

    /// Returns the squared norm of the reduced gradient, over all shards: fp32 [] on the buffers' device, not finite if
    /// any value is not.
    pub fn square_sum(&self, flat: &FlatParams, timeout: Duration) -> Result<Tensor> {
        let local = square_sum(&flat.reduced_grad)?;
        let mut state = lock(&self.state);
        if !state.is_sharded {
            return Ok(local);
        }
        let total = state.channel.all_reduce(&local.to_kind(Kind::Double), ReduceOp::Sum).wait(timeout)?;
        Ok(total.to_kind(Kind::Float))
    }

    /// Starts to all-gather the updated weights, in the order in which the next forward uses them. Does nothing unless
    /// the optimizer is sharded.
    pub fn start_weight_gather(&self) {
        let state = &mut *lock(&self.state);
        if state.is_sharded {
            let gather = |bucket: &BucketViews| Some(state.channel.all_gather(&bucket.compute_shard));
            state.gathers = state.buckets.iter().rev().map(gather).collect();
            state.gathers.reverse();
        }
    }

    /// Returns the hook that a forward pass calls with a tensor's index before it uses the tensor: it waits at most
    /// `timeout` for the all-gather of the tensor's bucket. [`finish_weight_gather`](Self::finish_weight_gather)
    /// returns its error.
    pub fn wait_hook(&self, timeout: Duration) -> impl Fn(usize) + Send + Sync + 'static {
        let state = self.state.clone();
        move |tensor| {
            let mut state = lock(&state);
            let bucket = state.bucket_of[tensor];
            state.wait_bucket(bucket, timeout);
        }
    }

    /// Waits for all-gathers of weights that have not finished.
    pub fn finish_weight_gather(&self, timeout: Duration) -> Result<()> {
        let mut state = lock(&self.state);
        (0..state.gathers.len()).rev().for_each(|bucket| state.wait_bucket(bucket, timeout));
        state.gather_error.take().map_or(Ok(()), Err)
    }

    /// Returns the time spent waiting for weights since `begin_step`.
    pub fn gather_wait(&self) -> Duration {
        lock(&self.state).gather_wait
    }

    /// Calls `visit` with the index and the full tensor for every tensor of a buffer `[K]` (the weights, a moment). If
    /// the optimizer is sharded this is collective, gathers one bucket at a time, and visits the tensors bucket by
    /// bucket.
    pub fn for_each_full(
        &self,
        flat: &FlatParams,
        buffer: &Tensor,
        timeout: Duration,
        mut visit: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let tensors = 0..flat.specs.len();
        let Some(sharding) = &flat.sharding else {
            return tensors.into_iter().try_for_each(|index| visit(index, &flat.param_view(buffer, index)));
        };
        for (bucket, bucket_range) in sharding.layout.buckets.iter().enumerate().rev() {
            let local = narrow(buffer, &sharding.range_in_shard(bucket));
            let gather = lock(&self.state).channel.all_gather(&local);
            let full = gather.wait(timeout)?.view(-1);
            for index in tensors.clone().filter(|&index| sharding.layout.bucket_of[index] == bucket) {
                let range = &flat.ranges[index];
                let tensor = full.narrow(0, (range.start - bucket_range.start) as i64, range.len() as i64);
                visit(index, &tensor.view(flat.specs[index].shape.as_slice()))?;
            }
        }
        Ok(())
    }

    /// Returns the full weights in fp32: the master weights or, where those are sharded, the compute weights.
    pub fn weights(&self, flat: &FlatParams, timeout: Duration) -> Result<Weights> {
        if flat.sharding.is_none() {
            return Ok(flat.weights(&flat.master));
        }
        self.finish_weight_gather(timeout)?;
        Ok(flat.weights(&flat.compute.to_kind(Kind::Float)))
    }

    /// Returns, for each tensor, whether it received a gradient on this rank since `begin_step`.
    pub fn used_params(&self) -> Vec<bool> {
        lock(&self.state).used.clone()
    }

    /// Returns the events since `begin_step`.
    pub fn events(&self) -> Vec<BucketEvent> {
        lock(&self.state).events.clone()
    }
}

impl Drop for Buckets {
    /// Finishes started all-gathers, since other ranks may wait for them.
    fn drop(&mut self) {
        // The error of a lost rank is reported elsewhere.
        let _ = self.finish_weight_gather(Duration::from_secs(5));
    }
}

impl BucketState {
    fn on_grad(&mut self, tensor: usize) {
        self.used[tensor] = true;
        self.missing[self.bucket_of[tensor]] -= 1;
        self.events.push(BucketEvent::GradReady(tensor));
        if self.is_last_micro_batch {
            self.start_reductions(false);
        }
    }

    /// Waits for the all-gather of a bucket, if it has not finished, and copies the result into the compute weights.
    fn wait_bucket(&mut self, bucket: usize, timeout: Duration) {
        let Some(gather) = self.gathers.get_mut(bucket).and_then(Option::take) else { return };
        let start = Instant::now();
        match gather.wait(timeout) {
            Ok(full) => no_grad(|| self.buckets[bucket].compute.copy_(&full.view(-1))),
            Err(error) => self.gather_error = self.gather_error.take().or(Some(error)),
        }
        self.gather_wait += start.elapsed();
    }

    /// Starts the next buckets as long as they are complete, or all remaining ones.
    fn start_reductions(&mut self, all: bool) {
        while self.reductions.len() < self.buckets.len() && (all || self.missing[self.reductions.len()] == 0) {
            let index = self.reductions.len();
            self.events.push(BucketEvent::ReduceStarted(index));
            let bucket = &mut self.buckets[index];
            let input = match &mut bucket.staging {
                None => &bucket.grad,
                Some(staging) => {
                    no_grad(|| staging.copy_(&bucket.grad));
                    &*staging
                }
            };
            let reduction = if self.is_sharded {
                self.channel.reduce_scatter(input)
            } else {
                self.channel.all_reduce(input, ReduceOp::Sum)
            };
            self.reductions.push(reduction);
        }
    }

    /// Returns, for each bucket, the tensor that its sum is copied into; none where the reduction is in place.
    fn destinations(&self) -> Vec<Option<Tensor>> {
        let destination = |bucket: &BucketViews| {
            let needs_copy = self.is_sharded || bucket.staging.is_some();
            needs_copy.then(|| bucket.reduced_grad.shallow_clone())
        };
        self.buckets.iter().map(destination).collect()
    }
}

fn lock(state: &Mutex<BucketState>) -> MutexGuard<'_, BucketState> {
    state.lock().expect("no thread panics while it holds the buckets")
}
