//! Tone curves: each new value depends on the old value alone, or on that and the channel's histogram.
//!
//! Bit for bit Pillow's `ImageOps` (13.0), as timm's RandAugment and torchvision call it. Pixels are 8-bit [Y, X, C].

/// A new value for each of the 256.
pub type Curve = [u8; 256];

/// Every value through one curve.
pub fn map(pixels: &mut [u8], curve: &Curve) {
    for value in pixels {
        *value = curve[usize::from(*value)];
    }
}

/// A curve from its formula.
pub fn curve(formula: impl Fn(u8) -> u8) -> Curve {
    std::array::from_fn(|value| formula(value as u8))
}

/// `ImageOps.solarize`: inverts the values from `threshold` on; 256 leaves all as they are.
pub fn solarise(pixels: &mut [u8], threshold: u16) {
    map(pixels, &curve(|v| if u16::from(v) < threshold { v } else { 255 - v }));
}

/// timm's `solarize_add`: values below 128 become lighter by `add`.
pub fn solarise_add(pixels: &mut [u8], add: u8) {
    map(pixels, &curve(|v| if v < 128 { v.saturating_add(add) } else { v }));
}

/// `ImageOps.posterize`: keeps the highest `bits` of each value. Of 0 bits nothing is left but black; timm's
/// level 10 asks for that, and Pillow 13 refuses it.
pub fn posterise(pixels: &mut [u8], bits: u32) {
    let mask = !(0xffu32 >> bits.min(8)) as u8;
    map(pixels, &curve(|v| v & mask));
}

/// `ImageOps.invert`.
pub fn invert(pixels: &mut [u8]) {
    map(pixels, &curve(|v| 255 - v));
}

/// `ImageOps.autocontrast` without cut-off: stretches each channel so that its least value becomes 0 and its greatest
/// 255.
pub fn auto_contrast(pixels: &mut [u8], channels: usize) {
    by_histogram(pixels, channels, |histogram| {
        let low = histogram.iter().position(|&count| count > 0)?;
        let high = histogram.iter().rposition(|&count| count > 0)?;
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        // `as` cuts towards zero and stops at 0 and 255, as Pillow does.
        (high > low).then(|| curve(|v| (f64::from(v) * scale + offset) as u8))
    });
}

/// `ImageOps.equalize`: makes each channel's histogram even, in Pillow's whole numbers.
pub fn equalise(pixels: &mut [u8], channels: usize) {
    by_histogram(pixels, channels, |histogram| {
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

/// Each channel through the curve that `make` finds for its histogram; None leaves the channel alone.
fn by_histogram(pixels: &mut [u8], channels: usize, make: impl Fn(&[u32; 256]) -> Option<Curve>) {
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
