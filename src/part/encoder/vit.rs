//! The vision transformer over visible tokens, or over all tokens with mask tokens inserted.

use super::Features;
use super::block::QkvBias;
use super::position::Positions;
use super::stack::Stack;
use crate::error::Result;
use crate::grid::Grid;
use crate::op::bias_gelu::Gelu;
use crate::op::patch::gather;
use crate::op::sizes;
use crate::op::tokens::{TokenLayout, assemble_tokens};
use crate::part::mask::Mask;
use crate::part::params::{Init, LayerNorm, Linear, ParamId, ParamSpecs, Weights};
use tch::{Device, Kind, Tensor};

pub use super::stack::Shape;

/// Options of an encoder besides its shape.
pub struct VitOptions {
    /// Prepends a class token to the patches.
    pub class_token: bool,
    /// Inserts mask tokens at hidden positions instead of encoding the visible patches alone.
    pub mask_tokens_in_encoder: bool,
    /// Initializer of the patch embedding's weight.
    pub embed_init: Init,
    pub qkv_bias: QkvBias,
    /// Fixed positions, fp32 [N, D].
    pub positions: Tensor,
}

impl VitOptions {
    /// Neither class token nor mask tokens, Xavier-uniform patch embedding, biases of queries, keys and values.
    pub fn new(positions: Tensor) -> VitOptions {
        VitOptions {
            class_token: false,
            mask_tokens_in_encoder: false,
            embed_init: Init::Xavier,
            qkv_bias: QkvBias::All,
            positions,
        }
    }
}

/// The stem of CLIP's encoder: learned positions [1+N, D], the class token's first, and a normalization before the
/// blocks.
struct ClipStem {
    positions: ParamId,
    norm: LayerNorm,
}

impl ClipStem {
    /// visible [B, K, D] at positions `keep` [B, K], and the class token `[D]` → [B, 1+K, D].
    fn forward(&self, w: &Weights, visible: &Tensor, class: &Tensor, keep: &Tensor) -> Result<Tensor> {
        let [batch, _, width] = sizes(visible);
        let positions = &w[self.positions];
        let positions = positions.unsqueeze(0).expand([batch, positions.size()[0], width], false);
        let index = Tensor::cat(&[keep.narrow(1, 0, 1).zeros_like(), keep + 1], 1);
        let class = class.view([1, 1, width]).expand([batch, 1, width], false);
        self.norm.forward(w, &(Tensor::cat(&[&class, visible], 1) + gather(&positions, &index)))
    }
}

/// A vision transformer.
pub struct Vit {
    embed: Linear,
    class_token: Option<ParamId>,
    /// Present if the encoder sees mask tokens.
    mask_token: Option<ParamId>,
    clip_stem: Option<ClipStem>,
    pub stack: Stack,
    /// Fixed positions, fp32 [N, D]; public so that other tables can be set.
    pub positions: Positions,
}

impl Vit {
    /// Declares `<name>.embed`, `<name>.cls_token` and `<name>.mask_token` if present, `<name>.blocks.<i>` and
    /// `<name>.norm`.
    pub fn new(params: &mut ParamSpecs, name: &str, grid: &Grid, shape: &Shape, options: VitOptions) -> Self {
        let width = shape.width;
        let inputs = grid.patch_values();
        // The official code leaves this bias at PyTorch's default, uniform within ±1/√(fan in).
        let bias_init = Init::Uniform(1.0 / (inputs as f64).sqrt());
        let embed = Linear::with_init(params, &format!("{name}.embed"), inputs, width, options.embed_init, bias_init);
        let mut token = |kind| params.add(format!("{name}.{kind}_token"), &[1, 1, width], Init::Normal(0.02));
        Vit {
            embed,
            class_token: options.class_token.then(|| token("cls")),
            mask_token: options.mask_tokens_in_encoder.then(|| token("mask")),
            clip_stem: None,
            stack: Stack::new(params, name, shape, options.qkv_bias),
            positions: options.positions.into(),
        }
    }

    /// Replaces the activation, by default the exact GELU.
    pub fn with_activation(self, activation: Gelu) -> Self {
        Vit { stack: self.stack.with_activation(activation), ..self }
    }

    /// Uses learned positions, `<name>.positions`, instead of fixed ones, followed by a normalization,
    /// `<name>.norm_pre` (Radford et al., 2021, section 2.4). Requires a class token and no mask tokens.
    pub fn with_clip_stem(self, params: &mut ParamSpecs, name: &str) -> Self {
        let [tokens, width] = sizes(&self.positions.to_device(Device::Cpu));
        let init = Init::Normal((width as f64).powf(-0.5));
        let positions = params.add(format!("{name}.positions"), &[1 + tokens, width], init);
        params.no_weight_decay(positions);
        let norm = LayerNorm::new(params, &format!("{name}.norm_pre"), width);
        Vit { clip_stem: Some(ClipStem { positions, norm }), ..self }
    }

    /// patches [B, K, P] of the visible tokens → features, the class token first if there is one: [B, 1+K, D], or with
    /// mask tokens at hidden positions [B, 1+N, D], in the order class, visible, hidden.
    pub fn forward(&self, w: &Weights, patches: &Tensor, mask: &Mask) -> Result<Tensor> {
        let visible = self.embed.forward(w, patches)?; // [B, K, D]
        let class = self.class_token.map(|token| w[token].view(-1));
        let mask_token = self.mask_token.map(|token| w[token].view(-1));
        if let (Some(stem), Some(class)) = (&self.clip_stem, &class) {
            return self.stack.forward(w, stem.forward(w, &visible, class, &mask.keep)?, 0);
        }
        let positions = self.positions.to_device(visible.device());
        let hidden = mask_token.as_ref().map(|token| (token, &mask.drop));
        let layout = TokenLayout { positions: &positions, keep: &mask.keep, hidden };
        self.stack.forward(w, assemble_tokens(&visible, class.as_ref(), layout)?, 0)
    }

    /// Encodes whole samples, patches [B, N, P] in row-major order, nothing hidden.
    pub fn encode(&self, w: &Weights, patches: &Tensor) -> Result<Features> {
        let [batch, tokens, _] = sizes(patches);
        let mask = Mask::all_visible(batch, tokens, patches.device());
        let features = self.forward(w, patches, &mask)?.to_kind(Kind::Float); // [B, 1+N, D] or [B, N, D]
        let class_tokens = i64::from(self.class_token.is_some());
        let mean = features.narrow(1, class_tokens, tokens).mean_dim(1, false, Kind::Float);
        Ok(Features { class: self.class_token.map(|_| features.select(1, 0)), mean })
    }
}
