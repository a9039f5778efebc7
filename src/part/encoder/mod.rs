//! Tokens become features.

pub mod block;
pub mod position;
pub mod stack;
pub mod text; // captions
pub mod vit;

use tch::Tensor;

/// What a frozen encoder says of a batch, after its last normalisation.
pub struct Features {
    /// The class token [B, D], where there is one.
    pub class: Option<Tensor>,
    /// The mean of all other tokens [B, D].
    pub mean: Tensor,
}
