//! A stack of transformer blocks with a final normalization.

use super::block::{Block, Residual, StackOptions};
use crate::error::{Error, Result};
use crate::part::cost::{self, OpCost};
use crate::part::params::{LayerNorm, ParamSpecs, Weights};
use crate::part::recompute::{Leaves, recompute_in_backward};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tch::Tensor;

/// The shape of a transformer. Width, depth and heads of the usual ones: Ti 192, 12, 3; S 384, 12, 6; B 768, 12, 12;
/// L 1024, 24, 16; H 1280, 32, 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// D.
    pub width: i64,
    /// Number of blocks.
    pub depth: i64,
    /// H; the head width is D / H.
    pub heads: i64,
    /// Width of the MLP's hidden layer as a multiple of D.
    #[serde(default = "Shape::default_mlp_ratio")]
    pub mlp_ratio: i64,
}

impl Shape {
    fn default_mlp_ratio() -> i64 {
        4
    }

    /// Returns the operations on `tokens` tokens; the last block computes `outputs` of them.
    pub fn cost(&self, tokens: i64, outputs: i64) -> impl Iterator<Item = OpCost> {
        let Shape { width, depth, mlp_ratio, .. } = *self;
        let block = move |i: i64| {
            let block_outputs = if i + 1 == depth { outputs } else { tokens };
            cost::block(tokens, block_outputs, width, mlp_ratio * width, i > 0)
        };
        (0..depth).flat_map(block).chain([cost::add_layer_norm(outputs, width)])
    }

    /// Checks the shape, which is at `path` in the config.
    ///
    /// # Errors
    /// A usage error if a value is out of range, or if heads or positions do not divide the width.
    pub fn check(&self, path: &str) -> Result<()> {
        let Shape { width, depth, heads, mlp_ratio } = *self;
        for (name, value, max) in
            [("width", width, 16384), ("depth", depth, 256), ("heads", heads, 256), ("mlp_ratio", mlp_ratio, 64)]
        {
            if !(1..=max).contains(&value) {
                return Err(Error::usage(format!("{path}.{name} is {value}; it must lie in 1..={max}")));
            }
        }
        if width % heads != 0 {
            return Err(Error::usage(format!(
                "{path}.width is {width}, which {path}.heads = {heads} does not divide; the nearest that fits is {}",
                (width / heads).max(1) * heads
            )));
        }
        if width % 4 != 0 {
            return Err(Error::usage(format!(
                "{path}.width is {width}; sine-cosine positions want a multiple of 4, the nearest is {}",
                (width / 4).max(1) * 4
            )));
        }
        Ok(())
    }
}

/// The blocks of a transformer.
pub struct Stack {
    blocks: Vec<Block>,
    norm: LayerNorm,
    /// Activation checkpointing: keeps only the inputs of each block and recomputes the rest in backward.
    pub recompute: bool,
}

impl Stack {
    /// Declares the tensors `<name>.blocks.<i>` and `<name>.norm`.
    pub fn new(params: &mut ParamSpecs, name: &str, shape: &Shape, options: &StackOptions) -> Self {
        let mut block = |i| Block::new(params, &format!("{name}.blocks.{i}"), shape, options, i);
        let blocks = (0..shape.depth).map(&mut block).collect();
        Stack { blocks, norm: options.declare_norm(params, &format!("{name}.norm"), shape), recompute: false }
    }

    /// x [B, S, D] → [B, outputs, D] after the final normalization. The last block computes only the tokens in
    /// `outputs`.
    pub fn forward(&self, w: &Weights, x: Tensor, outputs: Range<i64>) -> Result<Tensor> {
        let leaves = (self.recompute && x.requires_grad()).then(|| Leaves::new(w));
        let tokens = x.size()[1];
        let mut residual = Residual { x, pending: None };
        for (i, block) in self.blocks.iter().enumerate() {
            let outputs = if i + 1 == self.blocks.len() { outputs.clone() } else { 0..tokens };
            residual = match &leaves {
                Some(leaves) => checkpointed_block(*block, w, leaves, &residual, outputs)?,
                None => block.forward(w, &residual, outputs)?,
            };
        }
        let (_, normalized) = residual.add_and_normalize(w, &self.norm)?;
        Ok(normalized)
    }

    /// x [B, S, D] → the input of block `layer` after the block's first normalization [B, S, D]; that of the final
    /// normalization if `layer` is the depth.
    pub fn forward_to(&self, w: &Weights, x: Tensor, layer: usize) -> Result<Tensor> {
        let tokens = x.size()[1];
        let mut residual = Residual { x, pending: None };
        for block in &self.blocks[..layer] {
            residual = block.forward(w, &residual, 0..tokens)?;
        }
        let norm = self.blocks.get(layer).map_or(self.norm, |block| block.norm1);
        let (_, normalized) = residual.add_and_normalize(w, &norm)?;
        Ok(normalized)
    }
}

/// Runs a block under activation checkpointing.
fn checkpointed_block(
    block: Block,
    w: &Weights,
    leaves: &Leaves,
    residual: &Residual,
    outputs: Range<i64>,
) -> Result<Residual> {
    let run = move |w: &Weights, (): &(), inputs: &[Tensor]| {
        Ok(block.forward(w, &Residual::from_tensors(inputs), outputs.clone())?.to_tensors())
    };
    Ok(Residual::from_tensors(&recompute_in_backward(w, leaves, (), &residual.to_tensors(), run)?))
}
