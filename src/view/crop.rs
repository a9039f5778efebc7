//! Random and central boxes of an image, and their resize to the model's size.
//!
//! `RandomResizedCrop` as in torchvision (Szegedy et al., "Going deeper with convolutions", 2015), with random numbers
//! from the sample's own stream. The resize is Pillow's: antialiased, on 8-bit pixels. It ignores pixels outside the
//! region.

use crate::data::decode::{DecodedImage, DecodedRegion, Region};
use crate::error::{Error, Result};
use crate::rng::Philox;
use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;

/// A random box of an image, resized to the model's size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Crop {
    /// Minimum and maximum fraction of the image's area.
    pub scale: [f64; 2],
    /// Minimum and maximum width / height.
    pub ratio: [f64; 2],
    /// Interpolation of the resize, here and in evaluation.
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

impl Crop {
    /// Refuses fractions outside (0, 1], ratios that are not positive, and ranges with min > max.
    pub fn check(&self) -> Result<()> {
        let [min_scale, max_scale] = self.scale;
        let [min_ratio, max_ratio] = self.ratio;
        if !(min_scale > 0.0 && min_scale <= max_scale && max_scale <= 1.0) {
            return Err(Error::usage(format!(
                "view.crop.scale is [{min_scale}, {max_scale}]; it is two fractions of the area, 0 < min <= max <= 1"
            )));
        }
        if !(min_ratio > 0.0 && min_ratio <= max_ratio && max_ratio.is_finite()) {
            return Err(Error::usage(format!(
                "view.crop.ratio is [{min_ratio}, {max_ratio}]; it is two ratios of width to height, 0 < min <= max"
            )));
        }
        Ok(())
    }

    /// Samples a box as torchvision's `RandomResizedCrop.get_params`: up to ten tries of an area and a ratio, then the
    /// largest central box whose ratio is allowed. Every try samples area and ratio, the one that fits also top and
    /// left.
    pub fn sample_region(&self, width: u32, height: u32, rng: &mut Philox) -> Region {
        let image_area = f64::from(width) * f64::from(height);
        let log_ratio = self.ratio.map(f64::ln);
        for _ in 0..10 {
            let area = image_area * rng.uniform_range(self.scale[0], self.scale[1]);
            let ratio = rng.uniform_range(log_ratio[0], log_ratio[1]).exp();
            let w = (area * ratio).sqrt().round_ties_even();
            let h = (area / ratio).sqrt().round_ties_even();
            if w >= 1.0 && w <= f64::from(width) && h >= 1.0 && h <= f64::from(height) {
                return random_position(width, height, w as u32, h as u32, rng);
            }
        }
        self.central_region(width, height)
    }

    fn central_region(&self, width: u32, height: u32) -> Region {
        let [min_ratio, max_ratio] = self.ratio;
        let ratio = f64::from(width) / f64::from(height);
        // At least one pixel: a side of an extreme image would round to 0.
        let side = |value: f64| (value.round_ties_even() as u32).max(1);
        let (w, h) = if ratio < min_ratio {
            (width, side(f64::from(width) / min_ratio).min(height))
        } else if ratio > max_ratio {
            (side(f64::from(height) * max_ratio).min(width), height)
        } else {
            (width, height)
        };
        Region { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
    }
}

/// Samples the position of a box of `w` × `h` pixels in an image of `width` × `height`: top, then left.
pub(super) fn random_position(width: u32, height: u32, w: u32, h: u32, rng: &mut Philox) -> Region {
    let top = rng.uniform_int(u64::from(height - h) + 1) as u32;
    let left = rng.uniform_int(u64::from(width - w) + 1) as u32;
    Region { left, top, width: w, height: h }
}

/// Returns evaluation's box [left, top, width, height] in pixels of an image of `width` × `height`: the image is
/// resized so that it just covers `size / fraction` and cropped to its central `size` [width, height]. For squares this
/// is torchvision's `Resize(int(size / fraction))` and `CenterCrop(size)`. Both happen in one resize, so that an image
/// of one pixel by thousands costs no more than any other.
pub fn center_box(width: u32, height: u32, size: [u32; 2], fraction: f64) -> [f64; 4] {
    let [w, h] = [width, height].map(f64::from);
    let size = size.map(f64::from);
    let [cover_w, cover_h] = size.map(|side| (side / fraction).floor());
    let (resized_w, resized_h) = if cover_h * w >= cover_w * h {
        ((cover_h * w / h).floor(), cover_h)
    } else {
        (cover_w, (cover_w * h / w).floor())
    };
    let left = ((resized_w - size[0]) / 2.0).round_ties_even();
    let top = ((resized_h - size[1]) / 2.0).round_ties_even();
    let scale_x = w / resized_w;
    let scale_y = h / resized_h;
    let x = left * scale_x;
    let y = top * scale_y;
    // Rounding may move the far edge beyond the image by 1e-16 of its size, which the resizer would refuse.
    [x, y, (size[0] * scale_x).min(w - x), (size[1] * scale_y).min(h - y)]
}

impl Interpolation {
    /// Returns the radius of the kernel, in source pixels, of a resize of `from` to `to` pixels.
    fn support(self, from: f64, to: u32) -> f64 {
        let radius = match self {
            Interpolation::Bicubic => 2.0,
            Interpolation::Bilinear => 1.0,
        };
        radius * (from / f64::from(to)).max(1.0)
    }

    /// Returns the region of an image of `width` × `height` on which a resize of a box [left, top, width, height] to
    /// `size` depends.
    pub fn source_region(self, [left, top, w, h]: [f64; 4], size: [u32; 2], width: u32, height: u32) -> Region {
        // One pixel more, for rounding.
        let margin_x = self.support(w, size[0]) + 1.0;
        let margin_y = self.support(h, size[1]) + 1.0;
        let start = |value: f64| value.floor().max(0.0) as u32;
        let end = |value: f64, max: u32| (value.ceil() as u32).min(max);
        let x = start(left - margin_x);
        let y = start(top - margin_y);
        let right = end(left + w + margin_x, width);
        let bottom = end(top + h + margin_y, height);
        Region { left: x, top: y, width: right - x, height: bottom - y }
    }
}

/// Resizes the region to `size` [width, height] into `out`, [height, width, channels]. Pixels around the region have no
/// influence.
pub fn resize(region: &DecodedRegion, size: [u32; 2], interpolation: Interpolation, out: &mut [u8]) {
    resize_box(region, [0.0, 0.0, region.width, region.height], size, interpolation, out);
}

/// Resizes a box [left, top, width, height] of the region, as [`resize`]. Pixels of the region around the box have
/// influence, as far as the kernel reaches.
pub fn resize_box(
    region: &DecodedRegion,
    inside: [f64; 4],
    size: [u32; 2],
    interpolation: Interpolation,
    out: &mut [u8],
) {
    let filter = match interpolation {
        Interpolation::Bicubic => FilterType::CatmullRom,
        Interpolation::Bilinear => FilterType::Bilinear,
    };
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    // The typed interface: the dynamic one compiles every kernel for sixteen pixel types.
    match region.image.channels {
        1 => resize_typed::<U8>(region, inside, size, out, &options),
        _ => resize_typed::<U8x3>(region, inside, size, out, &options),
    }
}

fn resize_typed<P: PixelTrait>(
    region: &DecodedRegion,
    inside: [f64; 4],
    size: [u32; 2],
    out: &mut [u8],
    options: &ResizeOptions,
) {
    // One per loader thread, since the resizer reuses its scratch.
    thread_local!(static RESIZER: RefCell<Resizer> = RefCell::new(Resizer::new()));
    let DecodedImage { width, height, ref pixels, .. } = *region.image;
    let image = TypedImageRef::<P>::from_buffer(width, height, pixels).expect("the image's pixels");
    // Crops to the region, rounded outwards to whole pixels.
    let left = region.left.floor();
    let top = region.top.floor();
    let right = (region.left + region.width).ceil().min(f64::from(width));
    let bottom = (region.top + region.height).ceil().min(f64::from(height));
    let [x, y, w, h] = [left, top, right - left, bottom - top].map(|value| value as u32);
    let cropped = TypedCroppedImage::from_ref(&image, x, y, w, h).expect("a region inside the image");
    let x = region.left - left + inside[0];
    let y = region.top - top + inside[1];
    let options = options.crop(x, y, inside[2].min(f64::from(w) - x), inside[3].min(f64::from(h) - y));
    let mut out = TypedImage::<P>::from_buffer(size[0], size[1], out).expect("a buffer of the output's size");
    RESIZER
        .with_borrow_mut(|resizer| resizer.resize_typed(&cropped, &mut out, &options))
        .expect("a box inside the region");
}
