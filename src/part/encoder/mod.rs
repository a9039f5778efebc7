//! Tokens become features.

pub mod block;
pub mod position;
pub mod stack;
pub mod text; // captions
pub mod vit;

use crate::fault::Result;
use crate::part::lengths::{self, Group};
use tch::Tensor;

/// What a frozen encoder says of a batch, after its last normalisation.
pub struct Features {
    /// The class token [B, D], where there is one.
    pub class: Option<Tensor>,
    /// The mean of all other tokens [B, D].
    pub mean: Tensor,
}

impl Features {
    /// Those of each group's samples, in the order of the batch.
    pub fn in_order(groups: &[Group], of: impl Fn(&Group) -> Result<Features>) -> Result<Features> {
        let parts = groups.iter().map(of).collect::<Result<Vec<_>>>()?;
        let classes: Vec<Tensor> = parts.iter().filter_map(|part| Some(part.class.as_ref()?.shallow_clone())).collect();
        let means: Vec<Tensor> = parts.iter().map(|part| part.mean.shallow_clone()).collect();
        let class = (!classes.is_empty()).then(|| lengths::in_order(groups, &classes));
        Ok(Features { class, mean: lengths::in_order(groups, &means) })
    }
}
