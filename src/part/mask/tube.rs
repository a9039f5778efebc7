//! The same places hidden in every time slot, so that no motionless patch can be looked up in another frame (VideoMAE
//! §3.3, "tube masking"; official `TubeMaskingGenerator`).

use super::Mask;
use crate::grid::Grid;
use crate::op::shuffle::{Origin, shuffle};
use tch::{Device, Kind, Tensor};

/// Hides the share `ratio` of the places of a slot, drawn for each sample, in all of its slots.
pub fn tube(grid: &Grid, ratio: f64, seed: u64, samples: &[Origin], device: Device) -> Mask {
    let places = grid.rows * grid.cols;
    let kept = grid.kept_places(ratio);
    let order = shuffle(seed, samples, places, device); // [B, places]
    let slots = Tensor::arange(grid.frames, (Kind::Int64, device)).view([1, -1, 1]) * places;
    let tokens = |places: Tensor| (places.unsqueeze(1) + &slots).flatten(1, 2); // slot after slot
    Mask { keep: tokens(order.narrow(1, 0, kept)), drop: tokens(order.narrow(1, kept, places - kept)) }
}
