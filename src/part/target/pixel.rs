//! Pixels of the hidden patches, as they are or normalised patch by patch (MAE §3, "Reconstruction target").

use crate::grid::Grid;
use crate::op::patch::{Scale, patch};
use tch::{Kind, Tensor};

/// x uint8 or fp32 [B, C, T, Y, X] → fp32 [B, M, P] at `drop`. With `normalize`, mean and deviation of each patch,
/// over all its values jointly, are taken out.
pub fn pixel(x: &Tensor, grid: &Grid, scale: &Scale, drop: &Tensor, normalize: bool) -> Tensor {
    let truth = patch(x, grid, scale, drop);
    if normalize { standardised(&truth) } else { truth }
}

/// Each row of [.., P] with mean 0 and deviation 1; the variance divides by P − 1 (PyTorch's default), plus 1e-6.
pub fn standardised(rows: &Tensor) -> Tensor {
    let mean = rows.mean_dim(-1, true, Kind::Float);
    let variance = rows.var_dim(-1, true, true);
    (rows - mean) / (variance + 1e-6).sqrt()
}
