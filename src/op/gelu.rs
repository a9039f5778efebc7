//! The Gaussian error linear unit in its exact form, x · Φ(x) (Hendrycks and Gimpel, 2016).

use tch::Tensor;

/// Any shape, elementwise.
pub fn gelu(x: &Tensor) -> Tensor {
    x.gelu("none")
}

/// The reference.
pub fn formula(x: &Tensor) -> Tensor {
    x * 0.5 * (1.0 + (x / 2.0f64.sqrt()).erf())
}
