//! Gaussian blur, as torchvision's `gaussian_blur` on 8-bit tensors.

/// Blurs [Y, X, C] with a Gaussian of deviation `sigma`, cut to `kernel` (odd) pixels a side and normalised; the picture
/// is mirrored at its edges without repeating them, as often as the kernel reaches (torchvision refuses a kernel that
/// reaches further than once). Sums are 32-bit floats, rounded to the nearest, halves to even. torchvision sums the
/// kernel's square at once and this its rows, then its columns: values at a half may differ by 1.
pub fn gaussian(
    pixels: &mut [u8],
    [height, width, channels]: [usize; 3],
    kernel: usize,
    sigma: f64,
    scratch: &mut Vec<f32>,
) {
    // Beyond six deviations nothing is left in 32 bits.
    let reach = (kernel / 2).min((6.0 * sigma).ceil() as usize);
    let (taps, stride, margin) = (2 * reach + 1, width * channels, reach * channels);
    scratch.clear();
    scratch.resize(taps + height * stride + stride + 2 * margin, 0.0);
    let (weights, rest) = scratch.split_at_mut(taps);
    let (rows, line) = rest.split_at_mut(height * stride);
    fill(weights, reach, sigma);

    for (source, row) in pixels.chunks_exact(stride).zip(rows.chunks_exact_mut(stride)) {
        for (x, pixel) in line.chunks_exact_mut(channels).enumerate() {
            let from = mirrored(x as isize - reach as isize, width) * channels;
            for (value, &old) in pixel.iter_mut().zip(&source[from..from + channels]) {
                *value = f32::from(old);
            }
        }
        for (tap, &weight) in weights.iter().enumerate() {
            add(row, &line[tap * channels..][..stride], weight);
        }
    }
    let line = &mut line[..stride];
    for (y, row) in pixels.chunks_exact_mut(stride).enumerate() {
        line.fill(0.0);
        for (tap, &weight) in weights.iter().enumerate() {
            let from = mirrored(y as isize + tap as isize - reach as isize, height) * stride;
            add(line, &rows[from..from + stride], weight);
        }
        for (value, &sum) in row.iter_mut().zip(&*line) {
            *value = sum.round_ties_even() as u8;
        }
    }
}

/// exp(−x² / 2σ²), normalised.
fn fill(weights: &mut [f32], reach: usize, sigma: f64) {
    let weight = |tap: usize| (-0.5 * ((tap as f64 - reach as f64) / sigma).powi(2)).exp();
    let sum: f64 = (0..weights.len()).map(weight).sum();
    for (tap, value) in weights.iter_mut().enumerate() {
        *value = (weight(tap) / sum) as f32;
    }
}

fn add(sums: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += weight * value;
    }
}

/// Where `at` lies once a line of `length` is mirrored about its first and its last pixel.
fn mirrored(at: isize, length: usize) -> usize {
    let period = 2 * (length as isize - 1);
    if period == 0 {
        return 0;
    }
    let at = at.rem_euclid(period);
    at.min(period - at) as usize
}
