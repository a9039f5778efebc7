//! How weights move: the flat buffers, the buckets that reduce their gradients, the schedule, the update.

pub mod bucket;
pub mod flat;
pub mod schedule;
pub mod update;
