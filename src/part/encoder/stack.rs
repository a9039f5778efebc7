//! A stack of transformer blocks with a final normalization.

use super::block::{Block, QkvBias, Residual};
use crate::error::{Error, Result};
use crate::op::bias_gelu::Gelu;
use crate::part::cost::{self, OpCost};
use crate::part::params::{LayerNorm, ParamSpecs, Weights};
use crate::part::recompute::{Leaves, recompute_in_backward};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
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
    pub fn new(params: &mut ParamSpecs, name: &str, shape: &Shape, qkv_bias: QkvBias) -> Self {
        let Shape { width, depth, heads, mlp_ratio } = *shape;
        let mut block =
            |i| Block::new(params, &format!("{name}.blocks.{i}"), width, heads, mlp_ratio * width, qkv_bias);
        let blocks = (0..depth).map(&mut block).collect();
        Stack { blocks, norm: LayerNorm::new(params, &format!("{name}.norm"), width), recompute: false }
    }

    /// Replaces the activation of every block, by default the exact GELU.
    pub fn with_activation(self, activation: Gelu) -> Self {
        self.map_blocks(|block| block.with_activation(activation))
    }

    /// Enables or disables causal attention in every block, by default disabled.
    pub fn with_causal(self, causal: bool) -> Self {
        self.map_blocks(|block| block.with_causal(causal))
    }

    fn map_blocks(self, change: impl Fn(Block) -> Block) -> Self {
        Stack { blocks: self.blocks.into_iter().map(change).collect(), ..self }
    }

    /// x [B, S, D] → [B, S − from, D]. The last block computes only the tokens from `from` on.
    pub fn forward(&self, w: &Weights, x: Tensor, from: i64) -> Result<Tensor> {
        let leaves = (self.recompute && x.requires_grad()).then(|| Leaves::new(w));
        let mut residual = Residual { x, pending: None };
        for (i, block) in self.blocks.iter().enumerate() {
            let from = if i + 1 == self.blocks.len() { from } else { 0 };
            residual = match &leaves {
                Some(leaves) => checkpointed_block(*block, w, leaves, &residual, from)?,
                None => block.forward(w, &residual, from)?,
            };
        }
        let (_, normalized) = residual.add_and_normalize(w, &self.norm)?;
        Ok(normalized)
    }
}

/// Runs a block under activation checkpointing.
fn checkpointed_block(block: Block, w: &Weights, leaves: &Leaves, residual: &Residual, from: i64) -> Result<Residual> {
    let run = move |w: &Weights, (): &(), inputs: &[Tensor]| {
        Ok(block.forward(w, &Residual::from_tensors(inputs), from)?.to_tensors())
    };
    Ok(Residual::from_tensors(&recompute_in_backward(w, leaves, (), &residual.to_tensors(), run)?))
}
