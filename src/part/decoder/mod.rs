//! Features become predictions at the hidden places.

pub mod vit;
pub mod windows;
