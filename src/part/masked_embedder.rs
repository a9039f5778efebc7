//! Embeds what a mask shows of a sample: an encoder of the visible patches, mask tokens at the other places, a mean and
//! a projection.

use crate::error::Result;
use crate::grid::Grid;
use crate::part::batch::Batch;
use crate::part::cost::{self, ModelCost, OpCost};
use crate::part::decoder::filler::Filler;
use crate::part::decoder::options::{DecoderOptions, OutputTokens};
use crate::part::encoder::vit::{Shape, Vit, VitOptions};
use crate::part::encoder::{EncodeOptions, Features};
use crate::part::mask::Mask;
use crate::part::model::Model;
use crate::part::params::{ParamSpecs, Weights};
use crate::part::patchify::Patchify;
use crate::part::projection::{self, Projection};
use crate::part::step::Step;
use tch::Tensor;

/// Encoder, filler and projection.
pub struct MaskedEmbedder {
    pub patchify: Patchify,
    /// Parameters of the encoder, `encoder.*`, the filler, `decoder.*`, and the projection, `head.*`.
    pub params: ParamSpecs,
    pub encoder: Vit,
    pub filler: Filler,
    head: Projection,
    shape: Shape,
}

impl MaskedEmbedder {
    /// Declares the parameters. The encoder has a class token, which the filler's blocks see and the mean leaves out.
    pub fn new(
        patchify: Patchify,
        shape: &Shape,
        options: VitOptions,
        decoder_shape: &Shape,
        decoder: DecoderOptions,
        head: projection::Config,
    ) -> MaskedEmbedder {
        let mut params = ParamSpecs::default();
        let encoder =
            Vit::new(&mut params, "encoder", &patchify.grid, shape, VitOptions { class_token: true, ..options });
        let filler = Filler::new(&mut params, "decoder", shape.width, decoder_shape, decoder);
        let head = Projection::new(&mut params, "head", decoder_shape.width, head);
        MaskedEmbedder { patchify, params, encoder, filler, head, shape: *shape }
    }

    /// x [B, C, T, Y, X] → embeddings of what the mask shows, unit vectors, fp32 [B, E].
    pub fn embed(&self, w: &Weights, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        let features = self.encoder.forward(w, &self.patchify.patches_at(x, &mask.keep, w.kind())?, mask)?; // [B, 1+K, D]
        let tokens = self.filler.fill(w, &features, mask, OutputTokens::Patches)?; // [B, N, D']
        self.head.forward(w, &tokens.mean_dim(1, false, None))
    }
}

impl Model for MaskedEmbedder {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    fn depth(&self) -> usize {
        self.encoder.stack.depth()
    }
    /// That of one view of a sample, without the loss.
    fn cost(&self, grid: &Grid, visible: i64) -> ModelCost {
        let width = self.shape.width;
        let mut encoder: Vec<OpCost> = cost::patch_embed(visible, grid.patch_values(), width).into();
        encoder.push(cost::assemble_tokens(visible, visible + 1, width));
        encoder.extend(self.shape.cost(visible + 1, visible + 1));
        let filler = self.filler.cost(visible, grid.tokens() - visible, 1, grid.tokens());
        ModelCost { parts: vec![("encoder", encoder), ("filler", filler), ("head", self.head.cost())] }
    }
    fn set_recompute(&mut self, on: bool) {
        self.encoder.stack.recompute = on;
        self.filler.stack.recompute = on;
    }
    fn encode(&self, step: &Step, batch: &Batch, options: EncodeOptions) -> Result<Features> {
        self.encoder.encode(step, &self.patchify, batch, options)
    }
}
