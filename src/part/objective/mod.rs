//! Prediction targets.

pub mod pixel;
