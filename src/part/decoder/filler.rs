//! Features of visible tokens to features of all places: mask tokens stand at the hidden ones (MAE §3, "MAE decoder",
//! without its prediction).

use super::options::{DecoderOptions, OutputTokens};
use crate::error::Result;
use crate::op::sizes;
use crate::op::tokens::{TokenLayout, assemble_tokens};
use crate::part::cost::{self, OpCost};
use crate::part::encoder::position::Positions;
use crate::part::encoder::shape::Shape;
use crate::part::encoder::stack::Stack;
use crate::part::mask::Mask;
use crate::part::params::{Linear, ParamId, ParamSpecs, Weights};
use tch::Tensor;

/// A transformer over visible and mask tokens.
pub struct Filler {
    embed: Linear,
    /// Absent if the encoder has seen mask tokens.
    pub mask_token: Option<ParamId>,
    mask_before_embed: bool,
    pub stack: Stack,
    /// Fixed positions, fp32 [N, D]; public so that other tables can be set.
    pub positions: Positions,
    /// The encoder's width.
    inputs: i64,
    pub shape: Shape,
}

impl Filler {
    /// Declares `<name>.embed`, `.mask_token`, `.blocks.<i>` and `.norm`. `inputs` is the encoder's width.
    pub fn new(params: &mut ParamSpecs, name: &str, inputs: i64, shape: &Shape, options: DecoderOptions) -> Self {
        let width = shape.width;
        let new_embed = if options.embed_bias { Linear::new } else { Linear::without_bias };
        let token_size = [1, 1, if options.mask_before_embed { inputs } else { width }];
        Filler {
            embed: new_embed(params, &format!("{name}.embed"), inputs, width),
            mask_token: options.mask_token.map(|init| params.add(format!("{name}.mask_token"), &token_size, init)),
            mask_before_embed: options.mask_before_embed,
            stack: Stack::new(params, name, shape, &options.blocks),
            positions: options.positions.into(),
            inputs,
            shape: *shape,
        }
    }

    /// features [B, K, D], after the class token if there is one → the tokens of `outputs` after the final
    /// normalization, of the decoder's width. The last block computes no others.
    pub fn fill(&self, w: &Weights, features: &Tensor, mask: &Mask, outputs: OutputTokens) -> Result<Tensor> {
        let embedded = (!self.mask_before_embed).then(|| self.embed.forward(w, features)).transpose()?;
        let visible = embedded.as_ref().unwrap_or(features);
        let positions = self.positions.table(visible.device());
        let mask_token = self.mask_token.map(|token| w[token].view(-1));
        let order = Tensor::cat(&[&mask.keep, &mask.drop], 1);
        let (keep, hidden) = match &mask_token {
            Some(token) => (&mask.keep, Some((token, &mask.drop))),
            None => (&order, None),
        };
        // In the order class, visible, hidden.
        let x = assemble_tokens(visible, None, TokenLayout { positions: &positions, keep, hidden })?;
        let x = if self.mask_before_embed { self.embed.forward(w, &x)? } else { x };
        let [_, visible] = sizes(&mask.keep);
        let [_, hidden] = sizes(&mask.drop);
        let outputs = outputs.range(x.size()[1] - visible - hidden, visible, hidden);
        self.stack.forward(w, x, outputs)
    }

    /// Returns the operations on one sample; the last block computes `outputs` tokens.
    pub fn cost(&self, visible: i64, hidden: i64, class_tokens: i64, outputs: i64) -> Vec<OpCost> {
        let width = self.shape.width;
        let tokens = visible + hidden + class_tokens;
        let input_tokens = if self.mask_token.is_some() { visible + class_tokens } else { tokens };
        let mut ops = if self.mask_before_embed {
            vec![cost::assemble_tokens(input_tokens, tokens, self.inputs), cost::linear(tokens, self.inputs, width)]
        } else {
            vec![cost::linear(input_tokens, self.inputs, width), cost::assemble_tokens(input_tokens, tokens, width)]
        };
        ops.extend(self.shape.cost(tokens, outputs));
        ops
    }
}
