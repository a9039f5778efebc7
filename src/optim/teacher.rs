//! A teacher's weights: an exponential moving average of some of the student's, kept in fp32 beside the master weights.

use super::bucket::Buckets;
use super::flat::FlatParams;
use crate::error::Result;
use crate::op::lerp::{self, LerpWeight, lerp};
use crate::part::params::Weights;
use crate::part::teacher::Teacher;
use std::ops::Range;
use std::time::Duration;
use tch::{Kind, Tensor, no_grad};

/// The average of the parameters that a [`Teacher`] names, and their values in the compute dtype.
pub struct TeacherAverage {
    pub options: Teacher,
    /// fp32 `[K]`, in the layout of the master weights; sharded with them. Moves only inside `runs`.
    pub average: Tensor,
    /// The weights that the loss computes with: full tensors in the compute dtype, without gradients. Parameters that
    /// the teacher does not have are undefined tensors, so that using one is an error.
    pub weights: Weights,
    /// Which parameters the teacher has, in the order of the declarations.
    pub members: Vec<bool>,
    /// Runs of `average` that its parameters fill, end to end.
    runs: Vec<Range<usize>>,
}

impl TeacherAverage {
    /// A copy of the student.
    pub fn new(options: Teacher, flat: &FlatParams) -> TeacherAverage {
        let members: Vec<bool> = flat.specs.iter().map(|spec| spec.name.starts_with(options.prefix)).collect();
        let average = flat.master.copy();
        let shares_storage = flat.sharding.is_none() && flat.compute.kind() == Kind::Float;
        let values = if shares_storage { average.shallow_clone() } else { flat.compute.copy() };
        let weight = |index: usize| if members[index] { flat.param_view(&values, index) } else { Tensor::new() };
        let weights = Weights::new((0..members.len()).map(weight).collect());
        let runs = runs(flat, &members);
        TeacherAverage { options, average, weights, members, runs }
    }

    /// Moves the average by `1 − momentum` of its distance to the student, where the host has accepted the step.
    pub fn follow(&mut self, flat: &FlatParams, momentum: f64) {
        for run in &self.runs {
            let mut average = narrow(&self.average, run);
            no_grad(|| lerp(&mut average, &narrow(&flat.master, run), 1.0 - momentum));
        }
    }

    /// The same where the device decides: `weight` fp32 `[1]` is `1 − momentum`, or 0 where the step was refused.
    pub fn follow_on_device(&mut self, flat: &FlatParams, weight: &Tensor) -> Result<()> {
        self.runs.iter().try_for_each(|run| {
            lerp::kernel(&narrow(&self.average, run), &narrow(&flat.master, run), LerpWeight::Device(weight))
        })
    }

    /// Brings `weights` up to the average. Collective where the optimizer is sharded.
    pub fn sync_weights(&self, flat: &FlatParams, buckets: &Buckets, timeout: Duration) -> Result<()> {
        if flat.sharding.is_none() && flat.compute.kind() == Kind::Float {
            return Ok(());
        }
        buckets.for_each_full(flat, &self.average, timeout, |index, full| {
            if self.members[index] {
                no_grad(|| self.weights.0[index].shallow_clone().copy_(full));
            }
            Ok(())
        })
    }
}

/// The runs of this rank's shard that some parameters fill, neighbors joined across the padding between them.
fn runs(flat: &FlatParams, members: &[bool]) -> Vec<Range<usize>> {
    let mut ranges: Vec<(Range<usize>, bool)> =
        flat.shard_ranges.iter().cloned().zip(members.iter().copied()).filter(|(range, _)| !range.is_empty()).collect();
    ranges.sort_by_key(|(range, _)| range.start);
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut joins = false;
    for (range, is_member) in ranges {
        match runs.last_mut() {
            Some(last) if is_member && joins => last.end = range.end,
            _ if is_member => runs.push(range),
            _ => {}
        }
        joins = is_member;
    }
    runs
}

fn narrow(buffer: &Tensor, range: &Range<usize>) -> Tensor {
    buffer.narrow(0, range.start as i64, range.len() as i64)
}
