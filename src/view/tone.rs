//! Tone curves: each new value depends on the old value alone, or on the old value and the channel's histogram.
//!
//! Bit-identical to Pillow's `ImageOps` (13.0), which timm's RandAugment and torchvision call. Pixels are 8-bit [Y, X,
//! C].

/// The new value of each of the 256 values.
pub type ToneCurve = [u8; 256];

/// Applies a curve to every value.
pub fn apply_curve(pixels: &mut [u8], curve: &ToneCurve) {
    for value in pixels {
        *value = curve[usize::from(*value)];
    }
}

/// Tabulates a formula as a curve.
pub fn make_curve(formula: impl Fn(u8) -> u8) -> ToneCurve {
    std::array::from_fn(|value| formula(value as u8))
}

/// Inverts the values from `threshold` on (`ImageOps.solarize`); 256 is the identity.
pub fn solarize(pixels: &mut [u8], threshold: u16) {
    apply_curve(pixels, &make_curve(|v| if u16::from(v) < threshold { v } else { 255 - v }));
}

/// Adds `add` to values below 128 (timm's `solarize_add`).
pub fn solarize_add(pixels: &mut [u8], add: u8) {
    apply_curve(pixels, &make_curve(|v| if v < 128 { v.saturating_add(add) } else { v }));
}

/// Keeps the highest `bits` of each value (`ImageOps.posterize`). 0 bits give black: timm's level 10 asks for them, and
/// Pillow 13 refuses them.
pub fn posterize(pixels: &mut [u8], bits: u32) {
    let mask = !(0xffu32 >> bits.min(8)) as u8;
    apply_curve(pixels, &make_curve(|v| v & mask));
}

/// Inverts all values (`ImageOps.invert`).
pub fn invert(pixels: &mut [u8]) {
    apply_curve(pixels, &make_curve(|v| 255 - v));
}

/// Stretches each channel so that its minimum becomes 0 and its maximum 255 (`ImageOps.autocontrast` without cut-off).
pub fn auto_contrast(pixels: &mut [u8], channels: usize) {
    apply_by_histogram(pixels, channels, |histogram| {
        let low = histogram.iter().position(|&count| count > 0)?;
        let high = histogram.iter().rposition(|&count| count > 0)?;
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        // `as` truncates and saturates at 0 and 255, as Pillow does.
        (high > low).then(|| make_curve(|v| (f64::from(v) * scale + offset) as u8))
    });
}

/// Equalizes each channel's histogram in Pillow's integers (`ImageOps.equalize`).
pub fn equalize(pixels: &mut [u8], channels: usize) {
    apply_by_histogram(pixels, channels, |histogram| {
        let last = *histogram.iter().rfind(|&&count| count > 0)?;
        // A channel of one value has step 0 as well.
        let step = (histogram.iter().sum::<u32>() - last) / 255;
        let mut below = step / 2;
        (step > 0).then(|| {
            histogram.map(|count| {
                let value = (below / step).min(255) as u8;
                below += count;
                value
            })
        })
    });
}

/// Applies to each channel the curve that `make` returns for its histogram; None is the identity.
fn apply_by_histogram(pixels: &mut [u8], channels: usize, make: impl Fn(&[u32; 256]) -> Option<ToneCurve>) {
    for channel in 0..channels {
        let mut histogram = [0; 256];
        for &value in pixels.iter().skip(channel).step_by(channels) {
            histogram[usize::from(value)] += 1;
        }
        if let Some(curve) = make(&histogram) {
            for value in pixels.iter_mut().skip(channel).step_by(channels) {
                *value = curve[usize::from(*value)];
            }
        }
    }
}
