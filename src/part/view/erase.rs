//! Random erasing (Zhong et al., 2020) of finished batches, as timm's `RandomErasing` in mode `pixel`.
//!
//! It acts on the normalised tensor, as timm's does and not on 8-bit pixels: what it writes is N(0, 1) noise about the
//! data's mean, a third of which 8 bits would cut off or round.

use crate::data::decode::Region;
use crate::fault::{Fault, Result};
use crate::op::shuffle::Origin;
use crate::rng::{Draw, Purpose};
use tch::Tensor;

/// A random box of a sample becomes noise.
#[derive(Clone, Debug, PartialEq)]
pub struct Erase {
    /// How likely a sample loses a box.
    pub probability: f64,
    /// Least and greatest share of the area.
    pub area: [f64; 2],
    /// Least and greatest height / width.
    pub ratio: [f64; 2],
}

impl Default for Erase {
    /// The fine-tuning of MAE (He et al., 2022): a quarter of the samples, one box, timm's shares and ratios.
    fn default() -> Self {
        Erase { probability: 0.25, area: [0.02, 1.0 / 3.0], ratio: [0.3, 1.0 / 0.3] }
    }
}

impl Erase {
    /// Refuses what is no probability, shares outside (0, 1] and ranges that run backwards.
    pub fn check(&self) -> Result<()> {
        let Erase { probability, area: [small, large], ratio: [flat, tall] } = *self;
        if !(0.0..=1.0).contains(&probability) {
            return Err(Fault::usage(format!("erase.probability is {probability}; it is a probability, 0 to 1")));
        }
        if !(small > 0.0 && small <= large && large <= 1.0) {
            return Err(Fault::usage(format!(
                "erase.area is [{small}, {large}]; it is two shares of the area, 0 < least <= greatest <= 1"
            )));
        }
        if !(flat > 0.0 && flat <= tall && tall.is_finite()) {
            return Err(Fault::usage(format!(
                "erase.ratio is [{flat}, {tall}]; it is two ratios of height to width, 0 < least <= greatest"
            )));
        }
        Ok(())
    }

    /// timm's draw: whether at all, then ten tries of an area and a ratio; a box that is smaller than the picture both
    /// ways gets a place.
    pub fn region(&self, width: u32, height: u32, draw: &mut Draw) -> Option<Region> {
        if draw.uniform() > self.probability {
            return None;
        }
        let whole = f64::from(width) * f64::from(height);
        for _ in 0..10 {
            let area = whole * draw.between(self.area[0], self.area[1]);
            let ratio = draw.between(self.ratio[0].ln(), self.ratio[1].ln()).exp();
            let h = (area * ratio).sqrt().round_ties_even();
            let w = (area / ratio).sqrt().round_ties_even();
            if w < f64::from(width) && h < f64::from(height) {
                let (w, h) = (w as u32, h as u32);
                let top = draw.below(u64::from(height - h) + 1) as u32;
                let left = draw.below(u64::from(width - w) + 1) as u32;
                return Some(Region { left, top, width: w, height: h });
            }
        }
        None
    }

    /// Erases in place in normalised samples [B, C, Y, X], or clips [B, C, T, Y, X]: there one box goes through all
    /// frames, the noise new in each. `samples` are the rows' origins, so that a sample is erased alike in any batch.
    pub fn apply(&self, batch: &Tensor, seed: u64, samples: &[Origin]) {
        let size = batch.size();
        let [.., height, width] = size[..] else { panic!("samples of shape {size:?} have no pixels") };
        assert_eq!(size[0], samples.len() as i64, "a row of the batch has no origin");
        let mut noise: Vec<f32> = Vec::new();
        for (row, origin) in (0..).zip(samples) {
            let mut draw = Draw::new(seed, origin.id, origin.epoch, Purpose::Erase, origin.repeat);
            let Some(region) = self.region(width as u32, height as u32, &mut draw) else { continue };
            let Region { left, top, width, height } = region;
            let mut part = batch.get(row).narrow(-2, top.into(), height.into()).narrow(-1, left.into(), width.into());
            noise.clear();
            noise.extend((0..part.numel()).map(|_| draw.normal() as f32));
            part.copy_(&Tensor::from_slice(&noise).view_as(&part));
        }
    }
}
