//! The pre-norm transformer block (Dosovitskiy et al., 2021, equations 2 and 3).

use crate::error::Result;
use crate::op::attention::{attention, causal_attention};
use crate::op::bias_gelu::Gelu;
use crate::part::params::{LayerNorm, Linear, ParamSpecs, Weights};
use tch::Tensor;

/// Which of queries, keys and values have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvBias {
    All,
    /// Queries and values, not keys.
    QueryValue,
}

/// A transformer block: attention and MLP, each with pre-normalization and a residual connection.
#[derive(Clone, Copy)]
pub struct Block {
    norm1: LayerNorm,
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
    /// Declares tensors named as in timm: `<name>.norm1.weight` and so on.
    pub fn new(
        params: &mut ParamSpecs,
        name: &str,
        width: i64,
        heads: i64,
        hidden_width: i64,
        qkv_bias: QkvBias,
    ) -> Self {
        Block {
            norm1: LayerNorm::new(params, &format!("{name}.norm1"), width),
            qkv: match qkv_bias {
                QkvBias::All => Linear::new(params, &format!("{name}.attn.qkv"), width, 3 * width),
                QkvBias::QueryValue => Linear::with_query_value_bias(params, &format!("{name}.attn"), width),
            },
            proj: Linear::new(params, &format!("{name}.attn.proj"), width, width),
            norm2: LayerNorm::new(params, &format!("{name}.norm2"), width),
            fc1: Linear::new(params, &format!("{name}.mlp.fc1"), width, hidden_width),
            fc2: Linear::new(params, &format!("{name}.mlp.fc2"), hidden_width, width),
            heads,
            activation: Gelu::Exact,
            causal: false,
        }
    }

    /// Replaces the activation, by default the exact GELU.
    pub fn with_activation(self, activation: Gelu) -> Self {
        Block { activation, ..self }
    }

    /// Enables or disables causal attention, by default disabled.
    pub fn with_causal(self, causal: bool) -> Self {
        Block { causal, ..self }
    }

    /// Computes the outputs of the tokens from `from` on, which attend to all tokens → [B, S − from, D]. The outputs of
    /// other tokens are not computed.
    pub fn forward(&self, w: &Weights, residual: &Residual, from: i64) -> Result<Residual> {
        let (x, normalized) = residual.add_and_normalize(w, &self.norm1)?;
        let qkv = self.qkv.forward(w, &normalized)?; // [B, S, 3D]
        let attended = if self.causal {
            causal_attention(&qkv, self.heads)?.narrow(1, from, qkv.size()[1] - from)
        } else {
            attention(&qkv, self.heads, from)?
        };
        let attended = self.proj.forward(w, &attended)?; // [B, S − from, D]
        let x = x.narrow(1, from, x.size()[1] - from);
        let (x, normalized) = self.norm2.forward_add(w, &x, &attended)?;
        let hidden = self.fc1.forward_gelu(w, &normalized, self.activation)?;
        Ok(Residual { x, pending: Some(self.fc2.forward(w, &hidden)?) })
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
