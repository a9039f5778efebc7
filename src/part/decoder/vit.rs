//! A small transformer over visible and mask tokens (MAE §3, "MAE decoder").

use crate::fault::Result;
use crate::grid::Grid;
use crate::op::fill::{Places, fill};
use crate::part::encoder::block::{Block, transform};
use crate::part::encoder::{position, vit::Shape};
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Norm, Slot, Table, Weights};
use tch::Tensor;

pub struct Decoder {
    embed: Linear,
    /// Not there where the encoder has seen mask tokens.
    token: Option<Slot>,
    blocks: Vec<Block>,
    norm: Norm,
    pred: Linear,
    /// fp32 [N, D], fixed; public so that tables made elsewhere can be handed in.
    pub positions: Tensor,
}

impl Decoder {
    /// `inputs` is the encoder's width; with `fills` it has a mask token to put at hidden places. Tensors: `<name>.embed`, `.mask_token`, `.blocks.<i>`, `.norm`, `.pred`.
    pub fn new(table: &mut Table, name: &str, grid: &Grid, inputs: i64, shape: &Shape, fills: bool) -> Self {
        let Shape { width, depth, heads, mlp_ratio } = *shape;
        Decoder {
            embed: Linear::new(table, &format!("{name}.embed"), inputs, width),
            token: fills.then(|| table.add(format!("{name}.mask_token"), &[1, 1, width], Init::Normal(0.02))),
            blocks: (0..depth)
                .map(|i| Block::new(table, &format!("{name}.blocks.{i}"), width, heads, mlp_ratio * width))
                .collect(),
            norm: Norm::new(table, &format!("{name}.norm"), width),
            pred: Linear::new(table, &format!("{name}.pred"), width, grid.values()),
            positions: position::sine_cosine(grid, width),
        }
    }

    /// seen [B, 1+K, D of the encoder] → guesses at the dropped places [B, M, P].
    pub fn fill(&self, w: &Weights, seen: &Tensor, mask: &Mask) -> Result<Tensor> {
        let seen = self.embed.forward(w, seen)?;
        let token = w[self.token.expect("a decoder built with a mask token")].view(-1);
        self.predict(w, &seen, mask, &mask.keep, Some((&token, &mask.drop)))
    }

    /// As `fill`, from an encoder that has seen mask tokens: all [B, 1+N, D of the encoder] in the order class, kept,
    /// dropped. Positions are added again, as for visible tokens.
    pub fn refine(&self, w: &Weights, all: &Tensor, mask: &Mask) -> Result<Tensor> {
        let all = self.embed.forward(w, all)?;
        self.predict(w, &all, mask, &Tensor::cat(&[&mask.keep, &mask.drop], 1), None)
    }

    /// Of the hidden tokens alone, which stand last.
    fn predict(
        &self,
        w: &Weights,
        seen: &Tensor,
        mask: &Mask,
        keep: &Tensor,
        hidden: Option<(&Tensor, &Tensor)>,
    ) -> Result<Tensor> {
        let positions = self.positions.to_device(seen.device());
        let x = fill(seen, None, Places { positions: &positions, keep, hidden })?; // class, visible, hidden
        self.pred.forward(w, &transform(&self.blocks, &self.norm, w, x, 1 + mask.keep.size()[1])?)
    }
}
