//! The config's `view.augment`: training's changes of colors and shape of a view in its final size.

use super::crop::Interpolation;
use super::jitter::Jitter;
use super::rand_augment::RandAugment;
use super::{blur, check_range, color, tone};
use crate::error::{Error, Result};
use crate::rng::{Philox, Purpose};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;

/// Augmentations, off unless given and applied in the order of the keys: RandAugment as in fine-tuning, the others as
/// in contrastive training (SimCLR, MoCo, BYOL).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Random operations; `{}` is timm's `rand-m9-mstd0.5-inc1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rand_augment: Option<RandAugment>,
    /// Color jitter; `{}` is MoCo v2's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Jitter>,
    /// Probability of grayscale (torchvision's `RandomGrayscale`).
    pub grayscale: f64,
    /// Gaussian blur; `{}` is MoCo v2's standard deviation with BYOL's kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blur: Option<Blur>,
    /// Solarization; `{}` is BYOL's of the second view.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solarize: Option<Solarize>,
}

/// torchvision's `GaussianBlur` within `RandomApply`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Blur {
    /// Probability of blur for a sample.
    pub probability: f64,
    /// Minimum and maximum standard deviation, in pixels.
    pub sigma: [f64; 2],
    /// Side of the kernel in pixels, odd; about a tenth of the image's.
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
pub struct Solarize {
    /// Probability of solarization for a sample.
    pub probability: f64,
    /// Values from this threshold on are inverted, 0 to 256.
    pub threshold: u16,
}

impl Default for Solarize {
    fn default() -> Self {
        Solarize { probability: 0.2, threshold: 128 }
    }
}

/// Buffers that a loader thread reuses from image to image.
#[derive(Default)]
struct AugmentBuffers {
    bytes: Vec<u8>,
    floats: Vec<f32>,
}

thread_local!(static SCRATCH: RefCell<AugmentBuffers> = RefCell::default());

impl Augment {
    /// Refuses numbers out of range.
    pub fn check(&self) -> Result<()> {
        self.rand_augment.as_ref().map_or(Ok(()), RandAugment::check)?;
        self.jitter.as_ref().map_or(Ok(()), Jitter::check)?;
        check_range("grayscale", self.grayscale, 0.0, 1.0)?;
        self.blur.as_ref().map_or(Ok(()), Blur::check)?;
        self.solarize.as_ref().map_or(Ok(()), Solarize::check)
    }

    /// Augments a sample's 8-bit pixels [Y, X, C], C = 1 or 3. `stream` returns the sample's random stream for a
    /// purpose: frames of a clip that get the same streams are changed alike. `interpolation` is that of affine
    /// operations.
    pub fn apply(
        &self,
        pixels: &mut [u8],
        shape: [usize; 3],
        interpolation: Interpolation,
        stream: impl Fn(Purpose) -> Philox,
    ) {
        let channels = shape[2];
        if let Some(rand_augment) = &self.rand_augment {
            let rng = &mut stream(Purpose::RandAugment);
            SCRATCH.with_borrow_mut(|scratch| {
                rand_augment.apply(pixels, shape, interpolation, rng, &mut scratch.bytes);
            });
        }
        if let Some(params) = self.jitter.as_ref().and_then(|jitter| jitter.sample(&mut stream(Purpose::Jitter))) {
            params.apply(pixels, channels);
        }
        if self.grayscale > 0.0 && stream(Purpose::Grayscale).uniform() < self.grayscale {
            color::to_grayscale(pixels, channels);
        }
        if let Some((blur, sigma)) = self.blur.as_ref().and_then(|blur| blur.sample(&mut stream(Purpose::Blur))) {
            SCRATCH.with_borrow_mut(|scratch| {
                blur::gaussian_blur(pixels, shape, blur.kernel, sigma, &mut scratch.floats);
            });
        }
        if let Some(solarize) = &self.solarize
            && stream(Purpose::Solarize).uniform() < solarize.probability
        {
            tone::solarize(pixels, solarize.threshold);
        }
    }
}

impl Blur {
    fn check(&self) -> Result<()> {
        check_range("blur.probability", self.probability, 0.0, 1.0)?;
        let [min, max] = self.sigma;
        if !(min > 0.0 && min <= max && max.is_finite()) {
            return Err(Error::usage(format!(
                "view.augment.blur.sigma is [{min}, {max}]; it is two standard deviations in pixels, 0 < min <= max"
            )));
        }
        if self.kernel % 2 == 1 && self.kernel <= 255 {
            return Ok(());
        }
        Err(Error::usage(format!(
            "view.augment.blur.kernel is {}; it is an odd number of pixels, 1 to 255",
            self.kernel
        )))
    }

    /// Samples whether to blur, and the standard deviation.
    pub fn sample(&self, rng: &mut Philox) -> Option<(&Self, f64)> {
        (rng.uniform() < self.probability).then(|| (self, rng.uniform_range(self.sigma[0], self.sigma[1])))
    }
}

impl Solarize {
    fn check(&self) -> Result<()> {
        check_range("solarize.probability", self.probability, 0.0, 1.0)?;
        check_range("solarize.threshold", f64::from(self.threshold), 0.0, 256.0)
    }
}
