//! A small transformer over visible and mask tokens (MAE §3, "MAE decoder").

use super::Decode;
use crate::fault::Result;
use crate::grid::Grid;
use crate::op::fill::{Places, fill};
use crate::part::encoder::block::Biases;
use crate::part::encoder::position::Positions;
use crate::part::encoder::stack::{Shape, Stack};
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Slot, Table, Weights};
use crate::part::work::{self, Op};
use tch::Tensor;

/// What sets one paper's decoder apart from another's, beside its shape.
pub struct Make {
    /// How the mask token that it puts at hidden places begins; none where the encoder has seen mask tokens.
    pub token: Option<Init>,
    /// The layer that brings features to its width has a bias.
    pub embed_bias: bool,
    /// Mask tokens and positions have the encoder's width and come in ahead of that layer (OmniMAE), not behind it.
    pub ahead: bool,
    /// How the weight of the last layer, which guesses, begins.
    pub head: Init,
    pub biases: Biases,
    /// fp32 [N, D], fixed; D is the encoder's width where they come in ahead.
    pub positions: Tensor,
}

pub struct Decoder {
    embed: Linear,
    /// Not there where the encoder has seen mask tokens.
    pub token: Option<Slot>,
    ahead: bool,
    pub stack: Stack,
    pred: Linear,
    /// fp32 [N, D], fixed; public so that tables made elsewhere can be handed in.
    pub positions: Positions,
    /// The encoder's width, and how many values a guess has.
    ends: [i64; 2],
    shape: Shape,
}

impl Decoder {
    /// `inputs` is the encoder's width. Tensors: `<name>.embed`, `.mask_token`, `.blocks.<i>`, `.norm`, `.pred`.
    pub fn new(table: &mut Table, name: &str, grid: &Grid, inputs: i64, shape: &Shape, make: Make) -> Self {
        let width = shape.width;
        let embed = if make.embed_bias { Linear::new } else { Linear::bare };
        let token = [1, 1, if make.ahead { inputs } else { width }];
        Decoder {
            embed: embed(table, &format!("{name}.embed"), inputs, width),
            token: make.token.map(|init| table.add(format!("{name}.mask_token"), &token, init)),
            ahead: make.ahead,
            stack: Stack::new(table, name, shape, make.biases),
            pred: Linear::begun(table, &format!("{name}.pred"), width, grid.values(), [make.head, Init::Zero]),
            positions: make.positions.into(),
            ends: [inputs, grid.values()],
            shape: *shape,
        }
    }
}

impl Decode for Decoder {
    fn guess(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
        let embedded = (!self.ahead).then(|| self.embed.forward(w, features)).transpose()?;
        let seen = embedded.as_ref().unwrap_or(features);
        let positions = self.positions.on(seen.device());
        let token = self.token.map(|token| w[token].view(-1));
        let order = Tensor::cat(&[&mask.keep, &mask.drop], 1);
        let (keep, hidden) = match &token {
            Some(token) => (&mask.keep, Some((token, &mask.drop))),
            None => (&order, None),
        };
        let x = fill(seen, None, Places { positions: &positions, keep, hidden })?; // class, visible, hidden
        let x = if self.ahead { self.embed.forward(w, &x)? } else { x };
        let from = x.size()[1] - mask.drop.size()[1];
        // The last block answers only the hidden tokens, which stand last.
        self.pred.forward(w, &self.stack.forward(w, x, from)?)
    }

    fn recompute(&mut self) {
        self.stack.recompute = true;
    }

    fn work(&self, seen: i64, hidden: i64, class: i64) -> Vec<Op> {
        let ([inputs, values], width) = (self.ends, self.shape.width);
        let (read, all) = if self.token.is_some() { (seen, seen + hidden) } else { (seen + hidden, seen + hidden) };
        let (read, all) = (read + class, all + class);
        let mut ops = match self.ahead {
            true => vec![work::fill(read, all, inputs), work::linear(all, inputs, width)],
            false => vec![work::linear(read, inputs, width), work::fill(read, all, width)],
        };
        ops.extend(self.shape.work(all, hidden));
        ops.push(work::linear(hidden, width, values));
        ops
    }
}
