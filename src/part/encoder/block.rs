//! The transformer block, normalised before each half (Dosovitskiy et al., 2021, equations 2 and 3).

use crate::fault::Result;
use crate::op::attention::{attention, causal};
use crate::op::bias_gelu::Form;
use crate::part::weights::{Linear, Norm, Table, Weights};
use tch::Tensor;

/// Which of queries, keys and values have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Biases {
    All,
    /// All but the keys.
    QueryValue,
}

#[derive(Clone, Copy)]
pub struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    heads: i64,
    form: Form,
    causal: bool,
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
            form: Form::Exact,
            causal: false,
        }
    }

    /// With another unit than the exact one.
    pub fn with_unit(self, form: Form) -> Self {
        Block { form, ..self }
    }

    /// Where a token sees itself and those before it alone.
    pub fn looking_back(self, causal: bool) -> Self {
        Block { causal, ..self }
    }

    /// Only the tokens from `from` on → [B, S − from, D]. They attend to all; what nobody reads is not computed.
    pub fn forward(&self, w: &Weights, stream: &Stream, from: i64) -> Result<Stream> {
        let (x, normal) = stream.normalised(w, &self.norm1)?;
        let qkv = self.qkv.forward(w, &normal)?; // [B, S, 3D]
        let mixed = match self.causal {
            true => causal(&qkv, self.heads)?.narrow(1, from, qkv.size()[1] - from),
            false => attention(&qkv, self.heads, from)?,
        };
        let mixed = self.proj.forward(w, &mixed)?; // [B, S − from, D]
        let (x, normal) = self.norm2.after(w, &x.narrow(1, from, x.size()[1] - from), &mixed)?;
        let hidden = self.fc1.through_gelu(w, &normal, self.form)?;
        Ok(Stream { x, due: Some(self.fc2.forward(w, &hidden)?) })
    }
}

/// What runs from block to block: x [B, S, D] and what is still to be added to it, which the next normalisation does in
/// its own pass.
pub struct Stream {
    pub x: Tensor,
    pub due: Option<Tensor>,
}

impl Stream {
    /// Of what [`tensors`](Self::tensors) gave.
    pub fn of(tensors: &[Tensor]) -> Stream {
        Stream { x: tensors[0].shallow_clone(), due: tensors.get(1).map(Tensor::shallow_clone) }
    }

    /// x and, where there is such, what is due.
    pub fn tensors(&self) -> Vec<Tensor> {
        std::iter::once(&self.x).chain(&self.due).map(Tensor::shallow_clone).collect()
    }

    /// The whole sum, and that normalised.
    pub fn normalised(&self, w: &Weights, norm: &Norm) -> Result<(Tensor, Tensor)> {
        match &self.due {
            Some(due) => norm.after(w, &self.x, due),
            None => Ok((self.x.shallow_clone(), norm.forward(w, &self.x)?)),
        }
    }
}
