//! Bytes of a member become pixels: JPEG, PNG and WebP, told apart by their first bytes.
//!
//! Upright as the camera's EXIF entry says; 16 bits scaled to 8; alpha dropped and grey made as Pillow's `convert`
//! does. Sizes are checked on the header, before anything of that size is allocated. Pixels of a JPEG differ from
//! libjpeg's by rounding, more where colour is subsampled.

use super::complete::complete;
use crate::fault::{Code, Fault, Result};
use image::{DynamicImage, ImageDecoder, ImageReader};
use std::io::Cursor;

/// One decoded sample before its view: 8-bit pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    pub width: u32,
    pub height: u32,
    /// Channels interleaved: [height, width, channels].
    pub channels: u32,
    pub pixels: Vec<u8>,
}

/// What a picture may cost; all inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file.
    pub max_bytes: usize,
    /// Pixels of a side.
    pub max_side: u32,
    /// Pixels of the picture.
    pub max_pixels: u64,
}

impl Default for Limits {
    /// 64 MiB, 16,384 pixels a side, 50 million pixels.
    fn default() -> Self {
        Limits { max_bytes: 64 << 20, max_side: 1 << 14, max_pixels: 50_000_000 }
    }
}

/// Decodes a picture to 1 (grey) or 3 (red, green, blue) channels. Faults with Code::Corrupt on anything that is not
/// a whole picture within the limits.
pub fn decode(bytes: &[u8], channels: u32, limits: &Limits) -> Result<Decoded> {
    assert!(channels == 1 || channels == 3, "{channels} channels");
    let mut decoder = open(bytes, limits)?;
    let orientation = decoder.orientation().map_err(corrupt)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(corrupt)?;
    image.apply_orientation(orientation);
    let (width, height) = (image.width(), image.height());
    let pixels = if channels == 1 { grey(image) } else { image.into_rgb8().into_raw() };
    Ok(Decoded { width, height, channels, pixels })
}

/// Reads the header alone: width and height as stored, once the file is whole and within the limits.
pub fn probe(bytes: &[u8], limits: &Limits) -> Result<(u32, u32)> {
    Ok(open(bytes, limits)?.dimensions())
}

fn open<'a>(bytes: &'a [u8], limits: &Limits) -> Result<impl ImageDecoder + 'a> {
    if bytes.len() > limits.max_bytes {
        return Err(corrupt(format!("{} bytes, the limit is {}", bytes.len(), limits.max_bytes)));
    }
    match complete(bytes) {
        None => return Err(corrupt("neither JPEG, PNG nor WebP")),
        Some(false) => return Err(corrupt("the file was cut before the end of the picture")),
        Some(true) => {}
    }
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(corrupt)?;
    let mut caps = image::Limits::default();
    caps.max_image_width = Some(limits.max_side);
    caps.max_image_height = Some(limits.max_side);
    // 16 bits of four channels is the widest pixel there is; as much again for what the decoder keeps beside it.
    caps.max_alloc = Some(limits.max_pixels.saturating_mul(16));
    reader.limits(caps);
    let decoder = reader.into_decoder().map_err(corrupt)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 || width.max(height) > limits.max_side {
        return Err(corrupt(format!("{width}x{height} pixels, a side may have {}", limits.max_side)));
    }
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(corrupt(format!("{width}x{height} pixels, the limit is {} in all", limits.max_pixels)));
    }
    Ok(decoder)
}

/// ITU-R 601 luma in Pillow's integers; a picture that is grey already stays as it is.
fn grey(image: DynamicImage) -> Vec<u8> {
    if !image.color().has_color() {
        return image.into_luma8().into_raw();
    }
    let rgb = image.into_rgb8();
    let luma = |p: &[u8]| u32::from(p[0]) * 19595 + u32::from(p[1]) * 38470 + u32::from(p[2]) * 7471 + 0x8000;
    rgb.as_raw().chunks_exact(3).map(|pixel| (luma(pixel) >> 16) as u8).collect()
}

fn corrupt(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Corrupt, format!("not a picture that can be decoded: {why}"))
}
