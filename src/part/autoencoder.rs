//! A masked autoencoder of pixels: visible patches → encoder → decoder → predictions of the hidden patches. Papers
//! differ in options of the parts and in the mask.

use super::decoder::Decode;
use super::encoder::vit::{Shape, Vit, VitOptions};
use crate::error::Result;
use crate::grid::Grid;
use crate::part::batch::Batch;
use crate::part::cost::{self, ModelCost, OpCost};
use crate::part::decoder::options::DecoderOptions;
use crate::part::decoder::vit::VitDecoder;
use crate::part::encoder::{EncodeOptions, Features};
use crate::part::mask::{Mask, MaskPolicy};
use crate::part::model::{Model, Reconstruct};
use crate::part::objective::pixel::PixelTarget;
use crate::part::params::{ParamSpecs, Weights};
use crate::part::patchify::{Patchify, Reconstruction};
use crate::part::step::Step;
use tch::{Kind, Tensor};

/// Encoder, decoder and target of a masked autoencoder; `D` is the type of the decoder.
pub struct Autoencoder<D = VitDecoder> {
    pub patchify: Patchify,
    /// Parameters of the encoder, `encoder.*`, and of the decoder, `decoder.*`.
    pub params: ParamSpecs,
    pub encoder: Vit,
    pub decoder: D,
    pub target: PixelTarget,
    encoder_shape: Shape,
    class_token: bool,
    mask_tokens_in_encoder: bool,
}

impl Autoencoder {
    /// Declares a masked autoencoder with a plain ViT as its decoder.
    pub fn new(
        patchify: Patchify,
        encoder_shape: &Shape,
        encoder: VitOptions,
        decoder_shape: &Shape,
        decoder: DecoderOptions,
        target: PixelTarget,
    ) -> Autoencoder {
        let grid = patchify.grid;
        let inputs = encoder_shape.width;
        let built = Autoencoder::with_decoder(patchify, encoder_shape, encoder, target, |params| {
            Ok(VitDecoder::new(params, "decoder", &grid, inputs, decoder_shape, decoder))
        });
        built.expect("nothing that can fail")
    }
}

impl<D: Decode> Autoencoder<D> {
    /// Declares a masked autoencoder with the decoder that `build` declares.
    pub fn with_decoder(
        patchify: Patchify,
        shape: &Shape,
        options: VitOptions,
        target: PixelTarget,
        build: impl FnOnce(&mut ParamSpecs) -> Result<D>,
    ) -> Result<Self> {
        let mut params = ParamSpecs::default();
        let class_token = options.class_token;
        let mask_tokens_in_encoder = options.mask_tokens_in_encoder;
        let encoder = Vit::new(&mut params, "encoder", &patchify.grid, shape, options);
        let decoder = build(&mut params)?;
        let encoder_shape = *shape;
        Ok(Autoencoder {
            patchify,
            params,
            encoder,
            decoder,
            target,
            encoder_shape,
            class_token,
            mask_tokens_in_encoder,
        })
    }

    /// x [B, C, T, Y, X] → features of the visible patches [B, K, D], after the class token if there is one.
    pub fn encode_visible(&self, w: &Weights, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        self.encoder.forward(w, &self.patchify.patches_at(x, &mask.keep, w.kind())?, mask)
    }

    /// x [B, C, T, Y, X] → predictions of the hidden patches in the target's form [B, M, P].
    pub fn predict(&self, w: &Weights, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        self.decoder.forward(w, &self.encode_visible(w, x, mask)?, mask)
    }

    /// Returns the targets of the hidden patches, fp32 [B, M, P].
    pub fn target(&self, x: &Tensor, mask: &Mask) -> Result<Tensor> {
        self.target.target(&self.patchify, x, &mask.drop)
    }

    /// Returns the operations of the encoder on one sample of which `visible` tokens are visible.
    pub fn encoder_cost(&self, grid: &Grid, visible: i64) -> Vec<OpCost> {
        let tokens = if self.mask_tokens_in_encoder { grid.tokens() } else { visible };
        let sequence = tokens + i64::from(self.class_token);
        let width = self.encoder_shape.width;
        let mut ops: Vec<OpCost> = cost::patch_embed(visible, grid.patch_values(), width).into();
        ops.push(cost::assemble_tokens(visible, sequence, width));
        ops.extend(self.encoder_shape.cost(sequence, sequence));
        ops
    }

    fn draw(&self, w: &Weights, x: &Tensor, mask: &Mask) -> Result<Reconstruction> {
        let visible = self.patchify.patches_at(x, &mask.keep, Kind::Float)?;
        let pred = self.target.denormalize(&self.patchify, &self.predict(w, x, mask)?, &visible);
        self.patchify.reconstruct(x, &pred, mask)
    }
}

impl<D: Decode> Model for Autoencoder<D> {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    fn cost(&self, grid: &Grid, visible: i64) -> ModelCost {
        let hidden = grid.tokens() - visible;
        let encoder = self.encoder_cost(grid, visible);
        let decoder = self.decoder.cost(visible, hidden, i64::from(self.class_token));
        let loss = vec![cost::pixel_loss(hidden, grid.patch_values())];
        ModelCost { parts: vec![("encoder", encoder), ("decoder", decoder), ("loss", loss)] }
    }
    fn set_recompute(&mut self, on: bool) {
        self.encoder.stack.recompute = on;
        self.decoder.set_recompute(on);
    }
    fn depth(&self) -> usize {
        self.encoder.stack.depth()
    }
    fn encode(&self, step: &Step, batch: &Batch, options: EncodeOptions) -> Result<Features> {
        self.encoder.encode(step, &self.patchify, batch, options)
    }
}

impl<D: Decode> Reconstruct for Autoencoder<D> {
    fn reconstruct(&self, step: &Step, batch: &Batch, policy: &dyn MaskPolicy) -> Result<Reconstruction> {
        let groups = self.patchify.groups(batch)?;
        let parts = groups.iter().map(|group| {
            let mask = policy.sample(step, &group.grid, &group.batch)?;
            self.draw(step.weights, group.batch.view(), &mask)
        });
        Ok(Reconstruction::from_groups(&groups, &parts.collect::<Result<Vec<_>>>()?))
    }
}
