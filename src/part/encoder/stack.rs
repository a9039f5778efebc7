//! A stack of transformer blocks with a final normalization.

use super::block::{Block, Residual, StackOptions};
use super::shape::Shape;
use crate::error::Result;
use crate::op::attention::KeyValueCache;
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
        Stack { blocks, norm: options.declare_norm(params, &format!("{name}.norm"), shape), recompute: false }
    }

    /// Number of blocks.
    pub fn depth(&self) -> usize {
        self.blocks.len()
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

    /// Allocates what [`forward_next`](Self::forward_next) keeps of sequences of up to `tokens` tokens like x [B, .., D].
    pub fn new_caches(&self, x: &Tensor, tokens: i64) -> Vec<KeyValueCache> {
        self.blocks.iter().map(|block| block.new_cache(x, tokens)).collect()
    }

    /// x [B, 1, D], the next token of causal sequences → its output after the final normalization [B, 1, D].
    pub fn forward_next(&self, w: &Weights, x: Tensor, caches: &mut [KeyValueCache]) -> Result<Tensor> {
        let mut residual = Residual { x, pending: None };
        for (block, cache) in self.blocks.iter().zip(caches) {
            residual = block.forward_next(w, &residual, cache)?;
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
