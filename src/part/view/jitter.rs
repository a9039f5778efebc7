//! Colour jitter: which factors, and in which order.

use super::colour;
use crate::fault::{Fault, Result};
use crate::rng::Draw;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// torchvision's `ColorJitter` within `RandomApply`: brightness, contrast and saturation by factors from
/// [max(0, 1 − x), 1 + x], hue turned by [−x, x] of the circle, in random order. One whose x is 0 is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Jitter {
    /// How likely a sample is jittered.
    pub probability: f64,
    pub brightness: f64,
    pub contrast: f64,
    pub saturation: f64,
    /// At most 0.5.
    pub hue: f64,
}

impl Default for Jitter {
    /// MoCo v2 (Chen et al., 2020): 0.4, 0.4, 0.4, 0.1, four samples in five.
    fn default() -> Self {
        Jitter { probability: 0.8, brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1 }
    }
}

/// The numbers of one jitter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jittered {
    /// 0 brightness, 1 contrast, 2 saturation, 3 hue, in the order in which they act.
    pub order: [u8; 4],
    /// Factors of the first three and the turn of the hue; None leaves out.
    pub amounts: [Option<f64>; 4],
}

impl Jitter {
    /// Refuses shares that are no probability, negative ranges and more than half a turn of hue.
    pub fn check(&self) -> Result<()> {
        super::augment::within("jitter.probability", self.probability, 0.0, 1.0)?;
        for (name, value) in
            [("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation)]
        {
            super::augment::within(&format!("jitter.{name}"), value, 0.0, 100.0)?;
        }
        super::augment::within("jitter.hue", self.hue, 0.0, 0.5)?;
        match [self.brightness, self.contrast, self.saturation, self.hue].iter().any(|&x| x > 0.0) {
            true => Ok(()),
            false => Err(Fault::usage(
                "view.augment.jitter changes nothing: set brightness, contrast, saturation or hue, or leave jitter out",
            )),
        }
    }

    /// torchvision's draw: whether at all, the order, then a number for each that is in use.
    pub fn draw(&self, draw: &mut Draw) -> Option<Jittered> {
        if draw.uniform() >= self.probability {
            return None;
        }
        let mut order = [0, 1, 2, 3];
        for last in (1..4).rev() {
            order.swap(last, draw.below(last as u64 + 1) as usize);
        }
        let factor = |x: f64| (x > 0.0).then_some([(1.0 - x).max(0.0), 1.0 + x]);
        let hue = (self.hue > 0.0).then_some([-self.hue, self.hue]);
        let ranges = [factor(self.brightness), factor(self.contrast), factor(self.saturation), hue];
        Some(Jittered { order, amounts: ranges.map(|range| range.map(|[low, high]| draw.between(low, high))) })
    }
}

impl Jittered {
    /// On 8-bit [Y, X, C].
    pub fn apply(&self, pixels: &mut [u8], channels: usize) {
        for which in self.order {
            match (which, self.amounts[usize::from(which)]) {
                (_, None) => {}
                (0, Some(factor)) => colour::brightness(pixels, factor),
                (1, Some(factor)) => colour::contrast(pixels, channels, factor),
                (2, Some(factor)) => colour::saturation(pixels, channels, factor),
                (_, Some(turn)) => colour::hue(pixels, channels, turn),
            }
        }
    }
}
