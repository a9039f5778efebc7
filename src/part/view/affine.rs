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
    // Its floor: a point inside the picture is at most half a pixel before the first centre.
    let first = if at < 0.0 { -1 } else { at as i64 };
    let index = |offset: usize| (first - before + offset as i64).clamp(0, length as i64 - 1) as usize;
    (std::array::from_fn(index), at - first as f64)
}

/// The pixels `xs` of a line, as floats.
fn pick<const C: usize, const N: usize>(line: &[u8], xs: [usize; N]) -> [[f64; C]; N] {
    xs.map(|x| {
        let pixel: &[u8; C] = line[x * C..][..C].try_into().expect("a whole pixel");
        pixel.map(f64::from)
    })
}

fn bilinear<const C: usize>(pixel: &mut [u8], old: &[u8], [width, height]: [usize; 2], at: [f64; 2]) {
    let (xs, dx) = around::<2>(at[0], 0, width);
    let (ys, dy) = around::<2>(at[1], 0, height);
    let line = |[a, b]: [[f64; C]; 2], d: f64| -> [f64; C] { std::array::from_fn(|c| a[c] + (b[c] - a[c]) * d) };
    let rows = ys.map(|y| line(pick(&old[y * width * C..][..width * C], xs), dx));
    pixel.copy_from_slice(&line(rows, dy).map(|value| value as u8));
}

/// Keys' cubic with a = −1, which Pillow keeps for transforms (its resize has −0.5).
fn bicubic<const C: usize>(pixel: &mut [u8], old: &[u8], [width, height]: [usize; 2], at: [f64; 2]) {
    let (xs, dx) = around::<4>(at[0], 1, width);
    let (ys, dy) = around::<4>(at[1], 1, height);
    let cubic = |[p, q, r, s]: [[f64; C]; 4], t: f64| -> [f64; C] {
        std::array::from_fn(|c| {
            let (p, q, r, s) = (p[c], q[c], r[c], s[c]);
            let slope = -p + r;
            let square = 2.0 * (p - q) + r - s;
            let cube = -p + q - r + s;
            q + t * (slope + t * (square + t * cube))
        })
    };
    let rows = ys.map(|y| cubic(pick(&old[y * width * C..][..width * C], xs), dx));
    pixel.copy_from_slice(&cubic(rows, dy).map(|value| value as u8));
}
