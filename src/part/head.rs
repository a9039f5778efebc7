//! Heads of classes: small perceptrons on pooled features.

use crate::error::Result;
use crate::part::batch_norm::SyncBatchNorm;
use crate::part::buffers::BufferSpecs;
use crate::part::cost::{self, OpCost};
use crate::part::loss::BufferUpdate;
use crate::part::params::{Linear, ParamSpecs};
use crate::part::step::Step;
use tch::Tensor;

/// Widths of a head.
#[derive(Clone, Copy, Debug)]
pub struct HeadOptions {
    /// Width of the features.
    pub inputs: i64,
    pub hidden: i64,
    pub outputs: i64,
}

/// A linear layer, batch normalization over all ranks, ReLU, and a linear layer.
pub struct Head {
    fc1: Linear,
    norm: SyncBatchNorm,
    fc2: Linear,
    options: HeadOptions,
}

impl Head {
    /// Declares `<name>.fc1`, `<name>.norm` and `<name>.fc2`.
    pub fn new(params: &mut ParamSpecs, buffers: &mut BufferSpecs, name: &str, options: HeadOptions) -> Head {
        let HeadOptions { inputs, hidden, outputs } = options;
        Head {
            fc1: Linear::new(params, &format!("{name}.fc1"), inputs, hidden),
            norm: SyncBatchNorm::new(params, buffers, &format!("{name}.norm"), hidden),
            fc2: Linear::new(params, &format!("{name}.fc2"), hidden, outputs),
            options,
        }
    }

    /// x [B, D] → [B, outputs]. Adds the updates of the running statistics.
    pub fn forward(&self, step: &Step, x: &Tensor, updates: &mut Vec<BufferUpdate>) -> Result<Tensor> {
        let hidden = self.fc1.forward(step.weights, x)?; // [B, hidden]
        let hidden = self.norm.forward(step, &hidden, updates)?.relu();
        self.fc2.forward(step.weights, &hidden)
    }

    /// Returns the operations on one sample.
    pub fn cost(&self) -> Vec<OpCost> {
        let HeadOptions { inputs, hidden, outputs } = self.options;
        vec![cost::linear(1, inputs, hidden), cost::layer_norm(1, hidden), cost::linear(1, hidden, outputs)]
    }
}
