//! What is to be predicted.

pub mod pixel;
