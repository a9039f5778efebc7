//! Tokens hidden at random, as many in each sample (MAE §3, "random sampling").

use super::Mask;
use crate::grid::Grid;
use crate::op::shuffle::Plan;
use tch::Tensor;

/// Hides the share `ratio` of the tokens of each sample of `origins`, int64 [3, B].
pub fn random(grid: &Grid, ratio: f64, seed: u64, origins: &Tensor) -> Mask {
    keeping(grid, grid.kept(ratio), seed, origins)
}

/// Hides all but `kept` tokens of each sample of `origins`, int64 [3, B].
pub fn keeping(grid: &Grid, kept: i64, seed: u64, origins: &Tensor) -> Mask {
    let plan = Plan::random(grid, [1, 1, 1], kept).expect("no more tokens kept than there are");
    Mask::drawn(&plan, seed, origins)
}
