//! k-nearest-neighbor classification.

use super::features::{FeatureSet, dot_products};
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// Maximum number of similarities in memory at a time (256 MB in fp64).
const MAX_SIMILARITIES: i64 = 32 << 20;

/// Options of the k-NN classifier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnnOptions {
    /// Number of neighbors; all training samples if there are fewer.
    pub k: i64,
    /// Divisor of the similarities: a small one gives the nearest neighbor almost all the weight.
    pub temperature: f64,
}

impl Default for KnnOptions {
    /// Returns the temperature of Wu et al. (2018) and the number of neighbors that most papers use.
    fn default() -> Self {
        KnnOptions { k: 20, temperature: 0.07 }
    }
}

impl KnnOptions {
    /// Checks the ranges.
    pub fn check(&self) -> Result<()> {
        if self.k < 1 {
            return Err(Error::usage(format!("--k is {}; it must be at least one", self.k)));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::usage(format!("--temperature is {}; it must be above 0", self.temperature)));
        }
        Ok(())
    }

    /// Predicts the classes of x [R, D] → int64 `[R]`: each of the `k` nearest samples of `train` by cosine similarity
    /// votes with the weight exp(similarity / temperature) (Wu et al., "Unsupervised feature learning via
    /// non-parametric instance discrimination", 2018).
    pub fn predict(&self, train: &FeatureSet, x: &Tensor) -> Tensor {
        let classes = train.labels.max().int64_value(&[]) + 1;
        let samples = train.labels.numel() as i64;
        let bank = normalize(&train.features);
        let predict_rows = |x: Tensor| {
            let k = self.k.min(samples);
            let (similarity, indices) = dot_products(&normalize(&x), &bank).topk(k, 1, true, true); // [R, k]
            // A softmax differs from the exponential by a factor common to all votes, and cannot overflow.
            let weight = (similarity / self.temperature).softmax(1, Kind::Float);
            let votes = Tensor::zeros([x.size()[0], classes], (Kind::Float, x.device()));
            let labels = train.labels.index_select(0, &indices.view(-1)).view_as(&indices);
            votes.scatter_add(1, &labels, &weight).argmax(1, false)
        };
        let rows = (MAX_SIMILARITIES / samples).clamp(1, 1024);
        Tensor::cat(&x.split(rows, 0).into_iter().map(predict_rows).collect::<Vec<_>>(), 0)
    }
}

/// Scales each row of x [R, D] to unit length, in fp64.
fn normalize(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Double);
    let norm = x.square().sum_dim_intlist(-1, true, Kind::Double).sqrt().clamp_min(1e-12);
    x / norm
}
