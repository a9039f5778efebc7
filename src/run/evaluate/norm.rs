//! Batch normalisation without an affine part, over the batch of all ranks.

use super::ranks::Ranks;
use crate::fault::{Fault, Result};
use tch::{Device, Kind, Tensor};

/// torch's default share of a batch in the running statistics.
const MOMENTUM: f64 = 0.1;

/// Features with mean 0 and variance 1 (Ioffe and Szegedy, 2015), as `BatchNorm1d(affine=False, eps=1e-6)` in front of
/// the official probe's linear layer.
///
/// The mean and variance are those of the global batch. The official code normalises each GPU's share by itself, 512
/// samples in its recipe; with the whole batch the result does not depend on the number of ranks.
pub struct Norm {
    /// What evaluation normalises by, fp32 [D]: begun at 0 and 1, moved by a tenth with each batch.
    pub mean: Tensor,
    pub variance: Tensor,
    eps: f64,
}

impl Norm {
    pub fn new(width: i64) -> Norm {
        let options = (Kind::Float, Device::Cpu);
        Norm { mean: Tensor::zeros([width], options), variance: Tensor::ones([width], options), eps: 1e-6 }
    }

    /// This rank's rows [R, D] of a batch, normalised by the statistics of all ranks' rows, which enter the running
    /// ones (the variance unbiased, as in torch); collective. A rank may have no row; all together have two or more.
    pub fn train(&mut self, x: &Tensor, ranks: &mut Ranks) -> Result<Tensor> {
        let wide = x.to_kind(Kind::Double);
        let count = Tensor::from_slice(&[x.size()[0] as f64]);
        let mean = wide.sum_dim_intlist(0, false, Kind::Double);
        ranks.sum(&[&count, &mean])?;
        let count = count.double_value(&[0]);
        if count < 2.0 {
            return Err(Fault::usage("a batch of one sample has no variance; give the probe two samples or more"));
        }
        let mean = mean / count;
        let squares = (&wide - &mean).square().sum_dim_intlist(0, false, Kind::Double);
        ranks.sum(&[&squares])?;
        let narrow = |x: &Tensor| x.to_kind(Kind::Float);
        let _ = self.mean.lerp_(&narrow(&mean), MOMENTUM);
        let _ = self.variance.lerp_(&narrow(&(&squares / (count - 1.0))), MOMENTUM);
        Ok(narrow(&((wide - mean) / (squares / count + self.eps).sqrt())))
    }

    /// x [R, D] normalised by the running statistics.
    pub fn evaluate(&self, x: &Tensor) -> Tensor {
        (x - &self.mean) / (&self.variance + self.eps).sqrt()
    }
}
