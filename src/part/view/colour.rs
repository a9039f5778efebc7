//! Brightness, contrast, saturation, hue, grey: functions of explicit numbers on 8-bit pixels [Y, X, C], C = 1 or 3.
//!
//! Bit for bit what torchvision does to a Pillow picture (torchvision 0.26, Pillow 13.0): `ImageEnhance` blends the
//! picture with a degenerate one in 32-bit floats and cuts the result towards zero.

use super::tone;

/// `Image.blend`: `from` + `factor` · (`to` − `from`), cut towards zero and to 0..=255.
pub fn blend(from: u8, to: u8, factor: f32) -> u8 {
    (f32::from(from) + factor * f32::from(i16::from(to) - i16::from(from))) as u8
}

/// `adjust_brightness`: 0 is black, 1 leaves the picture as it is.
pub fn brightness(pixels: &mut [u8], factor: f64) {
    tone::map(pixels, &tone::curve(|v| blend(0, v, factor as f32)));
}

/// `adjust_contrast`: 0 is the picture's mean luma everywhere, 1 leaves it as it is.
pub fn contrast(pixels: &mut [u8], channels: usize, factor: f64) {
    let count = pixels.len() / channels;
    let sum: u64 = match channels {
        1 => pixels.iter().map(|&v| u64::from(v)).sum(),
        _ => pixels.chunks_exact(3).map(|pixel| u64::from(luma(pixel))).sum(),
    };
    let mean = (sum as f64 / count as f64 + 0.5) as u8;
    tone::map(pixels, &tone::curve(|v| blend(mean, v, factor as f32)));
}

/// `adjust_saturation`: 0 is grey, 1 leaves the picture as it is; so does one channel.
pub fn saturation(pixels: &mut [u8], channels: usize, factor: f64) {
    if channels == 1 {
        return;
    }
    for pixel in pixels.chunks_exact_mut(3) {
        let grey = luma(pixel);
        for value in pixel {
            *value = blend(grey, *value, factor as f32);
        }
    }
}

/// `rgb_to_grayscale` with as many channels as before.
pub fn grey(pixels: &mut [u8], channels: usize) {
    if channels == 1 {
        return;
    }
    for pixel in pixels.chunks_exact_mut(3) {
        pixel.fill(luma(pixel));
    }
}

/// `adjust_hue`: turns the hue by `turn` of the circle, −0.5 to 0.5, through Pillow's 8-bit HSV, which even a turn of 0
/// rounds; one channel has no hue.
pub fn hue(pixels: &mut [u8], channels: usize, turn: f64) {
    if channels == 1 {
        return;
    }
    let shift = (turn * 255.0) as i32 as u8;
    for pixel in pixels.chunks_exact_mut(3) {
        let [hue, saturation, value] = to_hsv([pixel[0], pixel[1], pixel[2]]);
        pixel.copy_from_slice(&from_hsv([hue.wrapping_add(shift), saturation, value]));
    }
}

/// Luma of ITU-R BT.601 in Pillow's 16-bit fixed point (`convert("L")`).
pub fn luma(pixel: &[u8]) -> u8 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
}

/// Pillow's `convert("HSV")`: hue, saturation and value in 0..=255, in its mixture of 32- and 64-bit floats.
fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    if most == least {
        return [0, 0, most];
    }
    let range = f32::from(most - least);
    let [away_r, away_g, away_b] = [r, g, b].map(|v| f32::from(most - v) / range);
    let sixths = if r == most {
        f64::from(away_b - away_g)
    } else if g == most {
        2.0 + f64::from(away_r) - f64::from(away_b)
    } else {
        4.0 + f64::from(away_g) - f64::from(away_r)
    };
    let turn = f64::from(sixths as f32) / 6.0 + 1.0;
    let hue = (if turn < 1.0 { turn } else { turn - 1.0 }) as f32;
    let saturation = range / f32::from(most);
    [(f64::from(hue) * 255.0) as u8, (f64::from(saturation) * 255.0) as u8, most]
}

/// Pillow's way back from HSV, likewise.
fn from_hsv([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    if saturation == 0 {
        return [value; 3];
    }
    let sixths = f64::from(hue) * 6.0 / 255.0;
    let sector = sixths.floor();
    let rest = (sixths - sector) as f32;
    let share = (f64::from(saturation) / 255.0) as f32;
    let part = |left: f64| (f64::from(value) * left).round() as u8;
    let p = part(1.0 - f64::from(share));
    let q = part(1.0 - f64::from(share * rest));
    let t = part(1.0 - f64::from(share) * (1.0 - f64::from(rest)));
    match sector as u8 % 6 {
        0 => [value, t, p],
        1 => [q, value, p],
        2 => [p, value, t],
        3 => [p, q, value],
        4 => [t, p, value],
        _ => [value, p, q],
    }
}
