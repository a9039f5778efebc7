//! A mask is a value that walks in front of the encoder: indices, never a float map with a polarity.

mod random;
mod ratio;
mod tube;

pub use random::random;
pub use ratio::Ratio;
pub use tube::tube;

use tch::{Device, Kind, Tensor};

/// Which tokens are kept and which dropped, by row-major token number.
#[derive(Debug)]
pub struct Mask {
    /// int64 [B, K].
    pub keep: Tensor,
    /// int64 [B, M].
    pub drop: Tensor,
}

impl Mask {
    /// From an order of tokens int64 [B, N]: the first `kept` stay.
    pub fn from_order(order: &Tensor, kept: i64) -> Mask {
        let tokens = order.size()[1];
        Mask { keep: order.narrow(1, 0, kept), drop: order.narrow(1, kept, tokens - kept) }
    }

    /// Nothing hidden.
    pub fn none(batch: i64, tokens: i64, device: Device) -> Mask {
        let order = Tensor::arange(tokens, (Kind::Int64, device)).unsqueeze(0).repeat([batch, 1]);
        Mask::from_order(&order, tokens)
    }

    /// int64 [B, N]: where each token stands in (keep, drop), so that `cat(keep, drop)` gathered by it is in row-major
    /// order.
    pub fn restore(&self) -> Tensor {
        Tensor::cat(&[&self.keep, &self.drop], 1).argsort(1, false)
    }
}
