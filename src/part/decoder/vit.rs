//! A small transformer over visible and mask tokens (MAE §3, "MAE decoder").

use super::Decode;
use super::filler::Filler;
use super::options::{DecoderOptions, OutputTokens};
use crate::error::Result;
use crate::grid::Grid;
use crate::part::cost::{self, OpCost};
use crate::part::encoder::shape::Shape;
use crate::part::mask::Mask;
use crate::part::params::{Init, Linear, ParamSpecs, Weights};
use tch::Tensor;

/// A transformer decoder: mask tokens at the hidden places, blocks, and a linear prediction.
pub struct VitDecoder {
    pub filler: Filler,
    pred: Linear,
    /// Values per predicted token.
    values: i64,
    outputs: OutputTokens,
}

impl VitDecoder {
    /// Declares the tensors of [`Filler`] and `<name>.pred`. `inputs` is the encoder's width.
    pub fn new(
        params: &mut ParamSpecs,
        name: &str,
        grid: &Grid,
        inputs: i64,
        shape: &Shape,
        options: DecoderOptions,
    ) -> Self {
        let values = grid.patch_values();
        let outputs = options.outputs;
        let head_init = options.head_init;
        let filler = Filler::new(params, name, inputs, shape, options);
        let pred = Linear::with_init(params, &format!("{name}.pred"), shape.width, values, head_init, Init::Zero);
        VitDecoder { filler, pred, values, outputs }
    }
}

impl Decode for VitDecoder {
    fn forward(&self, w: &Weights, features: &Tensor, mask: &Mask) -> Result<Tensor> {
        self.pred.forward(w, &self.filler.fill(w, features, mask, self.outputs)?)
    }
    fn set_recompute(&mut self, on: bool) {
        self.filler.stack.recompute = on;
    }
    fn cost(&self, visible: i64, hidden: i64, class_tokens: i64) -> Vec<OpCost> {
        let outputs = self.outputs.range(class_tokens, visible, hidden);
        let outputs = outputs.end - outputs.start;
        let mut ops = self.filler.cost(visible, hidden, class_tokens, outputs);
        ops.push(cost::linear(outputs, self.filler.shape.width, self.values));
        ops
    }
}
