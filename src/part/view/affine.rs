//! Affine maps of a picture, bit for bit Pillow's `Image.transform(AFFINE)` and `Image.rotate`.

use super::crop::Interpolation;

/// (a, b, c, d, e, f): the new pixel at (x, y) shows the old picture at (ax + by + c, dx + ey + f), pixel centres at
/// halves.
pub type Matrix = [f64; 6];

pub fn shear_x(factor: f64) -> Matrix {
    [1.0, factor, 0.0, 0.0, 1.0, 0.0]
}

pub fn shear_y(factor: f64) -> Matrix {
    [1.0, 0.0, 0.0, factor, 1.0, 0.0]
}

/// The picture moves left and up by so many pixels.
pub fn translate(x: f64, y: f64) -> Matrix {
    [1.0, 0.0, x, 0.0, 1.0, y]
}

/// Counter-clockwise about the centre, with Pillow's rounding of sine and cosine to 15 decimals.
pub fn rotate(width: usize, height: usize, degrees: f64) -> Matrix {
    let angle = -degrees.rem_euclid(360.0).to_radians();
    let round = |value: f64| {
        let scaled = value * 1e15;
        // What the product lost decides about what looks like a half: the sine and the cosine of 45 degrees do.
        let lost = value.mul_add(1e15, -scaled);
        let down = scaled.floor();
        (if (scaled - down - 0.5) + lost > 0.0 { down + 1.0 } else { down }) / 1e15
    };
    let (a, b, d) = (round(angle.cos()), round(angle.sin()), round(-angle.sin()));
    let (x, y) = (width as f64 / 2.0, height as f64 / 2.0);
    [a, b, (a * -x + b * -y) + x, d, a, (d * -x + a * -y) + y]
}

/// [Y, X, C] through `matrix`, C = 1 or 3; `fill` (C values) shows where the old picture ends. `scratch` keeps the old
/// one.
pub fn affine(
    pixels: &mut [u8],
    shape: [usize; 3],
    matrix: &Matrix,
    fill: &[u8],
    how: Interpolation,
    scratch: &mut Vec<u8>,
) {
    scratch.clear();
    scratch.extend_from_slice(pixels);
    match shape[2] {
        1 => map::<1>(pixels, scratch, shape, matrix, fill, how),
        _ => map::<3>(pixels, scratch, shape, matrix, fill, how),
    }
}

fn map<const C: usize>(
    pixels: &mut [u8],
    old: &[u8],
    [height, width, _]: [usize; 3],
    &[a, b, c, d, e, f]: &Matrix,
    fill: &[u8],
    how: Interpolation,
) {
    let size = [width, height];
    for (row, y) in pixels.chunks_exact_mut(width * C).zip(0..) {
        let y = f64::from(y) + 0.5;
        for (pixel, x) in row.chunks_exact_mut(C).zip(0..) {
            let x = f64::from(x) + 0.5;
            let at = [a * x + b * y + c, d * x + e * y + f];
            if !(0..2).all(|axis| at[axis] >= 0.0 && at[axis] < size[axis] as f64) {
                pixel.copy_from_slice(fill);
                continue;
            }
            match how {
                Interpolation::Bilinear => bilinear::<C>(pixel, old, size, at),
                Interpolation::Bicubic => bicubic::<C>(pixel, old, size, at),
            }
        }
    }
}

/// The pixels that a point lies between, from `before` left of it on, each inside the picture, and how far it lies past
/// the one to its left.
fn around<const N: usize>(at: f64, before: i64, length: usize) -> ([usize; N], f64) {
    let at = at - 0.5;
    let first = at.floor();
    let index = |offset: usize| (first as i64 - before + offset as i64).clamp(0, length as i64 - 1) as usize;
    (std::array::from_fn(index), at - first)
}

fn bilinear<const C: usize>(pixel: &mut [u8], old: &[u8], [width, height]: [usize; 2], at: [f64; 2]) {
    let (xs, dx) = around::<2>(at[0], 0, width);
    let (ys, dy) = around::<2>(at[1], 0, height);
    let line = |a: f64, b: f64, d: f64| a + (b - a) * d;
    for (channel, value) in pixel.iter_mut().enumerate() {
        let [top, bottom] = ys.map(|y| {
            let [left, right] = xs.map(|x| f64::from(old[(y * width + x) * C + channel]));
            line(left, right, dx)
        });
        *value = line(top, bottom, dy) as u8;
    }
}

/// Keys' cubic with a = −1, which Pillow keeps for transforms (its resize has −0.5).
fn bicubic<const C: usize>(pixel: &mut [u8], old: &[u8], [width, height]: [usize; 2], at: [f64; 2]) {
    let (xs, dx) = around::<4>(at[0], 1, width);
    let (ys, dy) = around::<4>(at[1], 1, height);
    let cubic = |[a, b, c, d]: [f64; 4], t: f64| {
        let slope = -a + c;
        let square = 2.0 * (a - b) + c - d;
        let cube = -a + b - c + d;
        b + t * (slope + t * (square + t * cube))
    };
    for (channel, value) in pixel.iter_mut().enumerate() {
        let rows = ys.map(|y| cubic(xs.map(|x| f64::from(old[(y * width + x) * C + channel])), dx));
        *value = cubic(rows, dy) as u8;
    }
}
