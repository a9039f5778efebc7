//! Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of batches, as timm's `Mixup` in mode `batch`.
//!
//! A batch is mixed with itself in reverse order, with one λ. The random numbers belong to the batch and not to a
//! sample, so their key is the step: all ranks and micro-batches of a step mix alike. (In timm every rank samples its
//! own.) The partners depend on the order of the rows, and so on how a global batch is split.

use crate::data::decode::Region;
use crate::error::{Error, Result};
use crate::rng::{Philox, Purpose};
use tch::{Kind, Tensor};

/// Options of mixup and CutMix.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixup {
    /// Mixup's α, λ ~ Beta(α, α); 0 for no mixup.
    pub mixup_alpha: f64,
    /// CutMix's α; 0 for no CutMix.
    pub cutmix_alpha: f64,
    /// Probability of mixing for a batch.
    pub probability: f64,
    /// Probability of CutMix where both are on.
    pub switch_probability: f64,
    /// Fraction of a label that is spread over all classes.
    pub label_smoothing: f64,
}

impl Default for Mixup {
    /// The fine-tuning of MAE (He et al., 2022, table 9).
    fn default() -> Self {
        Mixup { mixup_alpha: 0.8, cutmix_alpha: 1.0, probability: 1.0, switch_probability: 0.5, label_smoothing: 0.1 }
    }
}

/// How one batch is mixed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MixupDraw {
    /// Not at all.
    Unmixed,
    /// λ · row + (1 − λ) · partner.
    Mixup { lam: f64 },
    /// The partner's pixels inside the box; λ is the fraction of the area outside.
    CutMix { region: Region, lam: f64 },
}

impl Mixup {
    /// Refuses numbers out of range, and both α 0.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("mixup_alpha", self.mixup_alpha), ("cutmix_alpha", self.cutmix_alpha)] {
            if !(0.0..=1000.0).contains(&value) {
                return Err(Error::usage(format!("mixup.{name} is {value}; it is the α of Beta(α, α), 0 to 1000")));
            }
        }
        if self.mixup_alpha == 0.0 && self.cutmix_alpha == 0.0 {
            return Err(Error::usage(
                "mixup.mixup_alpha and mixup.cutmix_alpha are both 0: set one of them, or leave mixup out",
            ));
        }
        for (name, value) in [
            ("probability", self.probability),
            ("switch_probability", self.switch_probability),
            ("label_smoothing", self.label_smoothing),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::usage(format!("mixup.{name} is {value}; it must lie in 0..=1")));
            }
        }
        Ok(())
    }

    /// Samples how the batch of step `step` is mixed, for samples of `height` × `width` pixels, as timm does: whether
    /// to mix, mixup or CutMix, λ, then the center of the box.
    pub fn sample(&self, seed: u64, step: u64, width: u32, height: u32) -> MixupDraw {
        let mut rng = Philox::new(seed, step, 0, Purpose::Mixup, 0);
        if rng.uniform() >= self.probability {
            return MixupDraw::Unmixed;
        }
        let both = self.mixup_alpha > 0.0 && self.cutmix_alpha > 0.0;
        let is_cutmix = if both { rng.uniform() < self.switch_probability } else { self.cutmix_alpha > 0.0 };
        let lam = sample_beta(if is_cutmix { self.cutmix_alpha } else { self.mixup_alpha }, &mut rng);
        if !is_cutmix {
            return MixupDraw::Mixup { lam };
        }
        let y = rng.uniform_int(height.into()) as u32;
        let x = rng.uniform_int(width.into()) as u32;
        MixupDraw::cutmix(width, height, lam, [x, y])
    }
}

impl MixupDraw {
    /// Makes CutMix's box: √(1 − λ) of each side about `center` (x, y), clipped to the image, with λ corrected to the
    /// fraction that is left. The odd pixel of an odd side is below and right of the center, as in timm 1.0.31; timm
    /// 0.3.2, which MAE used, loses it.
    pub fn cutmix(width: u32, height: u32, lam: f64, [x, y]: [u32; 2]) -> MixupDraw {
        let side_fraction = (1.0 - lam).sqrt();
        let span = |side: u32, center: u32| {
            let length = (f64::from(side) * side_fraction) as u32;
            let start = center.saturating_sub(length / 2);
            (start, (center + length.div_ceil(2)).min(side) - start)
        };
        let (left, w) = span(width, x);
        let (top, h) = span(height, y);
        let lam = 1.0 - f64::from(w * h) / f64::from(width * height);
        MixupDraw::CutMix { region: Region { left, top, width: w, height: h }, lam }
    }

    /// Returns the weight of a row's own label.
    pub fn lam(&self) -> f64 {
        match *self {
            MixupDraw::Unmixed => 1.0,
            MixupDraw::Mixup { lam } | MixupDraw::CutMix { lam, .. } => lam,
        }
    }

    /// Mixes samples [B, …, Y, X], normalized or not; a box is the same in all frames of a clip.
    pub fn mix_samples(&self, batch: &Tensor) -> Tensor {
        match *self {
            MixupDraw::Unmixed => batch.shallow_clone(),
            MixupDraw::Mixup { lam } => batch * lam + batch.flip([0]) * (1.0 - lam),
            MixupDraw::CutMix { region: Region { left, top, width, height }, .. } => {
                let crop =
                    |full: &Tensor| full.narrow(-2, top.into(), height.into()).narrow(-1, left.into(), width.into());
                let mixed = batch.copy();
                crop(&mixed).copy_(&crop(&batch.flip([0])));
                mixed
            }
        }
    }

    /// Mixes labels int64 `[B]` to class probabilities, fp32 [B, classes].
    pub fn mix_targets(&self, labels: &Tensor, classes: i64, label_smoothing: f64) -> Tensor {
        let off_value = label_smoothing / classes as f64;
        let on_value = 1.0 - label_smoothing + off_value;
        let targets = Tensor::full([labels.size()[0], classes], off_value, (Kind::Float, labels.device()))
            .scatter_value(1, &labels.unsqueeze(1), on_value);
        &targets * self.lam() + targets.flip([0]) * (1.0 - self.lam())
    }
}

/// Samples λ ~ Beta(α, α) = G / (G + G′) from two gamma variates, divided as logarithms so that a small α gives 0 or 1,
/// not 0/0.
pub fn sample_beta(alpha: f64, rng: &mut Philox) -> f64 {
    let first = sample_log_gamma(alpha, rng);
    let second = sample_log_gamma(alpha, rng);
    1.0 / (1.0 + (second - first).exp())
}

/// Samples ln of a Gamma(α, 1) variate: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000),
/// for α + 1, times U^(1/α).
fn sample_log_gamma(alpha: f64, rng: &mut Philox) -> f64 {
    let d = alpha + 1.0 - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = rng.normal();
        let v = (1.0 + c * x).powi(3);
        let u = 1.0 - rng.uniform();
        if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return (d * v).ln() + (1.0 - rng.uniform()).ln() / alpha;
        }
    }
}
