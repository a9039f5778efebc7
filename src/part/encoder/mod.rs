//! Encoders: tokens to features.

pub mod block;
pub mod position;
pub mod shape;
pub mod stack;
pub mod text;
pub mod vit;

use crate::part::ragged::{LengthGroup, unpermute};
use tch::Tensor;

/// The output of a frozen encoder for a batch, after the final normalization.
pub struct Features {
    /// The class token [B, D], if there is one.
    pub class: Option<Tensor>,
    /// The mean of all other tokens [B, D].
    pub mean: Tensor,
}

impl Features {
    /// Concatenates the features of each group in batch order.
    pub fn from_groups(groups: &[LengthGroup], parts: &[Features]) -> Features {
        let classes: Vec<Tensor> = parts.iter().filter_map(|part| Some(part.class.as_ref()?.shallow_clone())).collect();
        let means: Vec<Tensor> = parts.iter().map(|part| part.mean.shallow_clone()).collect();
        let class = (!classes.is_empty()).then(|| unpermute(groups, &classes));
        Features { class, mean: unpermute(groups, &means) }
    }
}
