//! Which part of a picture a view shows, and how it is brought to the model's size.
//!
//! `RandomResizedCrop` as torchvision draws it (Szegedy et al., "Going deeper with convolutions", 2015), with the
//! numbers taken from the sample's own stream. The resize is Pillow's: antialiased, on 8-bit pixels, seeing nothing
//! outside the region.

use crate::data::decode::{Decoded, Part, Region};
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

/// Evaluation's box: what remains of the picture, resized so that it just covers `size / share`, cut to its central
/// `size` [width, height]; as [left, top, width, height] in the pixels of a picture of `width` × `height`. For squares
/// this is torchvision's `Resize(int(size / share))` and `CenterCrop(size)`. Both happen at once, so that a picture of
/// one pixel by thousands costs no more than any other.
pub fn center(width: u32, height: u32, size: [u32; 2], share: f64) -> [f64; 4] {
    let (w, h) = (f64::from(width), f64::from(height));
    let size = size.map(f64::from);
    let [cover_w, cover_h] = size.map(|side| (side / share).floor());
    let (new_w, new_h) = if cover_h * w >= cover_w * h {
        ((cover_h * w / h).floor(), cover_h)
    } else {
        (cover_w, (cover_w * h / w).floor())
    };
    let left = ((new_w - size[0]) / 2.0).round_ties_even();
    let top = ((new_h - size[1]) / 2.0).round_ties_even();
    let (x, y) = (w / new_w, h / new_h);
    // Rounding may carry the far edge past the picture by a part of 10¹⁶; the resizer would refuse that.
    [left * x, top * y, (size[0] * x).min(w - left * x), (size[1] * y).min(h - top * y)]
}

impl Interpolation {
    /// Pixels of a source that a resize of `from` to `to` pixels sees beyond the source's ends.
    fn support(self, from: f64, to: u32) -> f64 {
        let reach = match self {
            Interpolation::Bicubic => 2.0,
            Interpolation::Bilinear => 1.0,
        };
        reach * (from / f64::from(to)).max(1.0)
    }

    /// The whole pixels of a picture of `width` × `height` that a resize of this box to `size` depends on.
    pub fn sees(self, [left, top, w, h]: [f64; 4], size: [u32; 2], width: u32, height: u32) -> Region {
        // One more, against rounding.
        let (x, y) = (self.support(w, size[0]) + 1.0, self.support(h, size[1]) + 1.0);
        let from = |at: f64| at.floor().max(0.0) as u32;
        let to = |at: f64, end: u32| (at.ceil() as u32).min(end);
        let (first, above) = (from(left - x), from(top - y));
        let (last, below) = (to(left + w + x, width), to(top + h + y, height));
        Region { left: first, top: above, width: last - first, height: below - above }
    }
}

/// The part, and nothing around it, resized to `size` [width, height] into `out`, [height, width, channels].
pub fn resize(part: &Part, size: [u32; 2], how: Interpolation, out: &mut [u8]) {
    resize_box(part, [0.0, 0.0, part.width, part.height], size, how, out);
}

/// A box [left, top, width, height] of the part, which sees as much of the part around it as the kernel reaches.
pub fn resize_box(part: &Part, inside: [f64; 4], size: [u32; 2], how: Interpolation, out: &mut [u8]) {
    let filter = match how {
        Interpolation::Bicubic => FilterType::CatmullRom,
        Interpolation::Bilinear => FilterType::Bilinear,
    };
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    // The typed face of the resizer: its other one compiles every kernel for sixteen kinds of pixel.
    match part.image.channels {
        1 => typed::<U8>(part, inside, size, out, &options),
        _ => typed::<U8x3>(part, inside, size, out, &options),
    }
}

fn typed<P: PixelTrait>(part: &Part, inside: [f64; 4], size: [u32; 2], out: &mut [u8], options: &ResizeOptions) {
    // The resizer keeps its scratch between pictures; one for each thread of the feed.
    thread_local!(static RESIZER: RefCell<Resizer> = RefCell::new(Resizer::new()));
    let Decoded { width, height, ref pixels, .. } = *part.image;
    let whole = TypedImageRef::<P>::from_buffer(width, height, pixels).expect("whole pixels");
    // Nothing outside the part is seen, but for the rest of a pixel that its border divides.
    let (left, top) = (part.left.floor(), part.top.floor());
    let right = (part.left + part.width).ceil().min(f64::from(width));
    let bottom = (part.top + part.height).ceil().min(f64::from(height));
    let [x, y, w, h] = [left, top, right - left, bottom - top].map(|value| value as u32);
    let view = TypedCroppedImage::from_ref(&whole, x, y, w, h).expect("a part inside the picture");
    let (x, y) = (part.left - left + inside[0], part.top - top + inside[1]);
    let options = options.crop(x, y, inside[2].min(f64::from(w) - x), inside[3].min(f64::from(h) - y));
    let mut out = TypedImage::<P>::from_buffer(size[0], size[1], out).expect("as many pixels as the size says");
    RESIZER.with_borrow_mut(|resizer| resizer.resize_typed(&view, &mut out, &options)).expect("a box inside the part");
}
