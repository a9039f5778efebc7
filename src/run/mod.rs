//! The verbs.

pub mod checkpoint;
pub mod doctor;
pub mod dump;
pub mod evaluate;
pub mod events;
pub mod exchange;
pub mod lease;
pub mod log;
pub mod picture;
pub mod reconstruct;
pub mod report;
pub mod step;
pub mod train;
pub mod bench;
pub mod open;
pub mod state;
