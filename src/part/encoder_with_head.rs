//! An encoder that has a token at every place, hidden ones as mask tokens, with one linear layer on its output instead
//! of a decoder (SimMIM's shape; MaskFeat's and MFM's).

use crate::error::Result;
use crate::grid::Grid;
use crate::part::batch::Batch;
use crate::part::cost::{self, ModelCost, OpCost};
use crate::part::encoder::vit::{Shape, Vit, VitOptions};
use crate::part::encoder::{EncodeOptions, Features};
use crate::part::mask::Mask;
use crate::part::model::Model;
use crate::part::params::{Init, Linear, ParamSpecs, Weights};
use crate::part::patchify::Patchify;
use crate::part::step::Step;
use tch::Tensor;

/// A vision transformer and a linear prediction at its output tokens.
pub struct EncoderWithHead {
    pub patchify: Patchify,
    /// Parameters of the encoder, `encoder.*`, and of the prediction, `head.*`.
    pub params: ParamSpecs,
    pub encoder: Vit,
    head: Linear,
    shape: Shape,
    class_tokens: i64,
    values: i64,
}

impl EncoderWithHead {
    /// Declares the encoder, and a head that predicts `values` values for each token.
    pub fn new(patchify: Patchify, shape: &Shape, options: VitOptions, values: i64, head_init: Init) -> Self {
        let mut params = ParamSpecs::default();
        let class_tokens = i64::from(options.class_token);
        let encoder = Vit::new(&mut params, "encoder", &patchify.grid, shape, options);
        let head = Linear::with_init(&mut params, "head", shape.width, values, head_init, Init::Zero);
        EncoderWithHead { patchify, params, encoder, head, shape: *shape, class_tokens, values }
    }

    /// patches [B, K, P] of the visible tokens → predictions at the hidden tokens [B, M, values]; at all of them,
    /// [B, N, values], if none is hidden.
    pub fn predict(&self, w: &Weights, patches: &Tensor, mask: &Mask) -> Result<Tensor> {
        let visible = mask.keep.size()[1];
        let hides = mask.drop.size()[1] > 0;
        let from = self.class_tokens + if hides { visible } else { 0 };
        self.head.forward(w, &self.encoder.forward_from(w, patches, mask, from)?)
    }
}

impl Model for EncoderWithHead {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    /// Without the loss, which depends on the target.
    fn cost(&self, grid: &Grid, visible: i64) -> ModelCost {
        let width = self.shape.width;
        let tokens = grid.tokens();
        let outputs = if visible == tokens { tokens } else { tokens - visible };
        let sequence = tokens + self.class_tokens;
        let mut encoder: Vec<OpCost> = cost::patch_embed(visible, grid.patch_values(), width).into();
        encoder.push(cost::assemble_tokens(visible, sequence, width));
        encoder.extend(self.shape.cost(sequence, outputs));
        ModelCost { parts: vec![("encoder", encoder), ("head", vec![cost::linear(outputs, width, self.values)])] }
    }
    fn set_recompute(&mut self, on: bool) {
        self.encoder.stack.recompute = on;
    }
    fn depth(&self) -> usize {
        self.encoder.stack.depth()
    }
    fn encode(&self, step: &Step, batch: &Batch, options: EncodeOptions) -> Result<Features> {
        self.encoder.encode(step, &self.patchify, batch, options)
    }
}
