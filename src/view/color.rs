//! Brightness, contrast, saturation, hue and grayscale: functions of explicit numbers on 8-bit pixels [Y, X, C], C = 1
//! or 3.
//!
//! Bit-identical to torchvision on a Pillow image (torchvision 0.26, Pillow 13.0): `ImageEnhance` blends the image with
//! a degenerate one in 32-bit floats and truncates the result.

use super::tone;

/// Returns `from` + `factor` · (`to` − `from`), truncated to 0..=255 (`Image.blend`).
pub fn blend(from: u8, to: u8, factor: f32) -> u8 {
    (f32::from(from) + factor * f32::from(i16::from(to) - i16::from(from))) as u8
}

/// Scales brightness (`adjust_brightness`): 0 is black, 1 the identity.
pub fn adjust_brightness(pixels: &mut [u8], factor: f64) {
    tone::apply_curve(pixels, &tone::make_curve(|v| blend(0, v, factor as f32)));
}

/// Scales contrast (`adjust_contrast`): 0 is the image's mean luma everywhere, 1 the identity.
pub fn adjust_contrast(pixels: &mut [u8], channels: usize, factor: f64) {
    let count = pixels.len() / channels;
    let sum: u64 = match channels {
        1 => pixels.iter().map(|&v| u64::from(v)).sum(),
        _ => pixels.chunks_exact(3).map(|pixel| u64::from(luma(pixel))).sum(),
    };
    let mean = (sum as f64 / count as f64 + 0.5) as u8;
    tone::apply_curve(pixels, &tone::make_curve(|v| blend(mean, v, factor as f32)));
}

/// Scales saturation (`adjust_saturation`): 0 is gray, 1 the identity. One channel does not change.
pub fn adjust_saturation(pixels: &mut [u8], channels: usize, factor: f64) {
    if channels == 1 {
        return;
    }
    for pixel in pixels.chunks_exact_mut(3) {
        let gray = luma(pixel);
        for value in pixel {
            *value = blend(gray, *value, factor as f32);
        }
    }
}

/// Converts to grayscale (`rgb_to_grayscale`) and keeps the number of channels.
pub fn to_grayscale(pixels: &mut [u8], channels: usize) {
    if channels == 1 {
        return;
    }
    for pixel in pixels.chunks_exact_mut(3) {
        pixel.fill(luma(pixel));
    }
}

/// Rotates the hue by `turn` of the circle, −0.5 to 0.5 (`adjust_hue`), through Pillow's 8-bit HSV, whose rounding
/// changes pixels even at a turn of 0. One channel does not change.
pub fn adjust_hue(pixels: &mut [u8], channels: usize, turn: f64) {
    if channels == 1 {
        return;
    }
    let shift = (turn * 255.0) as i32 as u8;
    for pixel in pixels.chunks_exact_mut(3) {
        let [hue, saturation, value] = to_hsv([pixel[0], pixel[1], pixel[2]]);
        pixel.copy_from_slice(&from_hsv([hue.wrapping_add(shift), saturation, value]));
    }
}

/// Returns the luma of ITU-R BT.601 in Pillow's 16-bit fixed point (`convert("L")`).
pub fn luma(pixel: &[u8]) -> u8 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
}

/// Converts RGB to hue, saturation and value in 0..=255, in the same mixture of 32- and 64-bit floats as Pillow's
/// `convert("HSV")`.
fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let max = r.max(g).max(b);
    let min = r.min(g).min(b);
    if max == min {
        return [0, 0, max];
    }
    let range = f32::from(max - min);
    let [away_r, away_g, away_b] = [r, g, b].map(|v| f32::from(max - v) / range);
    let sixths = if r == max {
        f64::from(away_b - away_g)
    } else if g == max {
        2.0 + f64::from(away_r) - f64::from(away_b)
    } else {
        4.0 + f64::from(away_g) - f64::from(away_r)
    };
    let turn = f64::from(sixths as f32) / 6.0 + 1.0;
    let hue = (if turn < 1.0 { turn } else { turn - 1.0 }) as f32;
    let saturation = range / f32::from(max);
    [(f64::from(hue) * 255.0) as u8, (f64::from(saturation) * 255.0) as u8, max]
}

/// Converts HSV back to RGB, as Pillow does.
fn from_hsv([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    if saturation == 0 {
        return [value; 3];
    }
    let sixths = f64::from(hue) * 6.0 / 255.0;
    let sector = sixths.floor();
    let fraction = (sixths - sector) as f32;
    let saturation = (f64::from(saturation) / 255.0) as f32;
    let scaled = |factor: f64| (f64::from(value) * factor).round() as u8;
    let p = scaled(1.0 - f64::from(saturation));
    let q = scaled(1.0 - f64::from(saturation * fraction));
    let t = scaled(1.0 - f64::from(saturation) * (1.0 - f64::from(fraction)));
    match sector as u8 % 6 {
        0 => [value, t, p],
        1 => [q, value, p],
        2 => [p, value, t],
        3 => [p, q, value],
        4 => [t, p, value],
        _ => [value, p, q],
    }
}
