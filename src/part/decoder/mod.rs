//! Decoders: features to predictions at hidden positions.

pub mod filler;
pub mod options;
pub mod vit;
pub mod windows;

use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::part::cost::OpCost;
use crate::part::encoder::vit::Shape;
use crate::part::mask::Mask;
use crate::part::params::{ParamSpecs, Weights};
use options::DecoderOptions;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;
use vit::VitDecoder;
use windows::{WindowDecoder, WindowDecoderOptions};

/// The config's `attention` of a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// All tokens attend to all, including the class token.
    Global,
    /// Tokens attend to those of their window.
    Windows(windows::Config),
}

impl Default for Attention {
    fn default() -> Self {
        Attention::Windows(windows::Config::default())
    }
}

impl Attention {
    /// Checks the attention, which is at `path` in the config.
    ///
    /// # Errors
    /// A usage error if windows do not divide the grid.
    pub fn check(&self, path: &str, grid: &Grid) -> Result<()> {
        match self {
            Attention::Global => Ok(()),
            Attention::Windows(windows) => windows.check(&format!("{path}.windows"), grid),
        }
    }

    /// Builds a decoder of this shape and declares its tensors. `inputs` is the encoder's width. Windows take only the
    /// mask token and the positions from the options.
    ///
    /// # Errors
    /// A usage error if windows do not divide the grid or there is no mask token for them.
    pub fn build(
        &self,
        params: &mut ParamSpecs,
        grid: &Grid,
        inputs: i64,
        shape: &Shape,
        options: DecoderOptions,
    ) -> Result<Box<dyn Decode>> {
        match self {
            Attention::Global => Ok(Box::new(VitDecoder::new(params, "decoder", grid, inputs, shape, options))),
            Attention::Windows(windows) => {
                let mask_token =
                    options.mask_token.ok_or_else(|| Error::usage("a windowed decoder needs a mask token"))?;
                let options = WindowDecoderOptions { mask_token, positions: options.positions, windows: *windows };
                Ok(Box::new(WindowDecoder::new(params, "decoder", grid, inputs, shape, options)?))
            }
        }
    }
}

/// A decoder of any kind of attention.
pub trait Decode {
    /// Predicts the hidden patches → [B, M, P], or what the decoder's options ask for. The features are those of the
    /// visible tokens [B, K, D of the encoder], or, if the encoder sees mask tokens, of all tokens [B, N, D] in the
    /// order visible, hidden; after a class token if the encoder has one.
    fn forward(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor>;
    /// Turns activation checkpointing on or off: blocks keep only their inputs and are recomputed in backward.
    fn set_recompute(&mut self, on: bool);
    /// Returns the operations on one sample with `visible` visible and `hidden` hidden tokens; `class_tokens`, one or
    /// none, is the number of class tokens in the features.
    fn cost(&self, visible: i64, hidden: i64, class_tokens: i64) -> Vec<OpCost>;
}

impl<D: Decode + ?Sized> Decode for Box<D> {
    fn forward(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
        (**self).forward(w, features, mask)
    }
    fn set_recompute(&mut self, on: bool) {
        (**self).set_recompute(on);
    }
    fn cost(&self, visible: i64, hidden: i64, class_tokens: i64) -> Vec<OpCost> {
        (**self).cost(visible, hidden, class_tokens)
    }
}
