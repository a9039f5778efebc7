//! The shape of a transformer, as the config gives it.

use crate::error::{Error, Result};
use crate::part::cost::{self, OpCost};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
