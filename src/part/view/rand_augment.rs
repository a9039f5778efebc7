//! RandAugment (Cubuk et al., 2020), as timm's `rand-m9-mstd0.5-inc1`, with which masked autoencoders are fine-tuned.
//!
//! Fifteen operations, in timm's order (`_RAND_INCREASING_TRANSFORMS`, timm 1.0.31). Each of `ops` layers takes one of
//! them, evenly and with replacement, and applies it in one case of two. Its level is magnitude + deviation · N(0, 1),
//! cut to 0..=10, of which s = level / 10 is the share; "±" is either sign, evenly:
//!
//! | operation | argument |
//! |---|---|
//! | auto-contrast, equalise, invert | none |
//! | rotate | ±30 s degrees |
//! | posterise | 4 − ⌊4 s⌋ bits are kept |
//! | solarise | from 256 − ⌊256 s⌋ on |
//! | solarise-add | ⌊110 s⌋ |
//! | colour, contrast, brightness, sharpness | factor 1 ± 0.9 s, at least 0.1 |
//! | shear x, shear y | ±0.3 s |
//! | translate x, translate y | ±0.45 s of the side |

use super::affine::{self, affine};
use super::crop::Interpolation;
use super::{colour, sharpness, tone};
use crate::fault::{Fault, Result};
use crate::rng::Draw;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many operations at random, and how strong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RandAugment {
    /// Layers, each of which applies one operation in one case of two; timm's `n`.
    pub ops: u32,
    /// Mean level, 0 to 10; timm's `m`.
    pub magnitude: f64,
    /// Deviation of the level; timm's `mstd`.
    pub deviation: f64,
    /// Red, green and blue (for one channel: their luma) where a moved picture leaves nothing. timm takes the data's
    /// mean.
    pub fill: [u8; 3],
}

impl Default for RandAugment {
    /// `rand-m9-mstd0.5-inc1`, filled with ImageNet's mean.
    fn default() -> Self {
        RandAugment { ops: 2, magnitude: 9.0, deviation: 0.5, fill: [124, 116, 104] }
    }
}

/// What a layer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    AutoContrast,
    Equalise,
    Invert,
    Rotate,
    Posterise,
    Solarise,
    SolariseAdd,
    Colour,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

use Operation::*;

/// All of them, in timm's order.
pub const OPERATIONS: [Operation; 15] = [
    AutoContrast,
    Equalise,
    Invert,
    Rotate,
    Posterise,
    Solarise,
    SolariseAdd,
    Colour,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
];

/// One operation and its number, as the table above says; 0 where there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    pub operation: Operation,
    pub argument: f64,
}

impl RandAugment {
    /// Refuses no or too many layers, levels outside 0..=10 and negative deviations.
    pub fn check(&self) -> Result<()> {
        if !(1..=16).contains(&self.ops) {
            return Err(Fault::usage(format!(
                "view.augment.rand_augment.ops is {}; it must lie in 1..=16; leave rand_augment out for none",
                self.ops
            )));
        }
        super::augment::within("rand_augment.magnitude", self.magnitude, 0.0, 10.0)?;
        super::augment::within("rand_augment.deviation", self.deviation, 0.0, 10.0)
    }

    /// The next layer; None where it lets the picture be. Each layer takes the same share of the stream.
    pub fn layer(&self, draw: &mut Draw) -> Option<Layer> {
        let operation = OPERATIONS[draw.below(OPERATIONS.len() as u64) as usize];
        let (chance, noise, sign) = (draw.uniform(), draw.normal(), draw.uniform());
        let level = (self.magnitude + self.deviation * noise).clamp(0.0, 10.0);
        (chance <= 0.5).then(|| Layer::new(operation, level, sign > 0.5))
    }

    /// All layers of one sample, on 8-bit [Y, X, C].
    pub fn apply(
        &self,
        pixels: &mut [u8],
        shape: [usize; 3],
        how: Interpolation,
        draw: &mut Draw,
        scratch: &mut Vec<u8>,
    ) {
        for _ in 0..self.ops {
            if let Some(layer) = self.layer(draw) {
                layer.apply(pixels, shape, self.fill, how, scratch);
            }
        }
    }
}

impl Layer {
    /// From a level of 0..=10.
    pub fn new(operation: Operation, level: f64, negative: bool) -> Layer {
        let share = level / 10.0;
        let signed = |value: f64| if negative { -value } else { value };
        let argument = match operation {
            AutoContrast | Equalise | Invert => 0.0,
            Rotate => signed(share * 30.0),
            Posterise => 4.0 - (share * 4.0).floor(),
            Solarise => 256.0 - (share * 256.0).floor(),
            SolariseAdd => (share * 110.0).floor(),
            Colour | Contrast | Brightness | Sharpness => (1.0 + signed(share * 0.9)).max(0.1),
            ShearX | ShearY => signed(share * 0.3),
            TranslateX | TranslateY => signed(share * 0.45),
        };
        Layer { operation, argument }
    }

    /// On 8-bit [Y, X, C].
    pub fn apply(
        &self,
        pixels: &mut [u8],
        shape: [usize; 3],
        fill: [u8; 3],
        how: Interpolation,
        scratch: &mut Vec<u8>,
    ) {
        let [height, width, channels] = shape;
        let by = self.argument;
        let matrix = match self.operation {
            AutoContrast => return tone::auto_contrast(pixels, channels),
            Equalise => return tone::equalise(pixels, channels),
            Invert => return tone::invert(pixels),
            Posterise => return tone::posterise(pixels, by as u32),
            Solarise => return tone::solarise(pixels, by as u16),
            SolariseAdd => return tone::solarise_add(pixels, by as u8),
            Colour => return colour::saturation(pixels, channels, by),
            Contrast => return colour::contrast(pixels, channels, by),
            Brightness => return colour::brightness(pixels, by),
            Sharpness => return sharpness::sharpness(pixels, shape, by, scratch),
            Rotate => affine::rotate(width, height, by),
            ShearX => affine::shear_x(by),
            ShearY => affine::shear_y(by),
            TranslateX => affine::translate(by * width as f64, 0.0),
            TranslateY => affine::translate(0.0, by * height as f64),
        };
        let luma = [colour::luma(&fill)];
        let fill = if channels == 1 { &luma[..] } else { &fill[..] };
        affine(pixels, shape, &matrix, fill, how, scratch);
    }
}
