//! Distance of spectra at hidden frequencies (masked frequency modeling, equation 5 with γ = 1).

use super::{LossTerm, Per};
use crate::op::spectrum::spectrum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The config's `average` of the distance of spectra.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpectrumAverage {
    /// All hidden frequencies of the global batch alike (paper): low-passed samples, which hide most, weigh more.
    #[default]
    Batch,
    /// The hidden frequencies of each sample, and all samples alike.
    Sample,
}

impl SpectrumAverage {
    /// Returns the loss term of images pred and target [B, C, Y, X], hidden [B, 1, Y, X].
    pub fn term(self, pred: &Tensor, target: &Tensor, hidden: &Tensor) -> LossTerm {
        let distance = spectrum_distance(pred, target, hidden);
        let name = "spectrum";
        if self == SpectrumAverage::Batch {
            return LossTerm { name, sum: distance.sum(distance.kind()), per: Per::Counted };
        }
        let axes = [1i64, 2, 3];
        let counts = hidden.sum_dim_intlist(axes.as_slice(), false, None) * target.size()[1] as f64; // [B]
        let means = distance.sum_dim_intlist(axes.as_slice(), false, None) / counts;
        LossTerm { name, sum: means.sum(means.kind()), per: Per::Sample }
    }
}

/// pred and target [B, C, Y, X], hidden [B, 1, Y, X] → the modulus of the difference of their orthonormal spectra at
/// each hidden frequency, 0 at others: fp32 [B, C, Y, X]. Gradients reach the prediction.
pub fn spectrum_distance(pred: &Tensor, target: &Tensor, hidden: &Tensor) -> Tensor {
    let difference = spectrum(pred) - spectrum(&target.detach()); // [B, C, Y, X, 2]
    let square = difference.square().sum_dim_intlist([-1i64].as_slice(), false, None);
    // The term keeps the gradient finite where both are equal (official code).
    (square + 1e-12).sqrt() * hidden
}
