//! Color jitter.

use super::{check_range, color};
use crate::error::{Error, Result};
use crate::rng::Philox;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// torchvision's `ColorJitter` within `RandomApply`: brightness, contrast and saturation by factors from [max(0, 1 −
/// x), 1 + x] and a rotation of the hue by [−x, x] of the circle, in random order. An x of 0 turns an operation off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Jitter {
    /// Probability of jitter for a sample.
    pub probability: f64,
    pub brightness: f64,
    pub contrast: f64,
    pub saturation: f64,
    /// At most 0.5.
    pub hue: f64,
}

impl Default for Jitter {
    /// MoCo v2 (Chen et al., 2020): 0.4, 0.4, 0.4, 0.1 with probability 0.8.
    fn default() -> Self {
        Jitter { probability: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1 }
    }
}

/// The parameters of one color jitter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct JitterParams {
    /// Order of the operations: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    pub order: [u8; 4],
    /// Factors of the first three and rotation of the hue; None turns an operation off.
    pub amounts: [Option<f64>; 4],
}

impl Jitter {
    /// Refuses values out of range and a jitter without effect.
    pub fn check(&self) -> Result<()> {
        check_range("jitter.probability", self.probability, 0.0, 1.0)?;
        check_range("jitter.brightness", self.brightness, 0.0, 100.0)?;
        check_range("jitter.contrast", self.contrast, 0.0, 100.0)?;
        check_range("jitter.saturation", self.saturation, 0.0, 100.0)?;
        check_range("jitter.hue", self.hue, 0.0, 0.5)?;
        if [self.brightness, self.contrast, self.saturation, self.hue].iter().any(|&x| x > 0.0) {
            return Ok(());
        }
        Err(Error::usage(
            "view.augment.jitter changes nothing: set brightness, contrast, saturation or hue, or leave jitter out",
        ))
    }

    /// Samples as torchvision does: whether to apply, the order, then an amount for each operation in use.
    pub fn sample(&self, rng: &mut Philox) -> Option<JitterParams> {
        if rng.uniform() >= self.probability {
            return None;
        }
        let mut order = [0, 1, 2, 3];
        for last in (1..4).rev() {
            order.swap(last, rng.uniform_int(last as u64 + 1) as usize);
        }
        let factor = |x: f64| (x > 0.0).then_some([(1.0 - x).max(0.0), 1.0 + x]);
        let hue = (self.hue > 0.0).then_some([-self.hue, self.hue]);
        let ranges = [factor(self.brightness), factor(self.contrast), factor(self.saturation), hue];
        Some(JitterParams { order, amounts: ranges.map(|range| range.map(|[low, high]| rng.uniform_range(low, high))) })
    }
}

impl JitterParams {
    /// Applies the operations to 8-bit pixels [Y, X, C].
    pub fn apply(&self, pixels: &mut [u8], channels: usize) {
        for operation in self.order {
            match (operation, self.amounts[usize::from(operation)]) {
                (_, None) => {}
                (0, Some(factor)) => color::adjust_brightness(pixels, factor),
                (1, Some(factor)) => color::adjust_contrast(pixels, channels, factor),
                (2, Some(factor)) => color::adjust_saturation(pixels, channels, factor),
                (_, Some(turn)) => color::adjust_hue(pixels, channels, turn),
            }
        }
    }
}
