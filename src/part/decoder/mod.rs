//! Features become predictions at the hidden places.

pub mod vit;
pub mod windows;

use crate::fault::Result;
use crate::grid::Grid;
use crate::part::encoder::block::Biases;
use crate::part::encoder::vit::Shape;
use crate::part::mask::Mask;
use crate::part::weights::{Init, Table, Weights};
use crate::part::work::Op;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The config's `attention` of a decoder: who sees whom in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// All tokens each other, and the class token.
    Global,
    /// Those of a window each other.
    Windows(windows::Config),
}

impl Default for Attention {
    fn default() -> Self {
        Attention::Windows(windows::Config::default())
    }
}

impl Attention {
    /// Refuses windows that do not divide the grid.
    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        match self {
            Attention::Global => Ok(()),
            Attention::Windows(windows) => windows.check(&format!("{at}.windows"), grid),
        }
    }

    /// A decoder of this shape, its tensors in the table; `inputs` is the encoder's width, positions are fp32 [N, D].
    pub fn decoder(
        &self,
        table: &mut Table,
        (grid, inputs): (&Grid, i64),
        shape: &Shape,
        (token, positions): (Init, Tensor),
    ) -> Result<Box<dyn Decode>> {
        match self {
            Attention::Global => {
                let (biases, head) = (Biases::All, Init::Xavier);
                let make = vit::Make { token: Some(token), embed_bias: true, ahead: false, head, biases, positions };
                Ok(Box::new(vit::Decoder::new(table, "decoder", grid, inputs, shape, make)))
            }
            Attention::Windows(windows) => {
                let make = windows::Make { token, positions, windows: *windows };
                Ok(Box::new(windows::Decoder::new(table, "decoder", grid, inputs, shape, make)?))
            }
        }
    }
}

/// A decoder, whichever tokens see each other in it.
pub trait Decode {
    /// Guesses at the dropped places [B, M, P]. The features are those of visible tokens [B, K, D of the encoder], or of
    /// all [B, N, D] in the order kept, dropped where the encoder has seen mask tokens; behind a class token if the
    /// encoder has one.
    fn guess(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor>;
    /// From now on blocks are run again in backward instead of being kept.
    fn recompute(&mut self);
    /// The operations on one sample, of which `seen` tokens are read and `hidden` guessed; `class` of the features, one or
    /// none, is a class token's.
    fn work(&self, seen: i64, hidden: i64, class: i64) -> Vec<Op>;
}

impl<D: Decode + ?Sized> Decode for Box<D> {
    fn guess(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
        (**self).guess(w, features, mask)
    }
    fn recompute(&mut self) {
        (**self).recompute();
    }
    fn work(&self, seen: i64, hidden: i64, class: i64) -> Vec<Op> {
        (**self).work(seen, hidden, class)
    }
}
