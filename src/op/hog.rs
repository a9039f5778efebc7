//! Histograms of oriented gradients (Dalal and Triggs, 2005), the prediction target of MaskFeat (Wei et al., 2022, §3;
//! HOGLayerC in its code): Sobel gradients of each channel with mirrored borders, nine orientations over 180°, each
//! pixel assigned to one bin by its magnitude, cells of 8 × 8 pixels, each normalized by its own L2 norm.
//!
//! It differs from `skimage.feature.hog` with blocks of one cell in three ways: Sobel's operator smooths across its
//! direction, where skimage takes a plain difference; the arguments of the arc tangent are swapped, which transposes
//! the image; and the norm has a lower bound of 1e-12, where skimage adds 1e-5 under the root.

use super::launch::{KernelSource, Launch, type_name, variants_by_type};
use super::sizes;
use crate::error::{Error, Result};
use tch::{Kind, Tensor, no_grad};

/// Side of a cell in pixels.
const CELL: i64 = 8;
/// Orientations of a histogram.
const BINS: i64 = 9;

/// x [B, C, Y, X], normalized as the model receives it → fp32 [B, N, C · 9 · (patch / 8)²] for square patches, tokens
/// row-major. The values of a patch are ordered by channel, bin, row and column of the cell.
pub fn hog(x: &Tensor, patch: i64) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) && x.size()[3] <= MAX_WIDTH {
        return kernel(x, patch);
    }
    check(x, patch)?;
    Ok(formula(x, patch))
}

fn check(x: &Tensor, patch: i64) -> Result<()> {
    let [_, _, height, width] = sizes(x);
    if patch < CELL || patch % CELL != 0 || height % patch != 0 || width % patch != 0 {
        return Err(Error::usage(format!(
            "histograms of gradients need patches of a multiple of 8 pixels that divide the image; got {patch} for \
             {height} × {width}"
        )));
    }
    Ok(())
}

/// The reference, in fp32, or in fp64 if x is.
pub fn formula(x: &Tensor, patch: i64) -> Tensor {
    let [batch, channels, height, width] = sizes(x);
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    no_grad(|| {
        let padded = x.to_kind(kind).reflection_pad2d([1, 1, 1, 1]);
        let shifted = |row: i64, column: i64| padded.narrow(2, row, height).narrow(3, column, width);
        let smoothed_column = |c: i64| shifted(0, c) + shifted(1, c) * 2.0 + shifted(2, c);
        let smoothed_row = |r: i64| shifted(r, 0) + shifted(r, 1) * 2.0 + shifted(r, 2);
        let g_x = smoothed_column(0) - smoothed_column(2);
        let g_y = smoothed_row(0) - smoothed_row(2);
        let orientation = g_x.atan2(&g_y) / std::f64::consts::PI * BINS as f64;
        let bin = orientation.floor().to_kind(Kind::Int64).remainder(BINS).unsqueeze(2);
        let magnitude = (g_x.square() + g_y.square()).sqrt().unsqueeze(2);
        let by_bin = magnitude.new_zeros([batch, channels, BINS, height, width], (kind, x.device()));
        let by_bin = by_bin.scatter_add(2, &bin, &magnitude);
        let rows = height / patch;
        let cols = width / patch;
        let cells = patch / CELL;
        let sums = by_bin
            .view([batch, channels, BINS, height / CELL, CELL, width / CELL, CELL].as_slice())
            .sum_dim_intlist([4i64, 6].as_slice(), false, kind);
        let norm = sums.square().sum_dim_intlist([2i64].as_slice(), true, kind).sqrt().clamp_min(1e-12);
        (sums / norm)
            .view([batch, channels, BINS, rows, cells, cols, cells].as_slice())
            .permute([0, 3, 5, 1, 2, 4, 6])
            .reshape([batch, rows * cols, channels * BINS * cells * cells])
    })
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// Maximum width of an image in pixels: ten rows must fit in the shared memory that every GPU grants.
const MAX_WIDTH: i64 = 1200;

/// Kernel source.
pub const SOURCE: KernelSource =
    KernelSource { name: "hog", embedded: include_str!("../../kernels/hog.cu"), variants: || variants_by_type(&KINDS) };

/// The same by the kernel, in one pass over x.
///
/// # Errors
/// A usage error if patches and cells do not divide the image, or if it is wider than 1,200 pixels.
pub fn kernel(x: &Tensor, patch: i64) -> Result<Tensor> {
    check(x, patch)?;
    let [batch, channels, height, width] = sizes(x);
    if width > MAX_WIDTH {
        return Err(Error::usage(format!(
            "hog: the image is {width} pixels wide; the kernel supports at most {MAX_WIDTH}"
        )));
    }
    let tokens = (height / patch) * (width / patch);
    let cells = patch / CELL;
    let out = Tensor::empty([batch, tokens, channels * BINS * cells * cells], (Kind::Float, x.device()));
    // Includes the mirrored columns, and is 1 more than a multiple of 8 to avoid bank conflicts.
    let pitch = (width + 8) / 8 * 8 + 1;
    let launch = Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(x.kind()).into())],
        entry: "hog",
        grid: [(batch * channels * height / CELL) as u32, 1, 1],
        threads: 256,
        shared_bytes: ((CELL + 2) * pitch * 4) as usize,
    };
    let integers = [channels, height, width, patch, pitch].map(|n| (n as i32).into());
    launch.run(&[&[(&x.contiguous()).into(), (&out).into()], &integers[..]].concat())?;
    Ok(out)
}
