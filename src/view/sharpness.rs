//! Sharpness, as Pillow's `ImageEnhance.Sharpness`.

use super::color::blend;

/// Blends an image [Y, X, C] with its smoothed form: factor 0 is smooth, 1 the identity, and more sharpens. The 3 × 3
/// kernel is Pillow's `SMOOTH` (1/13, 5/13 in the center); border pixels do not change. `scratch` holds the original.
pub fn adjust_sharpness(pixels: &mut [u8], [height, width, channels]: [usize; 3], factor: f64, scratch: &mut Vec<u8>) {
    scratch.clear();
    scratch.extend_from_slice(pixels);
    let stride = width * channels;
    let row_sum =
        |at: usize| u32::from(scratch[at - channels]) + u32::from(scratch[at]) + u32::from(scratch[at + channels]);
    for y in 1..height.saturating_sub(1) {
        for index in y * stride + channels..((y + 1) * stride).saturating_sub(channels) {
            let old = scratch[index];
            let sum = row_sum(index - stride) + row_sum(index) + row_sum(index + stride) + 4 * u32::from(old);
            // Rounds to nearest; a multiple of 1/13 is never halfway.
            pixels[index] = blend(((2 * sum + 13) / 26) as u8, old, factor as f32);
        }
    }
}
