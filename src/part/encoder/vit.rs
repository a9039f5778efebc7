//! The vision transformer over the visible tokens, or over all with mask tokens in place.

use super::Features;
use super::block::Biases;
use super::position::Positions;
use super::stack::Stack;
use crate::fault::Result;
use crate::grid::Grid;
use crate::op::bias_gelu::Form;
use crate::op::fill::{Places, fill};
use crate::op::patch::gather;
use crate::op::sizes;
use crate::part::mask::Mask;
use crate::part::weights::{Init, Linear, Norm, Slot, Table, Weights};
use tch::{Device, Kind, Tensor};

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

/// What CLIP has in front of the blocks: learned positions [1+N, D], the class token's first, and a normalisation.
struct Front {
    positions: Slot,
    norm: Norm,
}

impl Front {
    /// seen [B, K, D] at the places `keep` [B, K], and the class token [D] → [B, 1+K, D].
    fn forward(&self, w: &Weights, seen: &Tensor, class: &Tensor, keep: &Tensor) -> Result<Tensor> {
        let [batch, _, width] = sizes(seen);
        let positions = &w[self.positions];
        let all = positions.unsqueeze(0).expand([batch, positions.size()[0], width], false);
        let places = Tensor::cat(&[keep.narrow(1, 0, 1).zeros_like(), keep + 1], 1);
        let class = class.view([1, 1, width]).expand([batch, 1, width], false);
        self.norm.forward(w, &(Tensor::cat(&[&class, seen], 1) + gather(&all, &places)))
    }
}

pub struct Vit {
    embed: Linear,
    class: Option<Slot>,
    /// There only where the encoder sees mask tokens.
    token: Option<Slot>,
    front: Option<Front>,
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
            front: None,
            stack: Stack::new(table, name, shape, make.biases),
            positions: make.positions.into(),
        }
    }

    /// With another unit than the exact one.
    pub fn with_unit(self, form: Form) -> Self {
        Vit { stack: self.stack.with_unit(form), ..self }
    }

    /// With learned positions, `<name>.positions`, instead of fixed ones, and a normalisation between them and the blocks,
    /// `<name>.norm_pre` (Radford et al., 2021, section 2.4). There must be a class token and no mask tokens.
    pub fn with_front(self, table: &mut Table, name: &str) -> Self {
        let [tokens, width] = sizes(&self.positions.on(Device::Cpu));
        let begins = Init::Normal((width as f64).powf(-0.5));
        let positions = table.add(format!("{name}.positions"), &[1 + tokens, width], begins);
        table.spare(positions);
        let norm = Norm::new(table, &format!("{name}.norm_pre"), width);
        Vit { front: Some(Front { positions, norm }), ..self }
    }

    /// rows [B, K, P] of the kept patches → features, the class token first where there is one: of those [B, 1+K, D];
    /// or with mask tokens at the dropped places [B, 1+N, D], in the order class, kept, dropped.
    pub fn forward(&self, w: &Weights, rows: &Tensor, mask: &Mask) -> Result<Tensor> {
        let seen = self.embed.forward(w, rows)?; // [B, K, D]
        let [class, token] = [self.class, self.token].map(|slot| slot.map(|slot| w[slot].view(-1)));
        if let (Some(front), Some(class)) = (&self.front, &class) {
            return self.stack.forward(w, front.forward(w, &seen, class, &mask.keep)?, 0);
        }
        let positions = self.positions.on(seen.device());
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
