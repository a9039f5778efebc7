//! Affine transforms of an image, bit-identical to Pillow's `Image.transform(AFFINE)` and `Image.rotate`.

use super::crop::Interpolation;

/// (a, b, c, d, e, f): the output pixel at (x, y) shows the input at (ax + by + c, dx + ey + f); pixel centers are at
/// halves.
pub type Matrix = [f64; 6];

/// Returns a horizontal shear.
pub fn shear_x(factor: f64) -> Matrix {
    [1.0, factor, 0.0, 0.0, 1.0, 0.0]
}

/// Returns a vertical shear.
pub fn shear_y(factor: f64) -> Matrix {
    [1.0, 0.0, 0.0, factor, 1.0, 0.0]
}

/// Returns a translation by `x` pixels to the left and `y` up.
pub fn translate(x: f64, y: f64) -> Matrix {
    [1.0, 0.0, x, 0.0, 1.0, y]
}

/// Returns a counter-clockwise rotation about the center, with Pillow's rounding of sine and cosine to 15 decimals.
pub fn rotate(width: usize, height: usize, degrees: f64) -> Matrix {
    let angle = -degrees.rem_euclid(360.0).to_radians();
    let a = round_15_decimals(angle.cos());
    let b = round_15_decimals(angle.sin());
    let d = round_15_decimals(-angle.sin());
    let x = width as f64 / 2.0;
    let y = height as f64 / 2.0;
    [a, b, (a * -x + b * -y) + x, d, a, (d * -x + a * -y) + y]
}

fn round_15_decimals(value: f64) -> f64 {
    let scaled = value * 1e15;
    // The rounding error of the product decides where the product looks like a half, as it does at 45 degrees.
    let error = value.mul_add(1e15, -scaled);
    let floor = scaled.floor();
    (if (scaled - floor - 0.5) + error > 0.0 { floor + 1.0 } else { floor }) / 1e15
}

/// Transforms an image [Y, X, C], C = 1 or 3; `fill` (C values) is the color outside the input. `scratch` holds the
/// input.
pub fn apply_affine(
    pixels: &mut [u8],
    shape: [usize; 3],
    matrix: &Matrix,
    fill: &[u8],
    interpolation: Interpolation,
    scratch: &mut Vec<u8>,
) {
    scratch.clear();
    scratch.extend_from_slice(pixels);
    match shape[2] {
        1 => transform::<1>(pixels, scratch, shape, matrix, fill, interpolation),
        _ => transform::<3>(pixels, scratch, shape, matrix, fill, interpolation),
    }
}

fn transform<const C: usize>(
    pixels: &mut [u8],
    input: &[u8],
    [height, width, _]: [usize; 3],
    &[a, b, c, d, e, f]: &Matrix,
    fill: &[u8],
    interpolation: Interpolation,
) {
    let size = [width, height];
    for (row, y) in pixels.chunks_exact_mut(width * C).zip(0..) {
        let y = f64::from(y) + 0.5;
        for (pixel, x) in row.chunks_exact_mut(C).zip(0..) {
            let x = f64::from(x) + 0.5;
            let point = [a * x + b * y + c, d * x + e * y + f];
            if !(0..2).all(|axis| point[axis] >= 0.0 && point[axis] < size[axis] as f64) {
                pixel.copy_from_slice(fill);
                continue;
            }
            match interpolation {
                Interpolation::Bilinear => bilinear::<C>(pixel, input, size, point),
                Interpolation::Bicubic => bicubic::<C>(pixel, input, size, point),
            }
        }
    }
}

/// Returns the indices of the N pixels around a coordinate, `before` of them left of the nearest pixel center on the
/// left, clamped to the image, and the distance from that center.
fn neighbors<const N: usize>(coordinate: f64, before: i64, length: usize) -> ([usize; N], f64) {
    let coordinate = coordinate - 0.5;
    // Equals floor: a point inside the image is at most half a pixel before the first center.
    let first = if coordinate < 0.0 { -1 } else { coordinate as i64 };
    let index = |offset: usize| (first - before + offset as i64).clamp(0, length as i64 - 1) as usize;
    (std::array::from_fn(index), coordinate - first as f64)
}

/// Returns the pixels `xs` of a row, as floats.
fn gather<const C: usize, const N: usize>(row: &[u8], xs: [usize; N]) -> [[f64; C]; N] {
    xs.map(|x| {
        let pixel: &[u8; C] = row[x * C..][..C].try_into().expect("C values");
        pixel.map(f64::from)
    })
}

fn bilinear<const C: usize>(pixel: &mut [u8], input: &[u8], [width, height]: [usize; 2], point: [f64; 2]) {
    let (xs, dx) = neighbors::<2>(point[0], 0, width);
    let (ys, dy) = neighbors::<2>(point[1], 0, height);
    let linear = |[a, b]: [[f64; C]; 2], d: f64| -> [f64; C] { std::array::from_fn(|c| a[c] + (b[c] - a[c]) * d) };
    let rows = ys.map(|y| linear(gather(&input[y * width * C..][..width * C], xs), dx));
    pixel.copy_from_slice(&linear(rows, dy).map(|value| value as u8));
}

/// Interpolates with Keys' cubic, a = −1, which Pillow uses for transforms (its resize has −0.5).
fn bicubic<const C: usize>(pixel: &mut [u8], input: &[u8], [width, height]: [usize; 2], point: [f64; 2]) {
    let (xs, dx) = neighbors::<4>(point[0], 1, width);
    let (ys, dy) = neighbors::<4>(point[1], 1, height);
    let cubic = |[p, q, r, s]: [[f64; C]; 4], t: f64| -> [f64; C] {
        std::array::from_fn(|c| {
            let [p, q, r, s] = [p[c], q[c], r[c], s[c]];
            let slope = -p + r;
            let square = 2.0 * (p - q) + r - s;
            let cube = -p + q - r + s;
            q + t * (slope + t * (square + t * cube))
        })
    };
    let rows = ys.map(|y| cubic(gather(&input[y * width * C..][..width * C], xs), dx));
    pixel.copy_from_slice(&cubic(rows, dy).map(|value| value as u8));
}
