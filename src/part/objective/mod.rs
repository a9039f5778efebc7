//! Prediction targets.

pub mod draw_hog;
pub mod hog;
pub mod pixel;
pub mod color; // palette colors of pixels
