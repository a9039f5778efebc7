//! Which part of a picture a view shows, and how it is brought to the model's size.
//!
//! `RandomResizedCrop` as torchvision draws it (Szegedy et al., "Going deeper with convolutions", 2015), with the
//! numbers taken from the sample's own stream. The resize is Pillow's: antialiased, on 8-bit pixels, seeing nothing
//! outside the box.

use crate::data::decode::Decoded;
use crate::fault::{Fault, Result};
use crate::rng::Draw;
use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;

/// A random box of a picture, resized to the model's size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Crop {
    /// Least and greatest share of the picture's area.
    pub scale: [f64; 2],
    /// Least and greatest width / height.
    pub ratio: [f64; 2],
    /// How pixels are resized, here and in evaluation.
    pub interpolation: Interpolation,
}

/// Kernels of the resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Interpolation {
    /// Keys' cubic with a = −0.5, as in Pillow.
    Bicubic,
    Bilinear,
}

impl Default for Crop {
    /// MAE's pre-training (He et al., 2022): a fifth of the area or more, 3:4 to 4:3, bicubic.
    fn default() -> Self {
        Crop { scale: [0.2, 1.0], ratio: [3.0 / 4.0, 4.0 / 3.0], interpolation: Interpolation::Bicubic }
    }
}

/// A box of whole pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

impl Crop {
    /// Refuses shares outside (0, 1], sides that are not positive, and ranges that run backwards.
    pub fn check(&self) -> Result<()> {
        let Crop { scale: [small, large], ratio: [narrow, wide], .. } = *self;
        if !(small > 0.0 && small <= large && large <= 1.0) {
            return Err(Fault::usage(format!(
                "view.crop.scale is [{small}, {large}]; it is two shares of the area, 0 < least <= greatest <= 1"
            )));
        }
        if !(narrow > 0.0 && narrow <= wide && wide.is_finite()) {
            return Err(Fault::usage(format!(
                "view.crop.ratio is [{narrow}, {wide}]; it is two ratios of width to height, 0 < least <= greatest"
            )));
        }
        Ok(())
    }

    /// torchvision's `RandomResizedCrop.get_params`: ten tries of an area and a ratio, then the largest centred box
    /// whose ratio is allowed. A try draws area and ratio; the one that fits draws top and left as well.
    pub fn region(&self, width: u32, height: u32, draw: &mut Draw) -> Region {
        let area = f64::from(width) * f64::from(height);
        let log_ratio = self.ratio.map(f64::ln);
        for _ in 0..10 {
            let target = area * draw.between(self.scale[0], self.scale[1]);
            let ratio = draw.between(log_ratio[0], log_ratio[1]).exp();
            let w = (target * ratio).sqrt().round_ties_even();
            let h = (target / ratio).sqrt().round_ties_even();
            if w >= 1.0 && w <= f64::from(width) && h >= 1.0 && h <= f64::from(height) {
                let (w, h) = (w as u32, h as u32);
                let top = draw.below(u64::from(height - h) + 1) as u32;
                let left = draw.below(u64::from(width - w) + 1) as u32;
                return Region { left, top, width: w, height: h };
            }
        }
        self.central(width, height)
    }

    fn central(&self, width: u32, height: u32) -> Region {
        let [narrow, wide] = self.ratio;
        let whole = f64::from(width) / f64::from(height);
        // A line one pixel thin would round to nothing; one pixel is left of it.
        let side = |value: f64| (value.round_ties_even() as u32).max(1);
        let (w, h) = if whole < narrow {
            (width, side(f64::from(width) / narrow).min(height))
        } else if whole > wide {
            (side(f64::from(height) * wide).min(width), height)
        } else {
            (width, height)
        };
        Region { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
    }
}

/// The box of `image`, resized to `width` × `height`: [height, width, channels].
pub fn resize(image: &Decoded, region: Region, width: u32, height: u32, how: Interpolation) -> Vec<u8> {
    run(image, region, [width, height], &options(how))
}

/// Evaluation's view: the picture, resized so that it just covers `width / share` × `height / share`, cut to its
/// central `width` × `height`. For squares this is torchvision's `Resize(int(size / share))` and `CenterCrop(size)`.
/// Both happen at once, so that a picture of one pixel by thousands costs no more than any other.
pub fn resize_center(image: &Decoded, width: u32, height: u32, share: f64, how: Interpolation) -> Vec<u8> {
    let (w, h) = (f64::from(image.width), f64::from(image.height));
    let (cover_w, cover_h) = ((f64::from(width) / share).floor(), (f64::from(height) / share).floor());
    let (new_w, new_h) = if cover_h * w >= cover_w * h {
        ((cover_h * w / h).floor(), cover_h)
    } else {
        (cover_w, (cover_w * h / w).floor())
    };
    let left = ((new_w - f64::from(width)) / 2.0).round_ties_even();
    let top = ((new_h - f64::from(height)) / 2.0).round_ties_even();
    let (x, y) = (w / new_w, h / new_h);
    // Rounding may carry the far edge past the picture by a part of 10¹⁶; the resizer would refuse that.
    let (box_w, box_h) = ((f64::from(width) * x).min(w - left * x), (f64::from(height) * y).min(h - top * y));
    let whole = Region { left: 0, top: 0, width: image.width, height: image.height };
    run(image, whole, [width, height], &options(how).crop(left * x, top * y, box_w, box_h))
}

/// Mirrors [height, width, channels] left to right, in place.
pub fn mirror(pixels: &mut [u8], width: usize, channels: usize) {
    for row in pixels.chunks_exact_mut(width * channels) {
        for x in 0..width / 2 {
            for c in 0..channels {
                row.swap(x * channels + c, (width - 1 - x) * channels + c);
            }
        }
    }
}

fn options(how: Interpolation) -> ResizeOptions {
    let filter = match how {
        Interpolation::Bicubic => FilterType::CatmullRom,
        Interpolation::Bilinear => FilterType::Bilinear,
    };
    ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter))
}

/// The typed face of the resizer: its other one compiles every kernel for sixteen kinds of pixel.
fn run(image: &Decoded, part: Region, size: [u32; 2], options: &ResizeOptions) -> Vec<u8> {
    let mut out = vec![0; (size[0] * size[1] * image.channels) as usize];
    match image.channels {
        1 => typed::<U8>(image, part, size, &mut out, options),
        _ => typed::<U8x3>(image, part, size, &mut out, options),
    }
    out
}

fn typed<P: PixelTrait>(image: &Decoded, part: Region, size: [u32; 2], out: &mut [u8], options: &ResizeOptions) {
    // The resizer keeps its scratch between pictures; one for each thread of the feed.
    thread_local!(static RESIZER: RefCell<Resizer> = RefCell::new(Resizer::new()));
    let whole = TypedImageRef::<P>::from_buffer(image.width, image.height, &image.pixels).expect("whole pixels");
    let Region { left, top, width, height } = part;
    let part = TypedCroppedImage::from_ref(&whole, left, top, width, height).expect("a box inside the picture");
    let mut out = TypedImage::<P>::from_buffer(size[0], size[1], out).expect("as many pixels as the size says");
    RESIZER
        .with_borrow_mut(|resizer| resizer.resize_typed(&part, &mut out, options))
        .expect("a box inside the picture");
}
