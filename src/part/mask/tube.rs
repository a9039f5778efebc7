//! The same places hidden in every time slot, so that no motionless patch can be looked up in another frame (VideoMAE
//! §3.3, "tube masking"; official `TubeMaskingGenerator`).

use super::Mask;
use crate::grid::Grid;
use crate::op::shuffle::Plan;
use tch::Tensor;

/// Hides the share `ratio` of the places of a slot, drawn for each sample of `origins` (int64 [3, B]), in all of its slots.
pub fn tube(grid: &Grid, ratio: f64, seed: u64, origins: &Tensor) -> Mask {
    let plan = Plan::random(grid, [grid.frames, 1, 1], grid.kept_places(ratio));
    Mask::drawn(&plan.expect("no more places kept than there are"), seed, origins)
}
