//! A stack of transformer blocks with a final normalization.

use super::block::{Block, Residual, StackOptions};
use super::shape::Shape;
use crate::error::Result;
use crate::part::params::{LayerNorm, ParamSpecs, Weights};
use crate::part::recompute::{Leaves, recompute_in_backward};
use std::ops::Range;
use tch::Tensor;

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
        Stack { blocks, norm: options.declare_norm(params, &format!("{name}.norm"), shape.width), recompute: false }
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
