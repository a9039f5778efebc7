//! Tokens hidden at random, as many in each sample (MAE §3, "random sampling").

use super::Mask;
use crate::grid::Grid;
use crate::op::shuffle::{Origin, shuffle};
use tch::Device;

/// Hides the share `ratio` of the tokens of each sample.
pub fn random(grid: &Grid, ratio: f64, seed: u64, samples: &[Origin], device: Device) -> Mask {
    Mask::from_order(&shuffle(seed, samples, grid.tokens(), device), grid.kept(ratio))
}
