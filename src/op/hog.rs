//! Histograms of oriented gradients (Dalal and Triggs, 2005) as MaskFeat predicts them (Wei et al., 2022, §3; HOGLayerC
//! of its code): Sobel gradients of each channel with mirrored borders, nine orientations over 180°, each pixel to one
//! bin by its magnitude, cells of 8 × 8 pixels, each normalised by its own L2 norm.
//!
//! It differs from `skimage.feature.hog` with blocks of one cell in three ways: Sobel's operator smooths across its
//! direction where theirs is the bare difference; the arguments of the arc tangent are swapped, which turns a picture
//! over its diagonal; and the norm has a floor of 1e-12 where theirs adds 1e-5 under the root.

use super::launch::{Launch, Source, by_type, type_name};
use super::sizes;
use crate::fault::{Fault, Result};
use tch::{Kind, Tensor, no_grad};

/// Pixels along a cell's side.
const CELL: i64 = 8;
const BINS: i64 = 9;

/// x [B, C, Y, X] (normalised, as the model sees it) → fp32 [B, N, C · 9 · (patch / 8)²] for square patches, tokens
/// row-major; of a patch's values the channel counts slowest, then the bin, then the cell's row and column.
pub fn hog(x: &Tensor, patch: i64) -> Result<Tensor> {
    if x.device().is_cuda() && KINDS.contains(&x.kind()) && x.size()[3] <= MOST_WIDTH {
        return kernel(x, patch);
    }
    check(x, patch)?;
    Ok(formula(x, patch))
}

fn check(x: &Tensor, patch: i64) -> Result<()> {
    let [_, _, height, width] = sizes(x);
    if patch < CELL || patch % CELL != 0 || height % patch != 0 || width % patch != 0 {
        return Err(Fault::usage(format!(
            "histograms of gradients want patches of a multiple of 8 pixels that fill the picture; got {patch} for \
             {height} × {width}"
        )));
    }
    Ok(())
}

/// The reference, in fp32, or fp64 where x is.
pub fn formula(x: &Tensor, patch: i64) -> Tensor {
    let [batch, channels, height, width] = sizes(x);
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    no_grad(|| {
        let padded = x.to_kind(kind).reflection_pad2d([1, 1, 1, 1]);
        let at = |row: i64, column: i64| padded.narrow(2, row, height).narrow(3, column, width);
        let columns = |c: i64| at(0, c) + at(1, c) * 2.0 + at(2, c);
        let rows = |r: i64| at(r, 0) + at(r, 1) * 2.0 + at(r, 2);
        let (across, down) = (columns(0) - columns(2), rows(0) - rows(2));
        let turns = across.atan2(&down) / std::f64::consts::PI * BINS as f64;
        let bin = turns.floor().to_kind(Kind::Int64).remainder(BINS).unsqueeze(2);
        let size = (across.square() + down.square()).sqrt().unsqueeze(2);
        let shape = [batch, channels, BINS, height, width];
        let pixels = Tensor::zeros(shape, (kind, x.device())).scatter_add(2, &bin, &size);
        let (rows, cols, cells) = (height / patch, width / patch, patch / CELL);
        let sums = pixels
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

/// Columns of which ten rows fit into the shared memory that any GPU grants.
const MOST_WIDTH: i64 = 1200;

pub const SOURCE: Source =
    Source { name: "hog", built_in: include_str!("../../kernels/hog.cu"), variants: || by_type(&KINDS) };

/// The same by our kernel, in one pass over x.
///
/// # Errors
/// Usage, where patches and cells do not fill the picture, or it is wider than 1,200 pixels.
pub fn kernel(x: &Tensor, patch: i64) -> Result<Tensor> {
    check(x, patch)?;
    let [batch, channels, height, width] = sizes(x);
    if width > MOST_WIDTH {
        return Err(Fault::usage(format!("hog: a picture {width} pixels wide; the kernel takes up to {MOST_WIDTH}")));
    }
    let (tokens, cells) = ((height / patch) * (width / patch), patch / CELL);
    let out = Tensor::empty([batch, tokens, channels * BINS * cells * cells], (Kind::Float, x.device()));
    // The mirrored columns too, and 1 more than a multiple of 8: see the kernel.
    let pitch = (width + 8) / 8 * 8 + 1;
    let launch = Launch {
        source: &SOURCE,
        variant: vec![("ELEMENT", type_name(x.kind()).into())],
        entry: "hog",
        grid: [(batch * channels * height / CELL) as u32, 1, 1],
        threads: 256,
        shared: ((CELL + 2) * pitch * 4) as usize,
    };
    let numbers = [channels, height, width, patch, pitch].map(|n| (n as i32).into());
    launch.run(&[&[(&x.contiguous()).into(), (&out).into()], &numbers[..]].concat())?;
    Ok(out)
}
