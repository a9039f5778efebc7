//! Gaussian blur, as torchvision's `gaussian_blur` on 8-bit tensors.

/// Blurs an image [Y, X, C] with a normalized Gaussian of standard deviation `sigma`, truncated to `kernel` (odd)
/// pixels a side. The border is reflected without repeating the edge pixel, repeatedly where the kernel is wider than
/// the image (torchvision refuses such a kernel). Sums are 32-bit floats, rounded to nearest, halves to even.
/// torchvision sums the 2-D kernel at once, this function rows and then columns: values at a half may differ by 1.
pub fn gaussian_blur(
    pixels: &mut [u8],
    [height, width, channels]: [usize; 3],
    kernel: usize,
    sigma: f64,
    scratch: &mut Vec<f32>,
) {
    // Weights beyond six standard deviations vanish in 32 bits.
    let radius = (kernel / 2).min((6.0 * sigma).ceil() as usize);
    let taps = 2 * radius + 1;
    let stride = width * channels;
    let margin = radius * channels;
    scratch.clear();
    scratch.resize(taps + height * stride + stride + 2 * margin, 0.0);
    let (weights, rest) = scratch.split_at_mut(taps);
    let (rows, line) = rest.split_at_mut(height * stride);
    fill_weights(weights, radius, sigma);

    for (source, row) in pixels.chunks_exact(stride).zip(rows.chunks_exact_mut(stride)) {
        for (x, pixel) in line.chunks_exact_mut(channels).enumerate() {
            let from = reflect(x as isize - radius as isize, width) * channels;
            for (value, &old) in pixel.iter_mut().zip(&source[from..from + channels]) {
                *value = f32::from(old);
            }
        }
        for (tap, &weight) in weights.iter().enumerate() {
            add_scaled(row, &line[tap * channels..][..stride], weight);
        }
    }
    let line = &mut line[..stride];
    for (y, row) in pixels.chunks_exact_mut(stride).enumerate() {
        line.fill(0.0);
        for (tap, &weight) in weights.iter().enumerate() {
            let from = reflect(y as isize + tap as isize - radius as isize, height) * stride;
            add_scaled(line, &rows[from..from + stride], weight);
        }
        for (value, &sum) in row.iter_mut().zip(&*line) {
            *value = sum.round_ties_even() as u8;
        }
    }
}

/// Fills `weights` with exp(−x² / 2σ²), normalized.
fn fill_weights(weights: &mut [f32], radius: usize, sigma: f64) {
    let weight = |tap: usize| (-0.5 * ((tap as f64 - radius as f64) / sigma).powi(2)).exp();
    let sum: f64 = (0..weights.len()).map(weight).sum();
    for (tap, value) in weights.iter_mut().enumerate() {
        *value = (weight(tap) / sum) as f32;
    }
}

fn add_scaled(sums: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += weight * value;
    }
}

/// Returns the index that `index` has after reflection about the first and the last of `length` pixels.
fn reflect(index: isize, length: usize) -> usize {
    let period = 2 * (length as isize - 1);
    if period == 0 {
        return 0;
    }
    let index = index.rem_euclid(period);
    index.min(period - index) as usize
}
