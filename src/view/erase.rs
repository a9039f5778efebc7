//! Random erasing (Zhong et al., 2020) of batches, as timm's `RandomErasing` in mode `pixel`.
//!
//! It acts on the normalized tensor, as in timm, and not on 8-bit pixels: it writes N(0, 1) noise about the data's
//! mean, of which 8 bits would clip a third.

use super::crop::random_position;
use crate::data::decode::Region;
use crate::error::{Error, Result};
use crate::op::shuffle::SampleKey;
use crate::rng::{Philox, Purpose};
use tch::Tensor;

/// Replaces a random box of a sample with noise.
#[derive(Clone, Debug, PartialEq)]
pub struct Erase {
    /// Probability of erasing for a sample.
    pub probability: f64,
    /// Minimum and maximum fraction of the area.
    pub area: [f64; 2],
    /// Minimum and maximum height / width.
    pub ratio: [f64; 2],
}

impl Default for Erase {
    /// The fine-tuning of MAE (He et al., 2022): a quarter of the samples, one box, timm's areas and ratios.
    fn default() -> Self {
        Erase { probability: 0.25, area: [0.02, 1.0 / 3.0], ratio: [0.3, 1.0 / 0.3] }
    }
}

impl Erase {
    /// Refuses a probability or fractions out of range, ratios that are not positive, and ranges with min > max.
    pub fn check(&self) -> Result<()> {
        let probability = self.probability;
        let [min_area, max_area] = self.area;
        let [min_ratio, max_ratio] = self.ratio;
        if !(0.0..=1.0).contains(&probability) {
            return Err(Error::usage(format!("erase.probability is {probability}; it is a probability, 0 to 1")));
        }
        if !(min_area > 0.0 && min_area <= max_area && max_area <= 1.0) {
            return Err(Error::usage(format!(
                "erase.area is [{min_area}, {max_area}]; it is two fractions of the area, 0 < min <= max <= 1"
            )));
        }
        if !(min_ratio > 0.0 && min_ratio <= max_ratio && max_ratio.is_finite()) {
            return Err(Error::usage(format!(
                "erase.ratio is [{min_ratio}, {max_ratio}]; it is two ratios of height to width, 0 < min <= max"
            )));
        }
        Ok(())
    }

    /// Samples a box as timm does: whether to erase, then up to ten tries of an area and a ratio; a box smaller than
    /// the image in both directions gets a position.
    pub fn sample_region(&self, width: u32, height: u32, rng: &mut Philox) -> Option<Region> {
        if rng.uniform() > self.probability {
            return None;
        }
        let image_area = f64::from(width) * f64::from(height);
        for _ in 0..10 {
            let area = image_area * rng.uniform_range(self.area[0], self.area[1]);
            let ratio = rng.uniform_range(self.ratio[0].ln(), self.ratio[1].ln()).exp();
            let h = (area * ratio).sqrt().round_ties_even();
            let w = (area / ratio).sqrt().round_ties_even();
            if w < f64::from(width) && h < f64::from(height) {
                return Some(random_position(width, height, w as u32, h as u32, rng));
            }
        }
        None
    }

    /// Erases in place in normalized samples [B, C, Y, X] or clips [B, C, T, Y, X]; a clip has the same box in all
    /// frames, with new noise in each. `keys` are those of the rows, so that a sample is erased alike in any batch.
    pub fn apply(&self, batch: &Tensor, seed: u64, keys: &[SampleKey]) {
        let size = batch.size();
        let [.., height, width] = size[..] else { panic!("shape {size:?} has no height and width") };
        assert_eq!(size[0], keys.len() as i64, "rows of the batch and keys");
        let mut noise: Vec<f32> = Vec::new();
        for (row, key) in (0..).zip(keys) {
            let mut rng = Philox::new(seed, key.id, key.epoch, Purpose::Erase, key.repeat);
            let Some(region) = self.sample_region(width as u32, height as u32, &mut rng) else { continue };
            let Region { left, top, width, height } = region;
            let mut part = batch.get(row).narrow(-2, top.into(), height.into()).narrow(-1, left.into(), width.into());
            noise.clear();
            noise.extend((0..part.numel()).map(|_| rng.normal() as f32));
            part.copy_(&Tensor::from_slice(&noise).view_as(&part));
        }
    }
}
