//! The transformer block, normalised before each half (Dosovitskiy et al., 2021, equations 2 and 3).

use crate::fault::Result;
use crate::op::attention::attention;
use crate::op::bias_gelu::{Form, bias_gelu};
use crate::part::weights::{Linear, Norm, Table, Weights};
use tch::Tensor;

/// Which of queries, keys and values have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Biases {
    All,
    /// All but the keys.
    QueryValue,
}

pub struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
}

impl Block {
    /// Tensors are called `<name>.norm1.weight` and so on, as in timm.
    pub fn new(table: &mut Table, name: &str, width: i64, heads: i64, hidden: i64, biases: Biases) -> Self {
        Block {
            norm1: Norm::new(table, &format!("{name}.norm1"), width),
            qkv: match biases {
                Biases::All => Linear::new(table, &format!("{name}.attn.qkv"), width, 3 * width),
                Biases::QueryValue => Linear::query_value(table, &format!("{name}.attn"), width),
            },
            proj: Linear::new(table, &format!("{name}.attn.proj"), width, width),
            norm2: Norm::new(table, &format!("{name}.norm2"), width),
            fc1: Linear::new(table, &format!("{name}.mlp.fc1"), width, hidden),
            fc2: Linear::new(table, &format!("{name}.mlp.fc2"), hidden, width),
            heads,
        }
    }

    /// x [B, S, D] → [B, S, D].
    pub fn forward(&self, w: &Weights, x: &Tensor) -> Result<Tensor> {
        self.tail(w, x, 0)
    }

    /// Only the tokens from `from` on → [B, S − from, D]. They attend to all; what nobody reads is not computed.
    pub fn tail(&self, w: &Weights, x: &Tensor, from: i64) -> Result<Tensor> {
        let qkv = self.qkv.forward(w, &self.norm1.forward(w, x))?; // [B, S, 3D]
        let mixed = self.proj.forward(w, &attention(&qkv, self.heads, from))?; // [B, S − from, D]
        let x = x.narrow(1, from, x.size()[1] - from) + mixed;
        let hidden = bias_gelu(&self.fc1.forward(w, &self.norm2.forward(w, &x))?, None, Form::Exact)?;
        Ok(&x + self.fc2.forward(w, &hidden)?)
    }
}
