//! Pixels of the hidden patches, as they are or normalised patch by patch (MAE §3, "Reconstruction target").

use crate::fault::Result;
use crate::grid::Grid;
use crate::op::patch::{Level, Scale, target};
use tch::Tensor;

/// x uint8 or fp32 [B, C, T, Y, X] → fp32 [B, M, P] at `drop`. With `normalize`, mean and deviation of each patch,
/// over all its values jointly, are taken out; the variance divides by P − 1 (PyTorch's default), plus 1e-6.
pub fn pixel(x: &Tensor, grid: &Grid, scale: &Scale, drop: &Tensor, normalize: bool) -> Result<Tensor> {
    target(x, grid, scale, drop, if normalize { Level::Patch } else { Level::Raw })
}
