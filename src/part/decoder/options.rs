//! Options of decoders beside their shape.

use crate::part::encoder::block::StackOptions;
use crate::part::params::Init;
use std::ops::Range;
use tch::Tensor;

/// Tokens that a decoder predicts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputTokens {
    Hidden,
    Visible,
    /// Visible ones, then hidden ones.
    Patches,
}

impl OutputTokens {
    /// Returns the range of these tokens among class, visible and hidden tokens.
    pub fn range(self, class_tokens: i64, visible: i64, hidden: i64) -> Range<i64> {
        let first_hidden = class_tokens + visible;
        match self {
            OutputTokens::Hidden => first_hidden..first_hidden + hidden,
            OutputTokens::Visible => class_tokens..first_hidden,
            OutputTokens::Patches => class_tokens..first_hidden + hidden,
        }
    }
}

/// Options of a decoder besides its shape.
pub struct DecoderOptions {
    /// Initializer of the mask token; `None` if the encoder has seen mask tokens.
    pub mask_token: Option<Init>,
    /// The layer that projects features to the decoder's width has a bias.
    pub embed_bias: bool,
    /// Inserts mask tokens and positions, of the encoder's width, before that layer (OmniMAE) instead of after it.
    pub mask_before_embed: bool,
    /// Initializer of the weight of the prediction layer.
    pub head_init: Init,
    pub blocks: StackOptions,
    /// Which tokens the decoder predicts for.
    pub outputs: OutputTokens,
    /// Fixed positions, fp32 [N, D]; D is the encoder's width if they are added before the embedding.
    pub positions: Tensor,
}

impl DecoderOptions {
    /// A mask token with standard deviation 0.02, inserted after the embedding, Xavier-uniform prediction, all biases.
    pub fn new(positions: Tensor) -> DecoderOptions {
        DecoderOptions {
            mask_token: Some(Init::Normal(0.02)),
            embed_bias: true,
            mask_before_embed: false,
            head_init: Init::Xavier,
            blocks: StackOptions::default(),
            outputs: OutputTokens::Hidden,
            positions,
        }
    }
}
