//! The vote of the nearest training samples.

use super::features::Set;
use crate::fault::{Fault, Result};
use tch::{Kind, Tensor};

/// The most likenesses in memory at a time (256 MB in fp32).
const LIKENESSES: i64 = 64 << 20;

/// The numbers of the vote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Vote {
    /// How many training samples vote; all of them where there are fewer.
    pub k: i64,
    /// What likenesses are divided by: the smaller, the more the nearest alone decides.
    pub temperature: f64,
}

impl Default for Vote {
    /// As in Wu et al. (2018) for the temperature, and as most papers since for the neighbours.
    fn default() -> Self {
        Vote { k: 20, temperature: 0.07 }
    }
}

impl Vote {
    /// Refuses nobody's vote and a temperature that is no positive number.
    pub fn check(&self) -> Result<()> {
        if self.k < 1 {
            return Err(Fault::usage(format!("--k is {}; at least one neighbour votes", self.k)));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Fault::usage(format!("--temperature is {}; it must be above 0", self.temperature)));
        }
        Ok(())
    }

    /// The classes of x [R, D] by the vote of the `k` nearest of `train` by cosine, each weighing
    /// exp(cosine / temperature) (Wu et al., "Unsupervised feature learning via non-parametric instance
    /// discrimination", 2018) → int64 [R].
    pub fn classes(&self, train: &Set, x: &Tensor) -> Tensor {
        let unit = |x: &Tensor| x / x.square().sum_dim_intlist(-1, true, Kind::Float).sqrt().clamp_min(1e-12);
        let classes = train.labels.max().int64_value(&[]) + 1;
        let samples = train.labels.numel() as i64;
        let bank = unit(&train.x).transpose(0, 1);
        let vote = |x: Tensor| {
            let (likeness, at) = unit(&x).matmul(&bank).topk(self.k.min(samples), 1, true, true); // [R, k]
            // A softmax weighs as the exponential does, up to a factor that all voters share, and cannot overflow.
            let weight = (likeness / self.temperature).softmax(1, Kind::Float);
            let votes = Tensor::zeros([x.size()[0], classes], (Kind::Float, x.device()));
            votes.scatter_add(1, &train.labels.index_select(0, &at.view(-1)).view_as(&at), &weight).argmax(1, false)
        };
        let rows = (LIKENESSES / samples).clamp(1, 1024);
        Tensor::cat(&x.split(rows, 0).into_iter().map(vote).collect::<Vec<_>>(), 0)
    }
}
