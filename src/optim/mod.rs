pub mod flat;
pub mod group;
pub mod schedule;
pub mod update;
