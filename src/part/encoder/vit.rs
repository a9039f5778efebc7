//! The vision transformer over the visible tokens, or over all with mask tokens in place.

use super::Features;
use super::block::{Biases, Block, transform};
use super::position::Positions;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::op::fill::{Places, fill};
use crate::op::sizes;
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Norm, Slot, Table, Weights};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

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

/// What sets one paper's encoder apart from another's, beside its shape.
pub struct Make {
    /// A class token stands in front of the patches.
    pub class: bool,
    /// It sees mask tokens, instead of the visible patches alone.
    pub in_place: bool,
    /// How the patch embedding's weight begins.
    pub embed: Init,
    pub biases: Biases,
    /// fp32 [N, D], fixed.
    pub positions: Tensor,
}

pub struct Vit {
    embed: Linear,
    class: Option<Slot>,
    /// There only where the encoder sees mask tokens.
    token: Option<Slot>,
    blocks: Vec<Block>,
    norm: Norm,
    /// fp32 [N, D], fixed; public so that tables made elsewhere can be handed in.
    pub positions: Positions,
}

impl Vit {
    /// `<name>.embed`, `<name>.cls_token` and `<name>.mask_token` where there are such, `<name>.blocks.<i>`,
    /// `<name>.norm`.
    pub fn new(table: &mut Table, name: &str, grid: &Grid, shape: &Shape, make: Make) -> Self {
        let Shape { width, depth, heads, mlp_ratio } = *shape;
        // The official codes leave this bias at PyTorch's default, uniform within ±1/√(fan in).
        let begins = [make.embed, Init::Uniform(1.0 / (grid.values() as f64).sqrt())];
        let embed = Linear::begun(table, &format!("{name}.embed"), grid.values(), width, begins);
        let mut token = |which| table.add(format!("{name}.{which}_token"), &[1, 1, width], Init::Normal(0.02));
        Vit {
            embed,
            class: make.class.then(|| token("cls")),
            token: make.in_place.then(|| token("mask")),
            blocks: (0..depth)
                .map(|i| Block::new(table, &format!("{name}.blocks.{i}"), width, heads, mlp_ratio * width, make.biases))
                .collect(),
            norm: Norm::new(table, &format!("{name}.norm"), width),
            positions: make.positions.into(),
        }
    }

    /// rows [B, K, P] of the kept patches → features, the class token first where there is one: of those [B, 1+K, D];
    /// or with mask tokens at the dropped places [B, 1+N, D], in the order class, kept, dropped.
    pub fn forward(&self, w: &Weights, rows: &Tensor, mask: &Mask) -> Result<Tensor> {
        let seen = self.embed.forward(w, rows)?; // [B, K, D]
        let positions = self.positions.on(seen.device());
        let [class, token] = [self.class, self.token].map(|slot| slot.map(|slot| w[slot].view(-1)));
        let hidden = token.as_ref().map(|token| (token, &mask.drop));
        let all = fill(&seen, class.as_ref(), Places { positions: &positions, keep: &mask.keep, hidden })?;
        transform(&self.blocks, &self.norm, w, all, 0)
    }

    /// Whole samples, rows [B, N, P] in row-major order, nothing hidden.
    pub fn features(&self, w: &Weights, rows: &Tensor) -> Result<Features> {
        let [batch, tokens, _] = sizes(rows);
        let mask = Mask::none(batch, tokens, rows.device());
        let all = self.forward(w, rows, &mask)?.to_kind(Kind::Float); // [B, 1+N, D] or [B, N, D]
        let front = i64::from(self.class.is_some());
        let mean = all.narrow(1, front, tokens).mean_dim(1, false, Kind::Float);
        Ok(Features { class: self.class.map(|_| all.select(1, 0)), mean })
    }
}
