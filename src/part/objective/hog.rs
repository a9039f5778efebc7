//! Histograms of oriented gradients of the hidden tokens (MaskFeat §3).

use crate::error::Result;
use crate::grid::Grid;
use crate::op::hog::hog;
use crate::op::patch::gather;
use crate::part::patchify::Patchify;
use tch::Tensor;

/// Orientations of a histogram.
pub const BINS: i64 = 9;
/// Side of a cell in pixels.
pub const CELL: i64 = 8;

/// Returns the number of values of a token.
pub fn hog_values(grid: &Grid) -> i64 {
    let cells = grid.patch / CELL;
    grid.channels * BINS * cells * cells
}

/// x uint8 or fp32 [B, C, T, Y, X] → histograms of the pixels as the model receives them, fp32 [B, N, C · 9 · cells²].
/// A token that covers several frames has the histograms of its first one (official code: every second frame).
pub fn hog_target(patchify: &Patchify, x: &Tensor) -> Result<Tensor> {
    let grid = patchify.grid_of(x);
    let pixels = patchify.normalize(x)?; // [B, C, T, Y, X]
    let [batch, channels, _, height, width] = crate::op::sizes(&pixels);
    let frames = pixels.slice(2, 0, None, grid.patch_frames).transpose(1, 2); // [B, T', C, Y, X]
    let frames = frames.reshape([batch * grid.frames, channels, height, width]);
    Ok(hog(&frames, grid.patch)?.reshape([batch, grid.tokens(), hog_values(&grid)]))
}

/// The same at the hidden tokens [B, M, C · 9 · cells²].
pub fn hidden_hog_target(patchify: &Patchify, x: &Tensor, drop: &Tensor) -> Result<Tensor> {
    Ok(gather(&hog_target(patchify, x)?, drop))
}
