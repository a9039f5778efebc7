//! Sharpness, as Pillow's `ImageEnhance.Sharpness`.

use super::colour::blend;

/// Blends the picture with its smoothed form: 0 is smooth, 1 leaves it as it is, more sharpens. The 3 × 3 kernel is
/// Pillow's `SMOOTH` (1/13, the centre 5/13); the outermost pixels stay. `scratch` keeps the picture as it was.
pub fn sharpness(pixels: &mut [u8], [height, width, channels]: [usize; 3], factor: f64, scratch: &mut Vec<u8>) {
    scratch.clear();
    scratch.extend_from_slice(pixels);
    let stride = width * channels;
    for y in 1..height.saturating_sub(1) {
        for at in y * stride + channels..((y + 1) * stride).saturating_sub(channels) {
            let row = |at: usize| {
                u32::from(scratch[at - channels]) + u32::from(scratch[at]) + u32::from(scratch[at + channels])
            };
            let old = scratch[at];
            let sum = row(at - stride) + row(at) + row(at + stride) + 4 * u32::from(old);
            // To the nearest; a thirteenth never lies halfway.
            pixels[at] = blend(((2 * sum + 13) / 26) as u8, old, factor as f32);
        }
    }
}
