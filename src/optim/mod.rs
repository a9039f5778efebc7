pub mod group;
pub mod flat;
pub mod schedule;
pub mod update;
