//! Batch normalization over the samples of all ranks (Ioffe and Szegedy, 2015, algorithm 1; PyTorch's SyncBatchNorm),
//! so that it does not depend on the number of ranks. A method that uses it requires the whole batch.

use crate::error::Result;
use crate::op::at_least_float;
use crate::part::buffers::{BufferId, BufferSpecs};
use crate::part::loss::{BufferUpdate, Per};
use crate::part::params::{Init, ParamId, ParamSpecs};
use crate::part::step::Step;
use tch::Tensor;

/// How much of the running statistics stays in a step; PyTorch's `momentum` is 1 minus this.
const MOMENTUM: f64 = 0.9;
/// Lower bound of the variance, PyTorch's default.
const EPS: f64 = 1e-5;

/// Batch normalization with scale and shift, and running statistics as buffers.
#[derive(Clone, Copy, Debug)]
pub struct SyncBatchNorm {
    scale: ParamId,
    shift: ParamId,
    running_mean: BufferId,
    running_var: BufferId,
}

impl SyncBatchNorm {
    /// Declares `<name>.weight`, `<name>.bias`, and the buffers `<name>.running_mean` and `<name>.running_var` `[D]`.
    pub fn new(params: &mut ParamSpecs, buffers: &mut BufferSpecs, name: &str, width: i64) -> SyncBatchNorm {
        SyncBatchNorm {
            scale: params.add(format!("{name}.weight"), &[width], Init::One),
            shift: params.add(format!("{name}.bias"), &[width], Init::Zero),
            running_mean: buffers.add(format!("{name}.running_mean"), &[width], Init::Zero),
            running_var: buffers.add(format!("{name}.running_var"), &[width], Init::One),
        }
    }

    /// Normalizes this rank's rows x [B, D] by the mean and the biased variance of all ranks' rows, in fp32 → [B, D].
    /// Adds to `updates` the running mean and the running unbiased variance.
    pub fn forward(&self, step: &Step, x: &Tensor, updates: &mut Vec<BufferUpdate>) -> Result<Tensor> {
        let sum_rows = |x: &Tensor| x.sum_dim_intlist([0i64].as_slice(), false, None);
        let rows = at_least_float(x);
        let count = (x.size()[0] * step.ranks.world_size()) as f64;
        let sum = sum_rows(&rows); // [D]
        let centered = &rows - step.ranks.sum(&sum)? / count;
        let square_sum = sum_rows(&centered.square()); // [D]
        let var = step.ranks.sum(&square_sum)? / count;
        let update = |buffer, sum: Tensor| BufferUpdate::Mean { buffer, sum, per: Per::Sample, momentum: MOMENTUM };
        updates.push(update(self.running_mean, sum.detach()));
        updates.push(update(self.running_var, square_sum.detach() * (count / (count - 1.0))));
        let scale = at_least_float(&step.weights[self.scale]);
        let shift = at_least_float(&step.weights[self.shift]);
        Ok((centered * (var + EPS).rsqrt() * scale + shift).to_kind(x.kind()))
    }
}
