//! The text encoder: a transformer over a caption's tokens.

use super::block::StackOptions;
use super::shape::Shape;
use super::stack::Stack;
use crate::error::{Error, Result};
use crate::op::bias_gelu::Gelu;
use crate::op::patch::gather;
use crate::part::mask::TextMask;
use crate::part::params::{Init, ParamId, ParamSpecs, Weights};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The config of a text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub shape: Shape,
    /// Number of tokens in the vocabulary: at least that of the tokenizer of `view.caption`.
    pub vocab_size: i64,
    /// Tokens per caption, as in `view.caption.length`.
    pub context_length: i64,
    /// Hides some tokens in training. By default all are visible.
    #[serde(default)]
    pub mask: Option<TextMask>,
}

impl Config {
    /// Checks the config, which is at `path`.
    ///
    /// # Errors
    /// A usage error if a value is out of range.
    pub fn check(&self, path: &str) -> Result<()> {
        self.shape.check(&format!("{path}.shape"))?;
        for (name, value, max) in
            [("vocab_size", self.vocab_size, 1 << 24), ("context_length", self.context_length, 4096)]
        {
            if !(1..=max).contains(&value) {
                return Err(Error::usage(format!("{path}.{name} is {value}; it must lie in 1..={max}")));
            }
        }
        self.mask.map_or(Ok(()), |mask| mask.check(&format!("{path}.mask"), self.context_length))
    }

    /// Returns the number of tokens of a caption that are visible in training.
    pub fn visible_tokens(&self) -> i64 {
        self.mask.map_or(self.context_length, |mask| mask.visible_tokens(self.context_length))
    }
}

/// Which tokens attend to which, and which token represents the caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextPooling {
    /// All tokens attend to all, padding included; the first token represents the caption (FLIP's code).
    First,
    /// Attention is causal; the end-of-text token, which has the largest id, represents the caption (CLIP).
    CausalEot,
}

/// A text encoder.
pub struct TextEncoder {
    token: ParamId,
    positions: ParamId,
    pub stack: Stack,
    pooling: TextPooling,
}

impl TextEncoder {
    /// Declares `<name>.token` [V, D], `<name>.positions` [L, D] without weight decay, `<name>.blocks.<i>` and
    /// `<name>.norm`.
    pub fn new(
        params: &mut ParamSpecs,
        name: &str,
        config: &Config,
        pooling: TextPooling,
        activation: Gelu,
    ) -> TextEncoder {
        let width = config.shape.width;
        let init = Init::Normal(0.02);
        let token = params.add(format!("{name}.token"), &[config.vocab_size, width], init);
        let positions = params.add(format!("{name}.positions"), &[config.context_length, width], init);
        params.no_weight_decay(positions);
        let causal = pooling == TextPooling::CausalEot;
        let stack = Stack::new(params, name, &config.shape, &StackOptions { activation, causal, ..Default::default() });
        TextEncoder { token, positions, stack, pooling }
    }

    /// Encodes captions: ids int64 [B, L] → [B, D]. `keep` int64 [B, K] are the positions of the visible tokens,
    /// ascending; `None` if all are visible.
    pub fn forward(&self, w: &Weights, ids: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
        let mut x = Tensor::embedding(&w[self.token], ids, -1, false, false) + &w[self.positions]; // [B, L, D]
        let mut ids = ids.shallow_clone();
        if let Some(keep) = keep {
            x = gather(&x, keep);
            ids = ids.gather(1, keep, false);
        }
        let tokens = self.stack.forward(w, x.shallow_clone(), 0..x.size()[1])?;
        Ok(match self.pooling {
            TextPooling::First => tokens.select(1, 0),
            TextPooling::CausalEot => gather(&tokens, &self.pooled_index(&ids)).squeeze_dim(1),
        })
    }

    /// Returns the index of the token that represents each caption of ids [B, L], int64 [B, 1].
    pub fn pooled_index(&self, ids: &Tensor) -> Tensor {
        match self.pooling {
            TextPooling::First => ids.narrow(1, 0, 1).zeros_like(),
            TextPooling::CausalEot => ids.argmax(1, true),
        }
    }
}
