//! What training does to a view's colours and shape once it has its size: the config's `view.augment`.

use super::crop::Interpolation;
use super::jitter::Jitter;
use super::rand_augment::RandAugment;
use super::{blur, colour, tone};
use crate::fault::{Fault, Result};
use crate::rng::{Draw, Purpose};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;

/// Everything is off unless it is named. What is on acts in the order of these keys: RandAugment as in fine-tuning, the
/// others as in contrastive training (SimCLR, MoCo, BYOL).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Random operations; `{}` is timm's `rand-m9-mstd0.5-inc1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rand_augment: Option<RandAugment>,
    /// Colour jitter; `{}` is MoCo v2's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Jitter>,
    /// How likely a sample loses its colour (torchvision's `RandomGrayscale`).
    pub grey: f64,
    /// Gaussian blur; `{}` is MoCo v2's deviation with BYOL's kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blur: Option<Blur>,
    /// Solarisation; `{}` is BYOL's of the second view.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solarise: Option<Solarise>,
}

/// torchvision's `GaussianBlur` within `RandomApply`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Blur {
    /// How likely a sample is blurred.
    pub probability: f64,
    /// Least and greatest deviation, in pixels.
    pub sigma: [f64; 2],
    /// Side of the kernel in pixels, odd; about a tenth of the picture's.
    pub kernel: usize,
}

impl Default for Blur {
    fn default() -> Self {
        Blur { probability: 0.5, sigma: [0.1, 2.0], kernel: 23 }
    }
}

/// torchvision's `RandomSolarize`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Solarise {
    /// How likely a sample is solarised.
    pub probability: f64,
    /// Values from here on are inverted, 0 to 256.
    pub threshold: u16,
}

impl Default for Solarise {
    fn default() -> Self {
        Solarise { probability: 0.2, threshold: 128 }
    }
}

impl Augment {
    pub fn check(&self) -> Result<()> {
        self.rand_augment.as_ref().map_or(Ok(()), RandAugment::check)?;
        self.jitter.as_ref().map_or(Ok(()), Jitter::check)?;
        within("grey", self.grey, 0.0, 1.0)?;
        self.blur.as_ref().map_or(Ok(()), Blur::check)?;
        self.solarise.as_ref().map_or(Ok(()), Solarise::check)
    }

    /// On a sample's 8-bit pixels [Y, X, C], C = 1 or 3. `stream` gives the sample's numbers for a purpose: frames of a
    /// clip that are given the same are changed alike. `how` is for what moves the picture.
    pub fn apply(&self, pixels: &mut [u8], shape: [usize; 3], how: Interpolation, stream: impl Fn(Purpose) -> Draw) {
        // The threads of the feed keep their scratch from picture to picture.
        thread_local!(static SCRATCH: RefCell<(Vec<u8>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) });
        let channels = shape[2];
        if let Some(random) = &self.rand_augment {
            let draw = &mut stream(Purpose::RandAugment);
            SCRATCH.with_borrow_mut(|(bytes, _)| random.apply(pixels, shape, how, draw, bytes));
        }
        if let Some(jittered) = self.jitter.as_ref().and_then(|jitter| jitter.draw(&mut stream(Purpose::Jitter))) {
            jittered.apply(pixels, channels);
        }
        if self.grey > 0.0 && stream(Purpose::Grey).uniform() < self.grey {
            colour::grey(pixels, channels);
        }
        if let Some((blur, sigma)) = self.blur.as_ref().and_then(|blur| blur.draw(&mut stream(Purpose::Blur))) {
            SCRATCH.with_borrow_mut(|(_, floats)| blur::gaussian(pixels, shape, blur.kernel, sigma, floats));
        }
        if let Some(solarise) = &self.solarise
            && stream(Purpose::Solarise).uniform() < solarise.probability
        {
            tone::solarise(pixels, solarise.threshold);
        }
    }
}

impl Blur {
    fn check(&self) -> Result<()> {
        within("blur.probability", self.probability, 0.0, 1.0)?;
        let [least, greatest] = self.sigma;
        if !(least > 0.0 && least <= greatest && greatest.is_finite()) {
            return Err(Fault::usage(format!(
                "view.augment.blur.sigma is [{least}, {greatest}]; it is two deviations in pixels, 0 < least <= greatest"
            )));
        }
        match self.kernel % 2 == 1 && self.kernel <= 255 {
            true => Ok(()),
            false => Err(Fault::usage(format!(
                "view.augment.blur.kernel is {}; it is an odd number of pixels, 1 to 255",
                self.kernel
            ))),
        }
    }

    /// The deviation, where the sample is blurred.
    pub fn draw(&self, draw: &mut Draw) -> Option<(&Self, f64)> {
        (draw.uniform() < self.probability).then(|| (self, draw.between(self.sigma[0], self.sigma[1])))
    }
}

impl Solarise {
    fn check(&self) -> Result<()> {
        within("solarise.probability", self.probability, 0.0, 1.0)?;
        within("solarise.threshold", f64::from(self.threshold), 0.0, 256.0)
    }
}

/// Refuses a number of `view.augment` outside its range.
pub(super) fn within(key: &str, value: f64, least: f64, most: f64) -> Result<()> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(Fault::usage(format!("view.augment.{key} is {value}; it must lie in {least}..={most}"))),
    }
}
