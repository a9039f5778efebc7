//! An image encoder and a text encoder with one embedding space (CLIP): a projection for each, unit vectors, and the
//! learned scale of their similarities.

use crate::error::Result;
use crate::grid::Grid;
use crate::op::at_least_float;
use crate::op::bias_gelu::Gelu;
use crate::part::batch::Batch;
use crate::part::cost::{self, ModelCost, OpCost};
use crate::part::encoder::shape::Shape;
use crate::part::encoder::text::{self, TextEncoder, TextPooling};
use crate::part::encoder::vit::{LearnedPositions, PositionTable, Vit, VitOptions};
use crate::part::encoder::{EncodeOptions, Features, block::StackOptions, position};
use crate::part::mask::Mask;
use crate::part::model::{ImageText, Model};
use crate::part::params::{Init, Linear, ParamId, ParamSpecs, Weights};
use crate::part::patchify::Patchify;
use crate::part::step::Step;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Which code base's towers are built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TowerStyle {
    /// FLIP's code: fixed positions, an image is the mean of all its tokens, text attends in both directions and is
    /// pooled at its first token, tanh GELU.
    #[default]
    Flip,
    /// CLIP as open_clip trains it: learned positions and a LayerNorm before the blocks, an image is its class token,
    /// text attends causally and is pooled at its end token, exact GELU.
    Clip,
}

/// Options of a dual encoder.
#[derive(Clone, Debug)]
pub struct DualEncoderOptions {
    pub style: TowerStyle,
    /// Shape of the image encoder.
    pub image: Shape,
    pub text: text::Config,
    /// E, the width of the embedding space.
    pub embed_dim: i64,
}

/// Two encoders and their projections.
pub struct DualEncoder {
    pub patchify: Patchify,
    /// Parameters of the encoders, `image.*` and `text.*`, and of the embedding space.
    pub params: ParamSpecs,
    options: DualEncoderOptions,
    image: Vit,
    text: TextEncoder,
    /// `image_projection.weight` [E, D], without bias.
    image_projection: Linear,
    /// `text_projection.weight` [E, D], without bias.
    text_projection: Linear,
    /// `logit_scale` [1, 1], the logarithm of the inverse temperature; it begins at ln(1 / 0.07). FLIP's code applies
    /// weight decay to it, which our rule spares vectors: hence two dimensions.
    scale: ParamId,
}

impl DualEncoder {
    /// Declares the parameters of both encoders.
    pub fn new(patchify: Patchify, options: DualEncoderOptions) -> DualEncoder {
        let mut params = ParamSpecs::default();
        let DualEncoderOptions { style, image: shape, text: captions, embed_dim } = &options;
        let (pooling, gelu) = match style {
            TowerStyle::Flip => (TextPooling::First, Gelu::Tanh),
            TowerStyle::Clip => (TextPooling::CausalEot, Gelu::Exact),
        };
        let positions = match style {
            TowerStyle::Flip => PositionTable::Fixed(position::grid_positions(&patchify.grid, shape.width, None)),
            TowerStyle::Clip => PositionTable::Learned(LearnedPositions {
                init: Init::Normal((shape.width as f64).powf(-0.5)),
                weight_decay: false,
                norm_pre: true,
            }),
        };
        let blocks = StackOptions { activation: gelu, ..StackOptions::default() };
        let vit = VitOptions { class_token: true, blocks, ..VitOptions::with_positions(positions) };
        let image = Vit::new(&mut params, "image", &patchify.grid, shape, vit);
        let text = TextEncoder::new(&mut params, "text", captions, pooling, gelu);
        let image_projection = Linear::without_bias(&mut params, "image_projection", shape.width, *embed_dim);
        let text_projection = Linear::without_bias(&mut params, "text_projection", captions.shape.width, *embed_dim);
        let scale = params.add("logit_scale", &[1, 1], Init::Constant((1.0f64 / 0.07).ln()));
        DualEncoder { patchify, params, options, image, text, image_projection, text_projection, scale }
    }

    /// patches [B, K, P] of the visible tokens → images as unit vectors, fp32 [B, E].
    pub fn encode_images(&self, w: &Weights, patches: &Tensor, mask: &Mask) -> Result<Tensor> {
        Ok(normalize(&self.image_projection.forward(w, &self.pool(&self.image.forward(w, patches, mask)?))?))
    }

    /// Samples the visible tokens of captions int64 [B, L], int64 [B, K]; none where all are visible.
    pub fn sample_visible_tokens(&self, ids: &Tensor, seed: u64, keys: &Tensor) -> Option<Tensor> {
        self.options.text.mask.map(|mask| mask.sample(ids, &self.text.pooled_index(ids), seed, keys))
    }

    /// ids int64 [B, L], of which the tokens `keep` are visible or all → captions as unit vectors, fp32 [B, E].
    pub fn encode_captions(&self, w: &Weights, ids: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
        Ok(normalize(&self.text_projection.forward(w, &self.text.forward(w, ids, keep)?)?))
    }

    /// Returns the factor of similarities, fp32 []: exp of `logit_scale` clamped to [0, ln 100]. It is clamped in the
    /// forward pass, so that the gradient is 0 outside, as in FLIP's code; open_clip clamps the weight after each
    /// update. Inside the bounds both are the same; this way no update of its own kind is needed, and weight decay
    /// brings the parameter back inside.
    pub fn logit_scale(&self, w: &Weights) -> Tensor {
        at_least_float(&w[self.scale]).view([]).clamp(0.0, 100f64.ln()).exp()
    }

    /// Returns [`Model::cost`] with the loss over a global batch.
    pub fn cost_with_loss(&self, grid: &Grid, visible: i64, global_batch: i64) -> ModelCost {
        let mut cost = self.cost(grid, visible);
        cost.parts.push(("loss", cost::info_nce(global_batch, self.options.embed_dim)));
        cost
    }

    /// tokens [B, 1+K, D] → [B, D].
    fn pool(&self, tokens: &Tensor) -> Tensor {
        match self.options.style {
            TowerStyle::Flip => tokens.mean_dim(1, false, tokens.kind()), // the class token too
            TowerStyle::Clip => tokens.select(1, 0),
        }
    }
}

impl Model for DualEncoder {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    /// Without the loss, whose cost depends on the global batch.
    fn cost(&self, grid: &Grid, visible: i64) -> ModelCost {
        let DualEncoderOptions { image: shape, text: captions, embed_dim, .. } = &self.options;
        let projection = |inputs: i64| OpCost::Matmul {
            rows: 1,
            inputs,
            outputs: *embed_dim,
            needs_input_grad: true,
            separate_bias_grad: false,
        };
        let sequence = visible + 1;
        let mut image: Vec<OpCost> = cost::patch_embed(visible, grid.patch_values(), shape.width).into();
        image.push(cost::assemble_tokens(visible, sequence, shape.width));
        image.extend(shape.cost(sequence, sequence));
        image.push(projection(shape.width));
        let length = captions.visible_tokens();
        let mut text = vec![cost::assemble_tokens(length, length, captions.shape.width)];
        text.extend(captions.shape.cost(length, length));
        text.push(projection(captions.shape.width));
        ModelCost { parts: vec![("image", image), ("text", text)] }
    }
    fn set_recompute(&mut self, on: bool) {
        self.image.stack.recompute = on;
        self.text.stack.recompute = on;
    }
    /// Pools before the projection: one vector, of which a class token is a part or which it is.
    fn encode(&self, step: &Step, batch: &Batch, options: EncodeOptions) -> Result<Features> {
        let w = step.weights;
        let mask = options.sample_mask(step, &self.patchify.grid, batch)?;
        let patches = self.patchify.patches_at(batch.view(), &mask.keep, w.kind())?;
        let tokens = self.image.forward_to(w, &patches, &mask, options.layer)?;
        Ok(Features { class: None, mean: self.pool(&tokens).to_kind(Kind::Float) })
    }
    fn depth(&self) -> usize {
        self.image.stack.depth()
    }
}

impl ImageText for DualEncoder {
    fn encode_image(&self, w: &Weights, batch: &Batch) -> Result<Tensor> {
        let patches = self.patchify.patchify(batch.view(), w.kind())?;
        let mask = Mask::all_visible(patches.size()[0], patches.size()[1], patches.device());
        self.encode_images(w, &patches, &mask)
    }
    fn encode_text(&self, w: &Weights, ids: &Tensor) -> Result<Tensor> {
        self.encode_captions(w, ids, None)
    }
}

/// Rows of length one in fp32; FLIP's code adds 1e-8 to the length.
fn normalize(x: &Tensor) -> Tensor {
    let x = at_least_float(x);
    &x / (x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true) + 1e-8)
}
