//! RandAugment (Cubuk et al., 2020) as timm's `rand-m9-mstd0.5-inc1`, with which masked autoencoders are fine-tuned.
//!
//! Fifteen operations, in timm's order (`_RAND_INCREASING_TRANSFORMS`, timm 1.0.31). Each of `ops` layers samples one
//! of them uniformly, with replacement, and applies it with probability 0.5. Its level is magnitude + magnitude_std ·
//! N(0, 1), clamped to 0..=10, and s = level / 10; "±" is a random sign:
//!
//! | operation | argument |
//! |---|---|
//! | auto-contrast, equalize, invert | none |
//! | rotate | ±30 s degrees |
//! | posterize | 4 − ⌊4 s⌋ bits are kept |
//! | solarize | from 256 − ⌊256 s⌋ on |
//! | solarize-add | ⌊110 s⌋ |
//! | color, contrast, brightness, sharpness | factor 1 ± 0.9 s, at least 0.1 |
//! | shear x, shear y | ±0.3 s |
//! | translate x, translate y | ±0.45 s of the side |

use super::affine::{self, apply_affine};
use super::crop::Interpolation;
use super::{check_range, color, sharpness, tone};
use crate::error::{Error, Result};
use crate::rng::Philox;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// RandAugment's options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RandAugment {
    /// Number of layers; timm's `n`.
    pub ops: u32,
    /// Mean level, 0 to 10; timm's `m`.
    pub magnitude: f64,
    /// Standard deviation of the level; timm's `mstd`.
    pub magnitude_std: f64,
    /// Color (RGB; for one channel its luma) outside a transformed image. timm takes the data's mean.
    pub fill: [u8; 3],
}

impl Default for RandAugment {
    /// `rand-m9-mstd0.5-inc1`, filled with ImageNet's mean.
    fn default() -> Self {
        RandAugment { ops: 2, magnitude: 9.0, magnitude_std: 0.5, fill: [124, 116, 104] }
    }
}

/// An operation of RandAugment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

use Operation::*;

/// All operations, in timm's order.
pub const OPERATIONS: [Operation; 15] = [
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
];

/// One operation and its argument, as in the table above; 0 where there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    pub operation: Operation,
    pub argument: f64,
}

impl RandAugment {
    /// Refuses numbers out of range.
    pub fn check(&self) -> Result<()> {
        if !(1..=16).contains(&self.ops) {
            return Err(Error::usage(format!(
                "view.augment.rand_augment.ops is {}; it must lie in 1..=16; leave rand_augment out for none",
                self.ops
            )));
        }
        check_range("rand_augment.magnitude", self.magnitude, 0.0, 10.0)?;
        check_range("rand_augment.magnitude_std", self.magnitude_std, 0.0, 10.0)
    }

    /// Samples the next layer; None is the identity. Every layer takes the same number of values from the stream.
    pub fn sample_layer(&self, rng: &mut Philox) -> Option<Layer> {
        let operation = OPERATIONS[rng.uniform_int(OPERATIONS.len() as u64) as usize];
        let chance = rng.uniform();
        let noise = rng.normal();
        let sign = rng.uniform();
        let level = (self.magnitude + self.magnitude_std * noise).clamp(0.0, 10.0);
        (chance <= 0.5).then(|| Layer::new(operation, level, sign > 0.5))
    }

    /// Applies all layers of one sample to 8-bit pixels [Y, X, C].
    pub fn apply(
        &self,
        pixels: &mut [u8],
        shape: [usize; 3],
        interpolation: Interpolation,
        rng: &mut Philox,
        scratch: &mut Vec<u8>,
    ) {
        for _ in 0..self.ops {
            if let Some(layer) = self.sample_layer(rng) {
                layer.apply(pixels, shape, self.fill, interpolation, scratch);
            }
        }
    }
}

impl Layer {
    /// Makes a layer from a level of 0..=10.
    pub fn new(operation: Operation, level: f64, negative: bool) -> Layer {
        let strength = level / 10.0;
        let signed = |value: f64| if negative { -value } else { value };
        let argument = match operation {
            AutoContrast | Equalize | Invert => 0.0,
            Rotate => signed(strength * 30.0),
            Posterize => 4.0 - (strength * 4.0).floor(),
            Solarize => 256.0 - (strength * 256.0).floor(),
            SolarizeAdd => (strength * 110.0).floor(),
            Color | Contrast | Brightness | Sharpness => (1.0 + signed(strength * 0.9)).max(0.1),
            ShearX | ShearY => signed(strength * 0.3),
            TranslateX | TranslateY => signed(strength * 0.45),
        };
        Layer { operation, argument }
    }

    /// Applies the operation to 8-bit pixels [Y, X, C].
    pub fn apply(
        &self,
        pixels: &mut [u8],
        shape: [usize; 3],
        fill: [u8; 3],
        interpolation: Interpolation,
        scratch: &mut Vec<u8>,
    ) {
        let [height, width, channels] = shape;
        let argument = self.argument;
        let matrix = match self.operation {
            AutoContrast => return tone::auto_contrast(pixels, channels),
            Equalize => return tone::equalize(pixels, channels),
            Invert => return tone::invert(pixels),
            Posterize => return tone::posterize(pixels, argument as u32),
            Solarize => return tone::solarize(pixels, argument as u16),
            SolarizeAdd => return tone::solarize_add(pixels, argument as u8),
            Color => return color::adjust_saturation(pixels, channels, argument),
            Contrast => return color::adjust_contrast(pixels, channels, argument),
            Brightness => return color::adjust_brightness(pixels, argument),
            Sharpness => return sharpness::adjust_sharpness(pixels, shape, argument, scratch),
            Rotate => affine::rotate(width, height, argument),
            ShearX => affine::shear_x(argument),
            ShearY => affine::shear_y(argument),
            TranslateX => affine::translate(argument * width as f64, 0.0),
            TranslateY => affine::translate(0.0, argument * height as f64),
        };
        let luma = [color::luma(&fill)];
        let fill = if channels == 1 { &luma[..] } else { &fill[..] };
        apply_affine(pixels, shape, &matrix, fill, interpolation, scratch);
    }
}
