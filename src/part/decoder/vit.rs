//! A small transformer over visible and mask tokens (MAE §3, "MAE decoder").

use super::Decode;
use crate::error::Result;
use crate::grid::Grid;
use crate::op::sizes;
use crate::op::tokens::{TokenLayout, assemble_tokens};
use crate::part::cost::{self, OpCost};
use crate::part::encoder::block::StackOptions;
use crate::part::encoder::position::Positions;
use crate::part::encoder::shape::Shape;
use crate::part::encoder::stack::Stack;
use crate::part::mask::Mask;
use crate::part::params::{Init, Linear, ParamId, ParamSpecs, Weights};
use std::ops::Range;
use tch::Tensor;

/// Tokens that a decoder predicts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputTokens {
    Hidden,
    Visible,
}

impl OutputTokens {
    /// Returns the range of these tokens among class, visible and hidden tokens.
    fn range(self, class_tokens: i64, visible: i64, hidden: i64) -> Range<i64> {
        let first_hidden = class_tokens + visible;
        match self {
            OutputTokens::Hidden => first_hidden..first_hidden + hidden,
            OutputTokens::Visible => class_tokens..first_hidden,
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

/// A transformer decoder.
pub struct VitDecoder {
    embed: Linear,
    /// Absent if the encoder has seen mask tokens.
    pub mask_token: Option<ParamId>,
    mask_before_embed: bool,
    pub stack: Stack,
    pred: Linear,
    /// Fixed positions, fp32 [N, D]; public so that other tables can be set.
    pub positions: Positions,
    /// The encoder's width.
    inputs: i64,
    /// Values per predicted token.
    values: i64,
    outputs: OutputTokens,
    shape: Shape,
}

impl VitDecoder {
    /// Declares `<name>.embed`, `.mask_token`, `.blocks.<i>`, `.norm` and `.pred`. `inputs` is the encoder's width.
    pub fn new(
        params: &mut ParamSpecs,
        name: &str,
        grid: &Grid,
        inputs: i64,
        shape: &Shape,
        options: DecoderOptions,
    ) -> Self {
        let width = shape.width;
        let values = grid.patch_values();
        let new_embed = if options.embed_bias { Linear::new } else { Linear::without_bias };
        let token_size = [1, 1, if options.mask_before_embed { inputs } else { width }];
        VitDecoder {
            embed: new_embed(params, &format!("{name}.embed"), inputs, width),
            mask_token: options.mask_token.map(|init| params.add(format!("{name}.mask_token"), &token_size, init)),
            mask_before_embed: options.mask_before_embed,
            stack: Stack::new(params, name, shape, &options.blocks),
            pred: Linear::with_init(params, &format!("{name}.pred"), width, values, options.head_init, Init::Zero),
            positions: options.positions.into(),
            inputs,
            values,
            outputs: options.outputs,
            shape: *shape,
        }
    }
}

impl Decode for VitDecoder {
    fn forward(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
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
        // The last block computes only the tokens that are predicted.
        let [_, visible] = sizes(&mask.keep);
        let [_, hidden] = sizes(&mask.drop);
        let outputs = self.outputs.range(x.size()[1] - visible - hidden, visible, hidden);
        self.pred.forward(w, &self.stack.forward(w, x, outputs)?)
    }

    fn set_recompute(&mut self, on: bool) {
        self.stack.recompute = on;
    }

    fn cost(&self, visible: i64, hidden: i64, class_tokens: i64) -> Vec<OpCost> {
        let width = self.shape.width;
        let tokens = visible + hidden + class_tokens;
        let input_tokens = if self.mask_token.is_some() { visible + class_tokens } else { tokens };
        let mut ops = if self.mask_before_embed {
            vec![cost::assemble_tokens(input_tokens, tokens, self.inputs), cost::linear(tokens, self.inputs, width)]
        } else {
            vec![cost::linear(input_tokens, self.inputs, width), cost::assemble_tokens(input_tokens, tokens, width)]
        };
        let outputs = self.outputs.range(class_tokens, visible, hidden);
        let outputs = outputs.end - outputs.start;
        ops.extend(self.shape.cost(tokens, outputs));
        ops.push(cost::linear(outputs, width, self.values));
        ops
    }
}
