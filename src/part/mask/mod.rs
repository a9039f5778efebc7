//! A mask is a value that is made before the encoder runs: indices, never a float map with a polarity.

mod block; // blocks of tokens
mod policy; // which tokens a method hides
mod ratio; // the config's share of hidden patches
mod text; // tokens of captions
mod time_frequency; // rows and columns of spectrograms

pub use block::BlockMask;
pub use policy::{ByFrames, MaskPolicy, NoMask, RandomMask, TubeMask, random_keep};
pub use ratio::Ratio;
pub use text::TextMask;
pub use time_frequency::TimeFrequencyMask;

use crate::bridge::record::scope;
use crate::error::Result;
use crate::grid::Grid;
use crate::op::shuffle::{MAX_UNITS, MaskIndices, MaskPlan, sample_mask};
use crate::part::ragged::{LengthGroup, unpermute};
use crate::part::step::Step;
use tch::{Device, Kind, Tensor};

/// Says whether a GPU samples masks of this many units a sample by itself, or why not.
pub fn can_sample_on_device(units: i64) -> Result<(), &'static str> {
    if units <= MAX_UNITS {
        return Ok(());
    }
    Err("masks of more than 4096 units a sample are sampled on the host")
}

/// The visible and the hidden tokens of each sample, by row-major token index.
#[derive(Debug)]
pub struct Mask {
    /// Visible tokens, int64 [B, K].
    pub keep: Tensor,
    /// Hidden tokens, int64 [B, M].
    pub drop: Tensor,
    /// The value of `restore`, where it was sampled along with the others.
    inverse: Option<Tensor>,
}

impl Mask {
    /// Samples a mask by a plan for each of `keys` (int64 [3, B], see [`SampleKey::stack`]), on the device of the keys.
    ///
    /// # Panics
    /// If a GPU refuses the kernel, which is a defect.
    ///
    /// [`SampleKey::stack`]: crate::op::shuffle::SampleKey::stack
    pub fn sample(plan: &MaskPlan, seed: u64, keys: &Tensor) -> Mask {
        let _scope = scope("mask");
        let indices = sample_mask(plan, seed, keys);
        let MaskIndices { keep, drop, restore } = indices.unwrap_or_else(|error| panic!("a mask: {error}"));
        Mask { keep, drop, inverse: Some(restore) }
    }

    /// Makes a mask of an order of tokens int64 [B, N]: the first `visible` are kept.
    pub fn from_order(order: &Tensor, visible: i64) -> Mask {
        let tokens = order.size()[1];
        Mask { keep: order.narrow(1, 0, visible), drop: order.narrow(1, visible, tokens - visible), inverse: None }
    }

    /// Hides nothing.
    pub fn all_visible(batch: i64, tokens: i64, device: Device) -> Mask {
        let order = Tensor::arange(tokens, (Kind::Int64, device)).unsqueeze(0).repeat([batch, 1]);
        Mask::from_order(&order, tokens)
    }

    /// Samples a policy's mask for groups of samples that may differ in length, as one mask in the order of the batch.
    /// It is as wide as the mask of a sample that fills `grid`; −1 stands where a sample has no token.
    pub fn sample_padded(policy: &dyn MaskPolicy, step: &Step, grid: &Grid, groups: &[LengthGroup]) -> Result<Mask> {
        let masks = groups.iter().map(|group| policy.sample(step, &group.grid, &group.batch));
        let masks = masks.collect::<Result<Vec<_>>>()?;
        let tokens = grid.tokens();
        let visible = policy.visible(grid);
        let pad = |x: &Tensor, width: i64| x.pad([0, width - x.size()[1]], "constant", -1.0);
        let join = |part: &dyn Fn(&Mask) -> Tensor| unpermute(groups, &masks.iter().map(part).collect::<Vec<_>>());
        let inverse = |mask: &Mask| {
            // Hidden tokens stand behind the visible ones of a full sample.
            let local_visible = mask.keep.size()[1];
            let places = mask.restore();
            let is_hidden = places.ge(local_visible).to_kind(Kind::Int64);
            pad(&(&places + is_hidden * (visible - local_visible)), tokens)
        };
        Ok(Mask {
            keep: join(&|mask| pad(&mask.keep, visible)),
            drop: join(&|mask| pad(&mask.drop, tokens - visible)),
            inverse: Some(join(&inverse)),
        })
    }

    /// Returns the mask that hides what this one shows, and shows what it hides.
    pub fn complement(&self) -> Mask {
        Mask { keep: self.drop.shallow_clone(), drop: self.keep.shallow_clone(), inverse: None }
    }

    /// Returns where each token stands in (keep, drop), int64 [B, N]: gathering `cat(keep, drop)` by it gives row-major
    /// order.
    pub fn restore(&self) -> Tensor {
        match &self.inverse {
            Some(inverse) => inverse.shallow_clone(),
            None => Tensor::cat(&[&self.keep, &self.drop], 1).argsort(1, false),
        }
    }
}
