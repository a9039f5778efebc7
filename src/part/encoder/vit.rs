//! The vision transformer over the visible tokens, or over all with mask tokens in place.

use super::Features;
use super::block::Biases;
use super::position::Positions;
use super::stack::Stack;
use crate::fault::Result;
use crate::grid::Grid;
use crate::op::fill::{Places, fill};
use crate::op::sizes;
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Slot, Table, Weights};
use tch::{Kind, Tensor};

pub use super::stack::Shape;

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
    pub stack: Stack,
    /// fp32 [N, D], fixed; public so that tables made elsewhere can be handed in.
    pub positions: Positions,
}

impl Vit {
    /// `<name>.embed`, `<name>.cls_token` and `<name>.mask_token` where there are such, `<name>.blocks.<i>`,
    /// `<name>.norm`.
    pub fn new(table: &mut Table, name: &str, grid: &Grid, shape: &Shape, make: Make) -> Self {
        let width = shape.width;
        // The official codes leave this bias at PyTorch's default, uniform within ±1/√(fan in).
        let begins = [make.embed, Init::Uniform(1.0 / (grid.values() as f64).sqrt())];
        let embed = Linear::begun(table, &format!("{name}.embed"), grid.values(), width, begins);
        let mut token = |which| table.add(format!("{name}.{which}_token"), &[1, 1, width], Init::Normal(0.02));
        Vit {
            embed,
            class: make.class.then(|| token("cls")),
            token: make.in_place.then(|| token("mask")),
            stack: Stack::new(table, name, shape, make.biases),
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
        self.stack.forward(w, all, 0)
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
