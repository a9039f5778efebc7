//! How weights move: the flat buffers, the buckets that reduce their gradients, the schedule, the updates.

pub mod bucket;
pub mod flat;
pub mod lars;
pub mod layout;
pub mod schedule;
pub mod teacher;
pub mod update;
