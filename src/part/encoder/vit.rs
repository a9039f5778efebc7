//! The vision transformer over the visible tokens, or over all with mask tokens in place.

use super::block::{Block, transform};
use super::position;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::op::fill::{Places, fill};
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Norm, Slot, Table, Weights};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The shape of a transformer. Width, depth and heads of the usual ones: Ti 192, 12, 3; S 384, 12, 6; B 768, 12, 12;
/// L 1024, 24, 16; H 1280, 32, 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// D.
    pub width: i64,
    /// Blocks.
    pub depth: i64,
    /// H; D / H is the head width.
    pub heads: i64,
    /// Width of a block's hidden layer as a multiple of D.
    #[serde(default = "Shape::four")]
    pub mlp_ratio: i64,
}

impl Shape {
    fn four() -> i64 {
        4
    }

    pub fn check(&self, at: &str) -> Result<()> {
        let Shape { width, depth, heads, mlp_ratio } = *self;
        for (name, value, most) in
            [("width", width, 16384), ("depth", depth, 256), ("heads", heads, 256), ("mlp_ratio", mlp_ratio, 64)]
        {
            if !(1..=most).contains(&value) {
                return Err(Fault::usage(format!("{at}.{name} is {value}; it must lie in 1..={most}")));
            }
        }
        if width % heads != 0 {
            return Err(Fault::usage(format!(
                "{at}.width is {width}, which {at}.heads = {heads} does not divide; the nearest that fits is {}",
                (width / heads).max(1) * heads
            )));
        }
        if width % 4 != 0 {
            return Err(Fault::usage(format!(
                "{at}.width is {width}; sine-cosine positions want a multiple of 4, the nearest is {}",
                (width / 4).max(1) * 4
            )));
        }
        Ok(())
    }
}

pub struct Vit {
    embed: Linear,
    class: Slot,
    /// There only where the encoder sees mask tokens.
    token: Option<Slot>,
    blocks: Vec<Block>,
    norm: Norm,
    /// fp32 [N, D], fixed; public so that tables made elsewhere can be handed in.
    pub positions: Tensor,
}

impl Vit {
    /// `<name>.embed`, `<name>.cls_token`, `<name>.blocks.<i>`, `<name>.norm`; with `in_place` also
    /// `<name>.mask_token`.
    pub fn new(table: &mut Table, name: &str, grid: &Grid, shape: &Shape, in_place: bool) -> Self {
        let Shape { width, depth, heads, mlp_ratio } = *shape;
        // The official code leaves this bias at PyTorch's default, uniform within ±1/√(fan in).
        let bias = Init::Uniform(1.0 / (grid.values() as f64).sqrt());
        Vit {
            embed: Linear::with_bias(table, &format!("{name}.embed"), grid.values(), width, bias),
            class: table.add(format!("{name}.cls_token"), &[1, 1, width], Init::Normal(0.02)),
            token: in_place.then(|| table.add(format!("{name}.mask_token"), &[1, 1, width], Init::Normal(0.02))),
            blocks: (0..depth)
                .map(|i| Block::new(table, &format!("{name}.blocks.{i}"), width, heads, mlp_ratio * width))
                .collect(),
            norm: Norm::new(table, &format!("{name}.norm"), width),
            positions: position::sine_cosine(grid, width),
        }
    }

    /// rows [B, K, P] of the kept patches → features [B, 1+K, D], the class token first.
    pub fn visible(&self, w: &Weights, rows: &Tensor, mask: &Mask) -> Result<Tensor> {
        self.forward(w, rows, mask, None)
    }

    /// As `visible`, with a mask token at every dropped place → [B, 1+N, D] in the order class, kept, dropped.
    pub fn in_place(&self, w: &Weights, rows: &Tensor, mask: &Mask) -> Result<Tensor> {
        let token = w[self.token.expect("an encoder built with mask tokens")].view(-1);
        self.forward(w, rows, mask, Some((&token, &mask.drop)))
    }

    fn forward(&self, w: &Weights, rows: &Tensor, mask: &Mask, hidden: Option<(&Tensor, &Tensor)>) -> Result<Tensor> {
        let seen = self.embed.forward(w, rows)?; // [B, K, D]
        let positions = self.positions.to_device(seen.device());
        let places = Places { positions: &positions, keep: &mask.keep, hidden };
        let all = fill(&seen, Some(&w[self.class].view(-1)), places)?;
        transform(&self.blocks, &self.norm, w, all, 0)
    }
}
