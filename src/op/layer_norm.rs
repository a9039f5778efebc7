//! Layer normalisation over the last dimension; statistics in fp32 whatever the dtype of x.

use tch::{Kind, Tensor};

/// Added to the variance, everywhere (the official MAE code; `transformers` defaults to 1e-12).
pub const EPS: f64 = 1e-6;

/// x [.., D], scale [D], shift [D] → [.., D].
pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Tensor {
    x.layer_norm(scale.size(), Some(scale), Some(shift), EPS, false)
}

/// The reference.
pub fn formula(x: &Tensor, scale: &Tensor, shift: &Tensor) -> Tensor {
    let kind = x.kind();
    let wide = if kind == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) };
    let mean = wide.mean_dim(-1, true, None);
    let centred = &wide - mean;
    let variance = centred.square().mean_dim(-1, true, None);
    (centred / (variance + EPS).sqrt() * scale + shift).to_kind(kind)
}
