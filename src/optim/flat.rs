//! Flat parameter buffers: fp32 master weights, weights in the compute dtype, fp32 gradients and AdamW's two moments.
//! Every tensor starts on a 256-byte boundary, in reverse order of use, so that backward fills the gradient buffer from
//! its front.
//!
//! Compute weights and gradients are full on every rank, shape `[L]`. Master weights, moments and the reduced gradient
//! have shape `[K]`: all L elements, or this rank's shard where the optimizer is sharded.

use super::layout::{ALIGN, Sharding, compute_layout};
use crate::bridge;
use crate::error::Result;
use crate::part::params::{ParamSpec, ParamSpecs, Weights};
use std::ops::Range;
use tch::{Device, Kind, Tensor, no_grad};

/// Options of the buffers of all ranks.
#[derive(Clone, Copy, Debug)]
pub struct FlatOptions {
    /// Seed of the initial values.
    pub seed: u64,
    /// The compute dtype.
    pub kind: Kind,
    pub device: Device,
}

/// Options of sharded buffers.
#[derive(Clone, Copy, Debug)]
pub struct ShardOptions {
    /// Minimum bytes of a bucket, counted in fp32.
    pub bucket_bytes: usize,
    pub rank: usize,
    pub world_size: usize,
}

/// The flat buffers of a model, and views of them.
pub struct FlatParams {
    /// Seed of the initial values.
    pub seed: u64,
    /// Declarations of the tensors.
    pub specs: Vec<ParamSpec>,
    /// Range of each tensor in the full buffers, in the order of the specs.
    pub ranges: Vec<Range<usize>>,
    /// Range of this rank's part of each tensor in the `[K]` buffers; may be empty where the optimizer is sharded.
    pub shard_ranges: Vec<Range<usize>>,
    /// The sharding, where the optimizer is sharded.
    pub sharding: Option<Sharding>,
    /// Weights in the compute dtype `[L]`.
    pub compute: Tensor,
    /// Gradient, fp32 `[L]`; the leaves' `.grad` are views of it, zeroed in place and never undefined.
    pub grad: Tensor,
    /// Master weights, fp32 `[K]`.
    pub master: Tensor,
    /// Master weights in the compute dtype `[K]`. In fp32 it shares the storage of `master`; unless sharded, that of
    /// `compute`.
    pub compute_shard: Tensor,
    /// Gradient summed over ranks, fp32 `[K]`; unless sharded, it shares the storage of `grad`.
    pub reduced_grad: Tensor,
    /// AdamW's first moment, fp32 `[K]`.
    pub exp_avg: Tensor,
    /// AdamW's second moment, fp32 `[K]`.
    pub exp_avg_sq: Tensor,
    /// Number of updates of each tensor, fp32 [number of tensors].
    pub steps: Tensor,
    /// The leaves of autograd: views of `compute`.
    pub leaves: Weights,
}

impl FlatParams {
    /// Allocates unsharded buffers for the declared parameters and initializes the weights from `seed`.
    pub fn new(specs: &ParamSpecs, seed: u64, kind: Kind, device: Device) -> Result<FlatParams> {
        let (ranges, layout) = compute_layout(specs.specs(), usize::MAX, ALIGN);
        Self::build(specs, FlatOptions { seed, kind, device }, ranges, layout.length(), None)
    }

    /// Allocates buffers for one of several ranks, each of which keeps its shard of every bucket.
    pub fn new_sharded(specs: &ParamSpecs, options: FlatOptions, shards: ShardOptions) -> Result<FlatParams> {
        let ShardOptions { bucket_bytes, rank, world_size } = shards;
        let (ranges, layout) = compute_layout(specs.specs(), bucket_bytes / 4, ALIGN * world_size);
        let length = layout.length();
        Self::build(specs, options, ranges, length, Some(Sharding { layout, rank, world_size }))
    }

    fn build(
        specs: &ParamSpecs,
        options: FlatOptions,
        ranges: Vec<Range<usize>>,
        length: usize,
        sharding: Option<Sharding>,
    ) -> Result<FlatParams> {
        let FlatOptions { seed, kind, device } = options;
        let specs = specs.specs().to_vec();
        let zeros = |length: usize, kind| Tensor::zeros([length as i64], (kind, device));
        let shard_length = sharding.as_ref().map_or(length, |sharding| length / sharding.world_size);
        let master = zeros(shard_length, Kind::Float);
        let grad = zeros(length, Kind::Float);
        let compute_shard = if kind == Kind::Float { master.shallow_clone() } else { zeros(shard_length, kind) };
        let is_sharded = sharding.is_some();
        let reduced_grad = if is_sharded { zeros(shard_length, Kind::Float) } else { grad.shallow_clone() };
        let compute = if is_sharded { zeros(length, kind) } else { compute_shard.shallow_clone() };
        let mut leaves = Vec::with_capacity(specs.len());
        for (spec, range) in specs.iter().zip(&ranges) {
            let leaf = view(&compute, range, &spec.shape).detach().set_requires_grad(true);
            bridge::set_grad(&leaf, &view(&grad, range, &spec.shape))?;
            leaves.push(leaf);
        }
        let shard_range = |(index, range): (usize, &Range<usize>)| match &sharding {
            Some(sharding) => sharding.param_range_in_shard(index, range),
            None => range.clone(),
        };
        let mut flat = FlatParams {
            seed,
            shard_ranges: ranges.iter().enumerate().map(shard_range).collect(),
            steps: zeros(specs.len(), Kind::Float),
            exp_avg: zeros(shard_length, Kind::Float),
            exp_avg_sq: zeros(shard_length, Kind::Float),
            leaves: Weights::new(leaves),
            specs,
            ranges,
            sharding,
            master,
            compute,
            compute_shard,
            grad,
            reduced_grad,
        };
        for (index, spec) in flat.specs.iter().enumerate() {
            flat.set_param(index, &Tensor::from_slice(&spec.initial_values(seed)).view(spec.shape.as_slice()));
        }
        flat.sync_compute_weights();
        Ok(flat)
    }

    /// Returns the view of tensor `index` in a full buffer `[L]`, in the tensor's shape.
    pub fn param_view(&self, buffer: &Tensor, index: usize) -> Tensor {
        view(buffer, &self.ranges[index], &self.specs[index].shape)
    }

    /// Returns the view of this rank's part of tensor `index` in a buffer `[K]`: one dimension, perhaps empty.
    pub fn shard_of(&self, buffer: &Tensor, index: usize) -> Tensor {
        let Range { start, end } = self.shard_ranges[index];
        buffer.narrow(0, start as i64, (end - start) as i64)
    }

    /// Copies this rank's part of the full tensor `index` into a buffer `[K]`.
    pub fn copy_shard(&self, buffer: &Tensor, index: usize, full: &Tensor) {
        let mut shard = self.shard_of(buffer, index);
        let offset = match &self.sharding {
            Some(sharding) => {
                let local = sharding.range_in_full(sharding.layout.bucket_of[index]);
                local.start.saturating_sub(self.ranges[index].start)
            }
            None => 0,
        };
        if shard.numel() > 0 {
            no_grad(|| shard.copy_(&full.reshape(-1).narrow(0, offset as i64, shard.size()[0])));
        }
    }

    /// Sets tensor `index` in the compute weights and, as far as this rank keeps it, in the master weights. Call
    /// [`sync_compute_weights`](Self::sync_compute_weights) once all are set.
    pub fn set_param(&self, index: usize, full: &Tensor) {
        self.copy_shard(&self.master, index, full);
        no_grad(|| self.param_view(&self.compute, index).copy_(full));
    }

    /// Returns views of all tensors in a full buffer `[L]`, without gradients.
    pub fn weights(&self, buffer: &Tensor) -> Weights {
        Weights::new((0..self.specs.len()).map(|index| self.param_view(buffer, index)).collect())
    }

    /// Casts the master weights into [`compute_shard`](Self::compute_shard).
    pub fn sync_compute_weights(&mut self) {
        if self.compute_shard.kind() != Kind::Float {
            no_grad(|| self.compute_shard.copy_(&self.master));
        }
    }

    /// Zeroes the gradient buffer.
    pub fn zero_grad(&mut self) {
        let _ = self.grad.zero_();
    }
}

fn view(buffer: &Tensor, range: &Range<usize>, shape: &[i64]) -> Tensor {
    buffer.narrow(0, range.start as i64, range.len() as i64).view(shape)
}
