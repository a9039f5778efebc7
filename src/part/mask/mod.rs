//! A mask is a value that walks in front of the encoder: indices, never a float map with a polarity.

mod lines;
mod random;
mod ratio;
mod tube;
mod words;

pub use lines::Lines;
pub use random::{keeping, random};
pub use ratio::Ratio;
pub use tube::tube;
pub use words::Words;

use crate::bridge::record::scope;
use crate::op::shuffle::{Indices, MOST_UNITS, Plan, mask};
use crate::part::lengths::{Group, in_order};
use tch::{Device, Kind, Tensor};

/// Whether a GPU draws masks of so many units a sample by itself, or why not.
pub fn on_device(units: i64) -> Result<(), &'static str> {
    match units {
        0..=MOST_UNITS => Ok(()),
        _ => Err("masks of more than 4096 units a sample are drawn on the host"),
    }
}

/// Which tokens are kept and which dropped, by row-major token number.
#[derive(Debug)]
pub struct Mask {
    /// int64 [B, K].
    pub keep: Tensor,
    /// int64 [B, M].
    pub drop: Tensor,
    /// What `restore` gives, where it was drawn along with the others.
    places: Option<Tensor>,
}

impl Mask {
    /// Drawn by a plan for each sample of `origins` (int64 [3, B], see [`Origin::table`]), on the device where that lies.
    ///
    /// # Panics
    /// Where a GPU refuses the kernel, which is a defect.
    ///
    /// [`Origin::table`]: crate::op::shuffle::Origin::table
    pub fn drawn(plan: &Plan, seed: u64, origins: &Tensor) -> Mask {
        let _mask = scope("mask");
        let drawn = mask(plan, seed, origins);
        let Indices { keep, drop, restore } = drawn.unwrap_or_else(|fault| panic!("a mask: {fault}"));
        Mask { keep, drop, places: Some(restore) }
    }

    /// From an order of tokens int64 [B, N]: the first `kept` stay.
    pub fn from_order(order: &Tensor, kept: i64) -> Mask {
        let tokens = order.size()[1];
        Mask { keep: order.narrow(1, 0, kept), drop: order.narrow(1, kept, tokens - kept), places: None }
    }

    /// Nothing hidden.
    pub fn none(batch: i64, tokens: i64, device: Device) -> Mask {
        let order = Tensor::arange(tokens, (Kind::Int64, device)).unsqueeze(0).repeat([batch, 1]);
        Mask::from_order(&order, tokens)
    }

    /// Masks of groups of samples, which need not have as many tokens, in one: as wide as that of a sample of `tokens` tokens
    /// that keeps `kept`, and −1 where a sample has none.
    pub fn together(groups: &[Group], masks: &[Mask], [tokens, kept]: [i64; 2]) -> Mask {
        let wide = |x: &Tensor, width: i64| x.pad([0, width - x.size()[1]], "constant", -1.0);
        let all = |make: &dyn Fn(&Mask) -> Tensor| in_order(groups, &masks.iter().map(make).collect::<Vec<_>>());
        let places = |mask: &Mask| {
            // What is dropped stands behind as many as are kept of a whole sample.
            let (own, places) = (mask.keep.size()[1], mask.restore());
            wide(&(&places + places.ge(own).to_kind(Kind::Int64) * (kept - own)), tokens)
        };
        Mask {
            keep: all(&|mask| wide(&mask.keep, kept)),
            drop: all(&|mask| wide(&mask.drop, tokens - kept)),
            places: Some(all(&places)),
        }
    }

    /// int64 [B, N]: where each token stands in (keep, drop), so that `cat(keep, drop)` gathered by it is in row-major
    /// order.
    pub fn restore(&self) -> Tensor {
        let sorted = || Tensor::cat(&[&self.keep, &self.drop], 1).argsort(1, false);
        self.places.as_ref().map_or_else(sorted, Tensor::shallow_clone)
    }
}
