//! A transformer: blocks, one behind the other, and the normalisation behind them.

use super::block::{Biases, Block, Stream};
use crate::fault::{Fault, Result};
use crate::op::bias_gelu::Form;
use crate::part::again::{Leaves, again};
use crate::part::weights::{Norm, Table, Weights};
use crate::part::work::{self, Op};
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
    /// Blocks.
    pub depth: i64,
    /// H; D / H is the head width.
    pub heads: i64,
    /// Width of a block's hidden layer as a multiple of D.
    #[serde(default = "Shape::four")]
    pub mlp_ratio: i64,
}

impl Shape {
    fn four() -> i64 {
        4
    }

    /// The operations on `tokens` tokens of which the last block answers `answered`.
    pub fn work(&self, tokens: i64, answered: i64) -> impl Iterator<Item = Op> {
        let Shape { width, depth, mlp_ratio, .. } = *self;
        let of = move |i: i64| if i + 1 == depth { answered } else { tokens };
        let block = move |i: i64| work::block(tokens, of(i), width, mlp_ratio * width, i > 0);
        (0..depth).flat_map(block).chain([work::add_norm(answered, width)])
    }

    pub fn check(&self, at: &str) -> Result<()> {
        let Shape { width, depth, heads, mlp_ratio } = *self;
        for (name, value, most) in
            [("width", width, 16384), ("depth", depth, 256), ("heads", heads, 256), ("mlp_ratio", mlp_ratio, 64)]
        {
            if !(1..=most).contains(&value) {
                return Err(Fault::usage(format!("{at}.{name} is {value}; it must lie in 1..={most}")));
            }
        }
        if width % heads != 0 {
            return Err(Fault::usage(format!(
                "{at}.width is {width}, which {at}.heads = {heads} does not divide; the nearest that fits is {}",
                (width / heads).max(1) * heads
            )));
        }
        if width % 4 != 0 {
            return Err(Fault::usage(format!(
                "{at}.width is {width}; sine-cosine positions want a multiple of 4, the nearest is {}",
                (width / 4).max(1) * 4
            )));
        }
        Ok(())
    }
}

/// The blocks of a shape, with their tensors' places.
pub struct Stack {
    blocks: Vec<Block>,
    norm: Norm,
    /// Of a block nothing is kept for backward but what flows into it: there it runs once more.
    pub recompute: bool,
}

impl Stack {
    /// Tensors `<name>.blocks.<i>` and `<name>.norm`.
    pub fn new(table: &mut Table, name: &str, shape: &Shape, biases: Biases) -> Self {
        let Shape { width, depth, heads, mlp_ratio } = *shape;
        let mut block = |i| Block::new(table, &format!("{name}.blocks.{i}"), width, heads, mlp_ratio * width, biases);
        let blocks = (0..depth).map(&mut block).collect();
        Stack { blocks, norm: Norm::new(table, &format!("{name}.norm"), width), recompute: false }
    }

    /// With another unit than the exact one.
    pub fn with_unit(self, form: Form) -> Self {
        self.each(|block| block.with_unit(form))
    }

    /// Where a token sees itself and those before it alone.
    pub fn looking_back(self, causal: bool) -> Self {
        self.each(|block| block.looking_back(causal))
    }

    fn each(self, change: impl Fn(Block) -> Block) -> Self {
        Stack { blocks: self.blocks.into_iter().map(change).collect(), ..self }
    }

    /// x [B, S, D] → [B, S − from, D]. The last block answers only the tokens from `from` on.
    pub fn forward(&self, w: &Weights, x: Tensor, from: i64) -> Result<Tensor> {
        let leaves = (self.recompute && x.requires_grad()).then(|| Leaves::of(w));
        let mut stream = Stream { x, due: None };
        for (i, block) in self.blocks.iter().enumerate() {
            let from = if i + 1 == self.blocks.len() { from } else { 0 };
            stream = match &leaves {
                Some(leaves) => forgetful(*block, w, leaves, &stream, from)?,
                None => block.forward(w, &stream, from)?,
            };
        }
        Ok(stream.normalised(w, &self.norm)?.1)
    }
}

/// A block that keeps its input alone.
fn forgetful(block: Block, w: &Weights, leaves: &Leaves, stream: &Stream, from: i64) -> Result<Stream> {
    let run = move |w: &Weights, (): &(), given: &[Tensor]| Ok(block.forward(w, &Stream::of(given), from)?.tensors());
    Ok(Stream::of(&again(w, leaves, (), &stream.tensors(), run)?))
}
