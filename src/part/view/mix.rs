//! Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of finished batches, as timm's `Mixup` in mode `batch`.
//!
//! A batch is mixed with itself in reverse order, all of it with one λ. The draw belongs to the batch and not to a
//! sample, so it is keyed on the step: all ranks and micro-batches of a step mix alike. (In timm each rank draws its
//! own.) Which samples meet is the order of the rows that are given, so it depends on how the batch is cut.

use crate::data::decode::Region;
use crate::fault::{Fault, Result};
use crate::rng::{Draw, Purpose};
use tch::{Kind, Tensor};

/// How batches are mixed.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    /// Mixup's α, of λ ~ Beta(α, α); 0 for no mixup.
    pub mixup: f64,
    /// CutMix's α; 0 for no CutMix.
    pub cutmix: f64,
    /// How likely a batch is mixed.
    pub probability: f64,
    /// How likely CutMix is chosen where both are on.
    pub switch: f64,
    /// Share of a label that is spread over all classes.
    pub smoothing: f64,
}

impl Default for Mix {
    /// The fine-tuning of MAE (He et al., 2022, table 9).
    fn default() -> Self {
        Mix { mixup: 0.8, cutmix: 1.0, probability: 1.0, switch: 0.5, smoothing: 0.1 }
    }
}

/// The numbers of one batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mixture {
    /// As it is.
    Apart,
    /// λ · row + (1 − λ) · partner.
    Blended { lam: f64 },
    /// The partner's pixels inside the box; λ is the share outside.
    Pasted { region: Region, lam: f64 },
}

impl Mix {
    /// Refuses negative α, both α 0 and what is no share.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("mixup", self.mixup), ("cutmix", self.cutmix)] {
            if !(0.0..=1000.0).contains(&value) {
                return Err(Fault::usage(format!("mix.{name} is {value}; it is the α of Beta(α, α), 0 to 1000")));
            }
        }
        if self.mixup == 0.0 && self.cutmix == 0.0 {
            return Err(Fault::usage("mix.mixup and mix.cutmix are both 0: set one of them, or leave mix out"));
        }
        for (name, value) in [("probability", self.probability), ("switch", self.switch), ("smoothing", self.smoothing)]
        {
            if !(0.0..=1.0).contains(&value) {
                return Err(Fault::usage(format!("mix.{name} is {value}; it must lie in 0..=1")));
            }
        }
        Ok(())
    }

    /// The mixture of step `step` for samples of `height` × `width` pixels, drawn as timm does: whether at all, which
    /// of the two, λ, then the middle of the box.
    pub fn draw(&self, seed: u64, step: u64, width: u32, height: u32) -> Mixture {
        let mut draw = Draw::new(seed, step, 0, Purpose::Mix, 0);
        if draw.uniform() >= self.probability {
            return Mixture::Apart;
        }
        let both = self.mixup > 0.0 && self.cutmix > 0.0;
        let cut = if both { draw.uniform() < self.switch } else { self.cutmix > 0.0 };
        let lam = beta(if cut { self.cutmix } else { self.mixup }, &mut draw);
        match cut {
            false => Mixture::Blended { lam },
            true => {
                let y = draw.below(height.into()) as u32;
                let x = draw.below(width.into()) as u32;
                Mixture::pasted(width, height, lam, [x, y])
            }
        }
    }
}

impl Mixture {
    /// CutMix's box: √(1 − λ) of each side about `middle` (x, y), cut at the picture's edge, and λ corrected to the
    /// share that is left. An odd side puts its odd pixel below and right, as in timm 1.0.31; the
    /// 0.3.2 of MAE's days loses it.
    pub fn pasted(width: u32, height: u32, lam: f64, [x, y]: [u32; 2]) -> Mixture {
        let share = (1.0 - lam).sqrt();
        let span = |side: u32, middle: u32| {
            let cut = (f64::from(side) * share) as u32;
            let low = middle.saturating_sub(cut / 2);
            (low, (middle + cut.div_ceil(2)).min(side) - low)
        };
        let ((left, w), (top, h)) = (span(width, x), span(height, y));
        let lam = 1.0 - f64::from(w * h) / f64::from(width * height);
        Mixture::Pasted { region: Region { left, top, width: w, height: h }, lam }
    }

    /// The share of a row's own label.
    pub fn lam(&self) -> f64 {
        match *self {
            Mixture::Apart => 1.0,
            Mixture::Blended { lam } | Mixture::Pasted { lam, .. } => lam,
        }
    }

    /// Mixes samples [B, …, Y, X], which may be normalised or not; a box goes through all frames of a clip.
    pub fn samples(&self, batch: &Tensor) -> Tensor {
        match *self {
            Mixture::Apart => batch.shallow_clone(),
            Mixture::Blended { lam } => batch * lam + batch.flip([0]) * (1.0 - lam),
            Mixture::Pasted { region: Region { left, top, width, height }, .. } => {
                let part =
                    |whole: &Tensor| whole.narrow(-2, top.into(), height.into()).narrow(-1, left.into(), width.into());
                let mixed = batch.copy();
                part(&mixed).copy_(&part(&batch.flip([0])));
                mixed
            }
        }
    }

    /// Labels int64 [B] → shares of the classes, fp32 [B, classes]; each row sums to 1.
    pub fn targets(&self, labels: &Tensor, classes: i64, smoothing: f64) -> Tensor {
        let off = smoothing / classes as f64;
        let own = Tensor::full([labels.size()[0], classes], off, (Kind::Float, labels.device())).scatter_value(
            1,
            &labels.unsqueeze(1),
            1.0 - smoothing + off,
        );
        &own * self.lam() + own.flip([0]) * (1.0 - self.lam())
    }
}

/// λ ~ Beta(α, α) = G / (G + G′) of two gamma variates, divided as logarithms so that a small α gives 0 or 1, not 0/0.
pub fn beta(alpha: f64, draw: &mut Draw) -> f64 {
    let (first, second) = (log_gamma_variate(alpha, draw), log_gamma_variate(alpha, draw));
    1.0 / (1.0 + (second - first).exp())
}

/// ln of a Gamma(α, 1) variate: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000), for
/// α + 1, times U^(1/α).
fn log_gamma_variate(alpha: f64, draw: &mut Draw) -> f64 {
    let d = alpha + 1.0 - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = draw.normal();
        let v = (1.0 + c * x).powi(3);
        let u = 1.0 - draw.uniform();
        if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return (d * v).ln() + (1.0 - draw.uniform()).ln() / alpha;
        }
    }
}
