//! The conveyor.
