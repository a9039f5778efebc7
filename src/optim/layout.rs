//! The layout of the flat buffers: the range of each tensor, the buckets, and the shard of each bucket that a rank
//! keeps when the optimizer state is sharded.

use crate::part::params::ParamSpec;
use std::ops::Range;

/// Alignment of tensors, in elements: 256 bytes in the narrowest compute dtype (bf16).
pub const ALIGN: usize = 128;

/// The buckets: consecutive ranges that cover the flat buffers.
#[derive(Clone, Debug)]
pub struct BucketLayout {
    /// Element range of each bucket.
    pub buckets: Vec<Range<usize>>,
    /// Index of the bucket that holds each tensor, in the order of the specs.
    pub bucket_of: Vec<usize>,
}

impl BucketLayout {
    /// Returns the length of the flat buffers, in elements.
    pub fn length(&self) -> usize {
        self.buckets.last().map_or(0, |last| last.end)
    }
}

/// Returns each tensor's range and the buckets. The tensor used last comes first; tensors start at multiples of
/// [`ALIGN`]. A bucket ends with the first tensor that brings it to `min_elements`, at a multiple of `granule`; where
/// `granule` is `ALIGN`, the ranges do not depend on `min_elements`.
pub fn compute_layout(specs: &[ParamSpec], min_elements: usize, granule: usize) -> (Vec<Range<usize>>, BucketLayout) {
    let mut ranges = vec![0..0; specs.len()];
    let mut layout = BucketLayout { buckets: Vec::new(), bucket_of: vec![0; specs.len()] };
    let mut bucket_start = 0;
    let mut start = 0;
    for (index, spec) in specs.iter().enumerate().rev() {
        let end = start + spec.numel();
        ranges[index] = start..end;
        layout.bucket_of[index] = layout.buckets.len();
        start = end.next_multiple_of(ALIGN);
        if end - bucket_start >= min_elements || index == 0 {
            start = end.next_multiple_of(granule);
            layout.buckets.push(bucket_start..start);
            bucket_start = start;
        }
    }
    (ranges, layout)
}

/// The sharding of the optimizer state: every rank keeps an equal part of each bucket, in rank order (ZeRO stage 1,
/// Rajbhandari et al., 2020). The parts of one rank are contiguous in its shard buffers, whose length is that of the
/// full buffers divided by `world_size`.
#[derive(Clone, Debug)]
pub struct Sharding {
    pub layout: BucketLayout,
    pub rank: usize,
    pub world_size: usize,
}

impl Sharding {
    /// Returns this rank's part of a bucket, as a range of the full buffers.
    pub fn range_in_full(&self, bucket: usize) -> Range<usize> {
        let Range { start, end } = self.layout.buckets[bucket];
        let length = (end - start) / self.world_size;
        start + self.rank * length..start + (self.rank + 1) * length
    }

    /// Returns this rank's part of a bucket, as a range of the shard buffers.
    pub fn range_in_shard(&self, bucket: usize) -> Range<usize> {
        let Range { start, end } = self.layout.buckets[bucket];
        start / self.world_size..end / self.world_size
    }

    /// Returns this rank's part of tensor `index`, which has range `full` in the full buffers, as a range of the shard
    /// buffers; empty where other ranks keep all of the tensor.
    pub fn param_range_in_shard(&self, index: usize, full: &Range<usize>) -> Range<usize> {
        let bucket = self.layout.bucket_of[index];
        let local = self.range_in_full(bucket);
        let shard = self.range_in_shard(bucket);
        let start = full.start.max(local.start);
        let end = full.end.min(local.end);
        if start < end { shard.start + start - local.start..shard.start + end - local.start } else { 0..0 }
    }
}
