//! Batch normalization without an affine part, over the batch of all ranks.

use super::ranks::Ranks;
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Weight of a batch in the running statistics, PyTorch's default.
const MOMENTUM: f64 = 0.1;

/// Batch normalization (Ioffe and Szegedy, 2015), like the `BatchNorm1d(affine=False, eps=1e-6)` before the linear
/// layer of the official probe.
///
/// The statistics are those of the global batch, so that the result does not depend on the number of ranks. The
/// official code normalizes the part of each GPU by itself, 512 samples in its recipe.
pub struct BatchNorm {
    /// Running mean, fp32 `[D]`; starts at 0.
    pub running_mean: Tensor,
    /// Running variance, fp32 `[D]`; starts at 1.
    pub running_var: Tensor,
    eps: f64,
}

impl BatchNorm {
    /// Creates the normalization of `width` features.
    pub fn new(width: i64) -> BatchNorm {
        let options = (Kind::Float, Device::Cpu);
        BatchNorm {
            running_mean: Tensor::zeros([width], options),
            running_var: Tensor::ones([width], options),
            eps: 1e-6,
        }
    }

    /// Normalizes this rank's rows x [R, D] by the statistics of all ranks' rows and updates the running statistics
    /// (with the unbiased variance, as PyTorch does); collective. The result is in fp64. R may be 0 on some ranks, but
    /// the sum must be at least 2.
    pub fn forward_train(&mut self, x: &Tensor, ranks: &mut Ranks) -> Result<Tensor> {
        let x = x.to_kind(Kind::Double);
        let count = Tensor::from_slice(&[x.size()[0] as f64]);
        let sum = x.sum_dim_intlist(0, false, Kind::Double);
        ranks.all_reduce_sum(&[&count, &sum])?;
        let count = count.double_value(&[0]);
        if count < 2.0 {
            return Err(Error::usage("a batch of one sample has no variance; give the probe two samples or more"));
        }
        let mean = sum / count;
        let squares = (&x - &mean).square().sum_dim_intlist(0, false, Kind::Double);
        ranks.all_reduce_sum(&[&squares])?;
        let _ = self.running_mean.lerp_(&mean.to_kind(Kind::Float), MOMENTUM);
        let _ = self.running_var.lerp_(&(&squares / (count - 1.0)).to_kind(Kind::Float), MOMENTUM);
        Ok((x - mean) / (squares / count + self.eps).sqrt())
    }

    /// Normalizes x [R, D] by the running statistics.
    pub fn forward_eval(&self, x: &Tensor) -> Tensor {
        (x - &self.running_mean) / (&self.running_var + self.eps).sqrt()
    }
}
