//! Conversion of channels and bit depth.

use super::{corrupt_image, resize_buffer};
use crate::error::Result;
use image::ColorType;

/// Converts RGB to grayscale in place, [.., 3] → [.., 1]: ITU-R 601 luma with Pillow's integers (`convert("L")`).
pub fn rgb_to_gray(pixels: &mut Vec<u8>) {
    let count = pixels.len() / 3;
    for index in 0..count {
        pixels[index] = luma([pixels[3 * index], pixels[3 * index + 1], pixels[3 * index + 2]]);
    }
    pixels.truncate(count);
}

fn luma([red, green, blue]: [u8; 3]) -> u8 {
    ((u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000) >> 16) as u8
}

/// Converts CMYK as stored in JPEG files (inverted, by Adobe's convention) to RGB in place with Pillow's integers,
/// [.., 4] → [.., 3].
pub fn cmyk_to_rgb(pixels: &mut Vec<u8>) {
    let count = pixels.len() / 4;
    for index in 0..count {
        let inverted_black = u32::from(pixels[4 * index + 3]);
        for channel in 0..3 {
            let ink = 255 - u32::from(pixels[4 * index + channel]);
            let product = ink * inverted_black + 128;
            let covered = ((product >> 8) + product) >> 8;
            pixels[3 * index + channel] = (inverted_black - covered) as u8;
        }
    }
    pixels.truncate(3 * count);
}

/// Returns whether pixels of this type need no conversion.
pub fn is_output_format(color_type: ColorType, channels: u32) -> bool {
    matches!((color_type, channels), (ColorType::L8, 1) | (ColorType::Rgb8, 3))
}

/// Converts interleaved values of 8 or 16 bits (native byte order), with or without alpha, to [.., channels] of 8 bits.
pub fn convert(raw: &[u8], color_type: ColorType, channels: u32, out: &mut Vec<u8>) -> Result<()> {
    let (stored_channels, is_wide) = match color_type {
        ColorType::L8 => (1, false),
        ColorType::La8 => (2, false),
        ColorType::Rgb8 => (3, false),
        ColorType::Rgba8 => (4, false),
        ColorType::L16 => (1, true),
        ColorType::La16 => (2, true),
        ColorType::Rgb16 => (3, true),
        ColorType::Rgba16 => (4, true),
        other => return Err(corrupt_image(format!("pixels of type {other:?}"))),
    };
    let pixel_bytes = stored_channels * (1 + usize::from(is_wide));
    let value = |pixel: &[u8], channel: usize| if is_wide { narrow(&pixel[2 * channel..]) } else { pixel[channel] };
    resize_buffer(out, raw.len() / pixel_bytes * channels as usize);
    let pixels = raw.chunks_exact(pixel_bytes).zip(out.chunks_exact_mut(channels as usize));
    if stored_channels < 3 {
        pixels.for_each(|(from, to)| to.fill(value(from, 0)));
    } else if channels == 3 {
        pixels.for_each(|(from, to)| to.copy_from_slice(&[0, 1, 2].map(|channel| value(from, channel))));
    } else {
        pixels.for_each(|(from, to)| to[0] = luma([0, 1, 2].map(|channel| value(from, channel))));
    }
    Ok(())
}

/// Rounds 16 bits to 8; 65,535 is 255 times 257.
fn narrow(two: &[u8]) -> u8 {
    ((u32::from(u16::from_ne_bytes([two[0], two[1]])) + 128) / 257) as u8
}
