//! Channels and bits as stored → as wanted.

use super::{corrupt, fit};
use crate::fault::Result;
use image::ColorType;

/// ITU-R 601 luma in Pillow's integers (`convert("L")`), in place: [.., 3] → [.., 1].
pub fn rgb_to_grey(pixels: &mut Vec<u8>) {
    let count = pixels.len() / 3;
    for at in 0..count {
        pixels[at] = luma([pixels[3 * at], pixels[3 * at + 1], pixels[3 * at + 2]]);
    }
    pixels.truncate(count);
}

fn luma([red, green, blue]: [u8; 3]) -> u8 {
    ((u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000) >> 16) as u8
}

/// CMYK as JPEG files store it (255 − ink, Adobe's way) → RGB in Pillow's integers, in place: [.., 4] → [.., 3].
pub fn ink_to_rgb(pixels: &mut Vec<u8>) {
    let count = pixels.len() / 4;
    for at in 0..count {
        let paper = u32::from(pixels[4 * at + 3]);
        for channel in 0..3 {
            let ink = 255 - u32::from(pixels[4 * at + channel]);
            let product = ink * paper + 128;
            let covered = ((product >> 8) + product) >> 8;
            pixels[3 * at + channel] = (paper - covered) as u8;
        }
    }
    pixels.truncate(3 * count);
}

/// Whether pixels of this kind are already what is wanted.
pub fn fits(kind: ColorType, channels: u32) -> bool {
    matches!((kind, channels), (ColorType::L8, 1) | (ColorType::Rgb8, 3))
}

/// Interleaved samples of 8 or 16 bits (in this machine's order), with or without alpha → [.., channels], 8 bits.
pub fn convert(raw: &[u8], kind: ColorType, channels: u32, out: &mut Vec<u8>) -> Result<()> {
    let (samples, wide) = match kind {
        ColorType::L8 => (1, false),
        ColorType::La8 => (2, false),
        ColorType::Rgb8 => (3, false),
        ColorType::Rgba8 => (4, false),
        ColorType::L16 => (1, true),
        ColorType::La16 => (2, true),
        ColorType::Rgb16 => (3, true),
        ColorType::Rgba16 => (4, true),
        other => return Err(corrupt(format!("samples of kind {other:?}"))),
    };
    let width = samples * (1 + usize::from(wide));
    // 65,535 is 255 times 257.
    let narrow = |two: &[u8]| ((u32::from(u16::from_ne_bytes([two[0], two[1]])) + 128) / 257) as u8;
    let sample = |pixel: &[u8], at: usize| if wide { narrow(&pixel[2 * at..]) } else { pixel[at] };
    fit(out, raw.len() / width * channels as usize);
    let pixels = raw.chunks_exact(width).zip(out.chunks_exact_mut(channels as usize));
    match (samples >= 3, channels) {
        (true, 3) => pixels.for_each(|(from, to)| to.copy_from_slice(&[0, 1, 2].map(|at| sample(from, at)))),
        (true, _) => pixels.for_each(|(from, to)| to[0] = luma([0, 1, 2].map(|at| sample(from, at)))),
        (false, _) => pixels.for_each(|(from, to)| to.fill(sample(from, 0))),
    }
    Ok(())
}
