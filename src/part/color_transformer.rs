//! A transformer over the pixels of small images as a sequence of palette colors, in row-major order (iGPT, Chen et
//! al., 2020, §2 and its official code): normalization by the root mean square, no bias anywhere.

use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::op::attention::KeyValueCache;
use crate::op::bias_gelu::Gelu;
use crate::op::noise::noise;
use crate::op::sizes;
use crate::part::batch::Batch;
use crate::part::buffers::BufferSpecs;
use crate::part::cost::{self, ModelCost, OpCost};
use crate::part::encoder::block::{BlockInit, StackOptions};
use crate::part::encoder::shape::Shape;
use crate::part::encoder::stack::Stack;
use crate::part::encoder::{EncodeOptions, Features};
use crate::part::model::{Generate, Model};
use crate::part::objective::color::ColorObjective;
use crate::part::palette::Palette;
use crate::part::params::{Init, Linear, ParamId, ParamSpecs, Weights};
use crate::part::patchify::{Patchify, Reconstruction};
use crate::part::step::Step;
use crate::rng::Purpose;
use tch::{Kind, Tensor};

/// A transformer of color indices.
pub struct ColorTransformer {
    pub patchify: Patchify,
    pub params: ParamSpecs,
    pub palette: Palette,
    /// Embeddings of the colors [V, D].
    token: ParamId,
    /// The token before the first pixel, [1, D]; there where the transformer is causal.
    start: Option<ParamId>,
    /// [N, D].
    positions: ParamId,
    stack: Stack,
    head: Linear,
    shape: Shape,
    colors: i64,
}

impl ColorTransformer {
    /// Declares `encoder.token`, `encoder.start` if it is causal, `encoder.positions`, `encoder.blocks.<i>`,
    /// `encoder.norm`, `head.weight` [V, D], which is not tied to the embeddings and begins at 0, and the buffer
    /// `palette`.
    pub fn new(patchify: Patchify, buffers: &mut BufferSpecs, shape: &Shape, colors: i64, causal: bool) -> Self {
        let grid = patchify.grid;
        let palette = Palette::new(buffers, colors, grid.channels);
        let mut params = ParamSpecs::default();
        let token = params.add("encoder.token", &[colors, shape.width], Init::Normal(0.02));
        let start = causal.then(|| params.add("encoder.start", &[1, shape.width], Init::Normal(0.02)));
        let positions = params.add("encoder.positions", &[grid.tokens(), shape.width], Init::Normal(0.01));
        let activation = Gelu::Quick;
        let blocks =
            StackOptions { activation, causal, without_bias: true, init: BlockInit::Gpt, ..Default::default() };
        let stack = Stack::new(&mut params, "encoder", shape, &blocks);
        let head = Linear::with_init(&mut params, "head", shape.width, colors, Init::Zero, None);
        ColorTransformer { patchify, params, palette, token, start, positions, stack, head, shape: *shape, colors }
    }

    /// Returns the color index of each pixel of a batch, int64 [B, N].
    pub fn indices(&self, step: &Step, batch: &Batch) -> Tensor {
        self.palette.indices(step, &self.patchify.to_01(batch.view()))
    }

    /// indices int64 [B, N] → input of the blocks [B, N, D]: where the transformer is causal, each place has the color
    /// before its own.
    fn embed(&self, w: &Weights, indices: &Tensor) -> Tensor {
        let [batch, tokens] = sizes(indices);
        let Some(start) = self.start else { return self.lookup(w, indices) + &w[self.positions] };
        let start = w[start].unsqueeze(0).expand([batch, 1, self.shape.width], false);
        Tensor::cat(&[start, self.lookup(w, &indices.narrow(1, 0, tokens - 1))], 1) + &w[self.positions]
    }

    fn lookup(&self, w: &Weights, indices: &Tensor) -> Tensor {
        Tensor::embedding(&w[self.token], indices, -1, false, false)
    }

    fn logits(&self, w: &Weights, x: Tensor) -> Result<Tensor> {
        let tokens = x.size()[1];
        self.head.forward(w, &self.stack.forward(w, x, 0..tokens)?)
    }

    /// indices int64 [B, N] → logits of each pixel's color given those before it [B, N, V].
    pub fn predict_next(&self, w: &Weights, indices: &Tensor) -> Result<Tensor> {
        self.logits(w, self.embed(w, indices))
    }

    /// indices int64 [B, N] and hidden [B, N], 1 where a pixel is hidden, else 0 → logits of each pixel's color [B, N,
    /// V]. The embedding of a hidden pixel is 0.
    pub fn predict_hidden(&self, w: &Weights, indices: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let visible: Tensor = 1.0 - hidden;
        self.logits(w, self.lookup(w, indices) * visible.to_kind(w.kind()).unsqueeze(-1) + &w[self.positions])
    }

    /// indices int64 [B, N], of which the first `kept` pixels stay and the others are sampled in their order, by the
    /// noise of the batch's keys → int64 [B, N]. Logits are divided by the temperature.
    pub fn sample(&self, step: &Step, batch: &Batch, indices: &Tensor, kept: i64, temperature: f64) -> Result<Tensor> {
        let w = step.weights;
        let [_, tokens] = sizes(indices);
        let noise = noise(batch.seed, &batch.keys, Purpose::Generate, tokens)?; // [B, N]
        let mut sequence = Sequence::new(self, w, batch.size())?;
        let mut colors: Vec<Tensor> = Vec::new();
        for place in 0..tokens {
            let features = sequence.next(colors.last())?; // [B, 1, D]
            if place < kept {
                colors.push(indices.narrow(1, place, 1));
                continue;
            }
            let logits = self.head.forward(w, &features)?.squeeze_dim(1).to_kind(Kind::Float) / temperature; // [B, V]
            let below = logits.softmax(-1, Kind::Float).cumsum(-1, Kind::Float).le_tensor(&noise.narrow(1, place, 1));
            let color = below.sum_dim_intlist([1i64].as_slice(), true, Kind::Int64); // [B, 1]
            // Rounding may leave the last sum below the noise.
            colors.push(color.clamp_max(self.colors - 1));
        }
        Ok(Tensor::cat(&colors, 1))
    }

    /// Draws predictions of a batch: the lower half sampled from the upper one, or the most likely colors of hidden
    /// pixels.
    pub fn draw(&self, step: &Step, batch: &Batch, objective: ColorObjective) -> Result<Reconstruction> {
        let grid = self.patchify.grid;
        let colors = self.indices(step, batch);
        let [samples, tokens] = sizes(&colors);
        let (hidden, predicted) = match objective {
            ColorObjective::Autoregressive => {
                let half = grid.rows / 2 * grid.cols;
                let below = Tensor::arange(tokens, (Kind::Int64, colors.device())).ge(half).to_kind(Kind::Float);
                (below.expand([samples, tokens], false), self.sample(step, batch, &colors, half, 1.0)?)
            }
            ColorObjective::Bert(pixels) => {
                let hidden = pixels.sample(batch, tokens)?;
                let likely = self.predict_hidden(step.weights, &colors, &hidden)?.argmax(-1, false);
                let predicted = likely.where_self(&hidden.gt(0.5), &colors);
                (hidden, predicted)
            }
        };
        let picture = |colors: &Tensor| self.palette.pixels(step, colors, &grid);
        let original = picture(&colors);
        let hidden = hidden.reshape([samples, 1, 1, grid.rows, grid.cols]);
        let masked = &original * (1.0 - &hidden) + hidden * 0.5;
        Ok(Reconstruction { masked, predicted: picture(&predicted), original })
    }
}

/// A sequence that grows pixel by pixel.
struct Sequence<'a> {
    model: &'a ColorTransformer,
    weights: &'a Weights,
    /// The token before the first pixel, [B, 1, D].
    start: Tensor,
    caches: Vec<KeyValueCache>,
    place: i64,
}

impl<'a> Sequence<'a> {
    fn new(model: &'a ColorTransformer, weights: &'a Weights, batch: i64) -> Result<Sequence<'a>> {
        let start =
            model.start.ok_or_else(|| Error::failed("pixels that see all others have no order to sample in"))?;
        let start = weights[start].unsqueeze(0).expand([batch, 1, model.shape.width], false);
        let caches = model.stack.new_caches(&start, model.patchify.grid.tokens());
        Ok(Sequence { model, weights, start, caches, place: 0 })
    }

    /// Takes the color int64 [B, 1] of the last pixel, none before the first → features that predict the next, [B, 1,
    /// D].
    fn next(&mut self, color: Option<&Tensor>) -> Result<Tensor> {
        let model = self.model;
        let before = color.map_or(self.start.shallow_clone(), |color| model.lookup(self.weights, color));
        let x = before + self.weights[model.positions].narrow(0, self.place, 1);
        self.place += 1;
        model.stack.forward_next(self.weights, x, &mut self.caches)
    }
}

impl Generate for ColorTransformer {
    fn generate(&self, step: &Step, batch: &Batch, kept: i64, temperature: f64) -> Result<Tensor> {
        let indices = self.sample(step, batch, &self.indices(step, batch), kept, temperature)?;
        Ok(self.palette.pixels(step, &indices, &self.patchify.grid))
    }
}

impl Model for ColorTransformer {
    fn patchify(&self) -> &Patchify {
        &self.patchify
    }
    fn params(&self) -> &ParamSpecs {
        &self.params
    }
    fn depth(&self) -> usize {
        self.stack.depth()
    }
    /// Attention is counted whole, although half of it is hidden where the transformer is causal.
    fn cost(&self, grid: &Grid, _visible: i64) -> ModelCost {
        let width = self.shape.width;
        let tokens = grid.tokens();
        let mut encoder: Vec<OpCost> = vec![cost::assemble_tokens(tokens, tokens, width)];
        encoder.extend(self.shape.cost(tokens, tokens));
        ModelCost { parts: vec![("encoder", encoder), ("head", vec![cost::linear(tokens, width, self.colors)])] }
    }
    fn set_recompute(&mut self, on: bool) {
        self.stack.recompute = on;
    }
    /// The mean over the sequence of the input of a block after its first normalization (iGPT §2.4), by default of the
    /// middle block: the last ones predict colors.
    fn encode(&self, step: &Step, batch: &Batch, options: EncodeOptions) -> Result<Features> {
        if options.mask.is_some() {
            return Err(Error::usage("a transformer of colors reads whole images; ask another method what it hides"));
        }
        let w = step.weights;
        let x = self.embed(w, &self.indices(step, batch));
        let features = self.stack.forward_to(w, x, options.layer.unwrap_or(self.depth() / 2))?;
        Ok(Features { class: None, mean: features.mean_dim(1, false, Kind::Float) })
    }
}
