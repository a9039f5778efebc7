//! Tokens become features.

pub mod block;
pub mod position;
pub mod vit;
