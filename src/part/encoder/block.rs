//! The pre-norm transformer block (Dosovitskiy et al., 2021, equations 2 and 3).

use super::shape::Shape;
use crate::error::Result;
use crate::op::attention::{KeyValueCache, attention, causal_attention};
use crate::op::bias_gelu::Gelu;
use crate::part::params::{Init, LayerNorm, Linear, ParamSpecs, Weights};
use std::ops::Range;
use tch::Tensor;

/// Which of queries, keys and values have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvBias {
    All,
    /// Queries and values, not keys.
    QueryValue,
}

/// Initializers of the blocks of a transformer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BlockInit {
    /// Xavier-uniform weights and zero biases (official MAE code).
    Xavier,
    /// Normal weights; biases, of normalizations too, begin at a constant (official MaskFeat code: 0.02 both).
    Normal { std: f64, bias: f64 },
    /// Truncated normal weights; those that end a residual branch are divided by √(2 · layer), layers counted from 1
    /// (official BEiT code).
    ByDepth { std: f64 },
    /// Normal weights with deviation 1/√D for queries, keys and values, 1/√(D · depth) for the projection after
    /// attention, and 0.02 in the MLP (official iGPT code).
    Gpt,
}

/// Initializers of one block.
struct InitValues {
    qkv: Init,
    proj: Init,
    fc1: Init,
    fc2: Init,
    bias: Init,
}

impl BlockInit {
    fn values(self, layer: i64, shape: &Shape) -> InitValues {
        let same = |weight: Init, bias: Init| InitValues { qkv: weight, proj: weight, fc1: weight, fc2: weight, bias };
        match self {
            BlockInit::Xavier => same(Init::Xavier, Init::Zero),
            BlockInit::Normal { std, bias } => same(Init::Normal(std), Init::Constant(bias)),
            BlockInit::ByDepth { std } => {
                let last = Init::TruncatedNormal(std / (2.0 * (layer + 1) as f64).sqrt());
                InitValues { proj: last, fc2: last, ..same(Init::TruncatedNormal(std), Init::Zero) }
            }
            BlockInit::Gpt => {
                let width = shape.width as f64;
                let qkv = Init::Normal(width.powf(-0.5));
                let proj = Init::Normal((width * shape.depth as f64).powf(-0.5));
                InitValues { qkv, proj, ..same(Init::Normal(0.02), Init::Zero) }
            }
        }
    }
}

/// Options of transformer blocks besides their shape.
#[derive(Clone, Copy, Debug)]
pub struct StackOptions {
    pub qkv_bias: QkvBias,
    pub activation: Gelu,
    /// A token attends to itself and to those before it.
    pub causal: bool,
    /// Normalizations by the root mean square, and no bias anywhere (iGPT).
    pub without_bias: bool,
    pub init: BlockInit,
}

impl Default for StackOptions {
    /// All biases, exact GELU, attention to all tokens, Xavier-uniform weights.
    fn default() -> StackOptions {
        StackOptions {
            qkv_bias: QkvBias::All,
            activation: Gelu::Exact,
            causal: false,
            without_bias: false,
            init: BlockInit::Xavier,
        }
    }
}

impl StackOptions {
    /// Declares a normalization as these blocks have it.
    pub fn declare_norm(&self, params: &mut ParamSpecs, name: &str, shape: &Shape) -> LayerNorm {
        if self.without_bias {
            return LayerNorm::root_mean_square(params, name, shape.width);
        }
        LayerNorm::with_shift(params, name, shape.width, self.init.values(0, shape).bias)
    }
}

/// A transformer block: attention and MLP, each with pre-normalization and a residual connection.
#[derive(Clone, Copy)]
pub struct Block {
    pub norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
    activation: Gelu,
    causal: bool,
}

impl Block {
    /// Declares the tensors of block `layer`, named as in timm: `<name>.norm1.weight` and so on.
    pub fn new(params: &mut ParamSpecs, name: &str, shape: &Shape, options: &StackOptions, layer: i64) -> Self {
        let Shape { width, heads, mlp_ratio, .. } = *shape;
        let init = options.init.values(layer, shape);
        let bias = (!options.without_bias).then_some(init.bias);
        let norm1 = options.declare_norm(params, &format!("{name}.norm1"), shape);
        let attention = format!("{name}.attn");
        let qkv = match options.qkv_bias {
            QkvBias::All => Linear::with_init(params, &format!("{attention}.qkv"), width, 3 * width, init.qkv, bias),
            QkvBias::QueryValue => Linear::with_query_value_bias(params, &attention, width, init.qkv),
        };
        Block {
            norm1,
            qkv,
            proj: Linear::with_init(params, &format!("{attention}.proj"), width, width, init.proj, bias),
            norm2: options.declare_norm(params, &format!("{name}.norm2"), shape),
            fc1: Linear::with_init(params, &format!("{name}.mlp.fc1"), width, mlp_ratio * width, init.fc1, bias),
            fc2: Linear::with_init(params, &format!("{name}.mlp.fc2"), mlp_ratio * width, width, init.fc2, bias),
            heads,
            activation: options.activation,
            causal: options.causal,
        }
    }

    /// Computes the outputs of the tokens in `outputs`, which attend to all tokens → [B, outputs, D]. The outputs of
    /// other tokens are not computed.
    pub fn forward(&self, w: &Weights, residual: &Residual, outputs: Range<i64>) -> Result<Residual> {
        let from = outputs.start;
        let count = outputs.end - from;
        let attend = |qkv: &Tensor| {
            let attended = if self.causal {
                causal_attention(qkv, self.heads)?.narrow(1, from, count)
            } else {
                let attended = attention(qkv, self.heads, from)?;
                if outputs.end == qkv.size()[1] { attended } else { attended.narrow(1, 0, count) }
            };
            Ok(attended)
        };
        self.forward_with(w, residual, outputs.clone(), attend)
    }

    /// Computes the output of the next token of a causal sequence [B, 1, D], whose earlier tokens the cache holds.
    pub fn forward_next(&self, w: &Weights, residual: &Residual, cache: &mut KeyValueCache) -> Result<Residual> {
        self.forward_with(w, residual, 0..1, |qkv| Ok(cache.attend(qkv)))
    }

    fn forward_with(
        &self,
        w: &Weights,
        residual: &Residual,
        outputs: Range<i64>,
        attend: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Residual> {
        let (x, normalized) = residual.add_and_normalize(w, &self.norm1)?;
        let attended = attend(&self.qkv.forward(w, &normalized)?)?; // [B, S, 3D] → [B, outputs, D]
        let attended = self.proj.forward(w, &attended)?;
        let x = x.narrow(1, outputs.start, outputs.end - outputs.start);
        let (x, normalized) = self.norm2.forward_add(w, &x, &attended)?;
        let hidden = self.fc1.forward_gelu(w, &normalized, self.activation)?;
        Ok(Residual { x, pending: Some(self.fc2.forward(w, &hidden)?) })
    }

    /// Allocates what sampling keeps of this block, for sequences of up to `tokens` tokens like x [B, .., D].
    pub fn new_cache(&self, x: &Tensor, tokens: i64) -> KeyValueCache {
        KeyValueCache::new(x, self.heads, tokens)
    }
}

/// The residual stream between blocks: x [B, S, D] and a pending summand, which the next normalization adds in its own
/// pass.
pub struct Residual {
    pub x: Tensor,
    pub pending: Option<Tensor>,
}

impl Residual {
    /// The inverse of [`to_tensors`](Self::to_tensors).
    pub fn from_tensors(tensors: &[Tensor]) -> Residual {
        Residual { x: tensors[0].shallow_clone(), pending: tensors.get(1).map(Tensor::shallow_clone) }
    }

    /// Returns x and the pending summand, if there is one.
    pub fn to_tensors(&self) -> Vec<Tensor> {
        std::iter::once(&self.x).chain(&self.pending).map(Tensor::shallow_clone).collect()
    }

    /// Returns x plus the pending summand, and the normalization of the sum.
    pub fn add_and_normalize(&self, w: &Weights, norm: &LayerNorm) -> Result<(Tensor, Tensor)> {
        match &self.pending {
            Some(pending) => norm.forward_add(w, &self.x, pending),
            None => Ok((self.x.shallow_clone(), norm.forward(w, &self.x)?)),
        }
    }
}
