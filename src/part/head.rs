//! Heads: small multi-layer perceptrons on pooled features, for classes and for embeddings.

use crate::error::Result;
use crate::op::bias_gelu::Gelu;
use crate::part::batch_norm::SyncBatchNorm;
use crate::part::buffers::BufferSpecs;
use crate::part::cost::{self, OpCost};
use crate::part::loss::BufferUpdate;
use crate::part::params::{Linear, ParamSpecs};
use crate::part::step::Step;
use tch::Tensor;

/// Activation between the layers of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadActivation {
    /// Batch normalization over all ranks, then ReLU.
    BatchNormRelu,
    /// Exact GELU.
    Gelu,
}

/// Sizes of a head.
#[derive(Clone, Copy, Debug)]
pub struct HeadOptions {
    /// Width of the features.
    pub inputs: i64,
    /// Width of the layers between.
    pub hidden: i64,
    pub outputs: i64,
    /// Linear layers, at least one.
    pub layers: usize,
    pub activation: HeadActivation,
}

/// Linear layers with an activation between each two.
pub struct Head {
    layers: Vec<Linear>,
    norms: Vec<SyncBatchNorm>,
    options: HeadOptions,
}

impl Head {
    /// Declares `<name>.<i>`, and `<name>.norm.<i>` where layers are normalized.
    pub fn new(params: &mut ParamSpecs, buffers: &mut BufferSpecs, name: &str, options: HeadOptions) -> Head {
        let HeadOptions { inputs, hidden, outputs, layers, activation } = options;
        let width = |end: usize| {
            if end == 0 {
                inputs
            } else if end == layers {
                outputs
            } else {
                hidden
            }
        };
        let mut head = Head { layers: Vec::new(), norms: Vec::new(), options };
        for layer in 0..layers {
            head.layers.push(Linear::new(params, &format!("{name}.{layer}"), width(layer), width(layer + 1)));
            if activation == HeadActivation::BatchNormRelu && layer + 1 < layers {
                head.norms.push(SyncBatchNorm::new(params, buffers, &format!("{name}.norm.{layer}"), hidden));
            }
        }
        head
    }

    /// x [B, D] → [B, outputs]. Adds the updates of running statistics.
    pub fn forward(&self, step: &Step, x: &Tensor, updates: &mut Vec<BufferUpdate>) -> Result<Tensor> {
        let (last, inner) = self.layers.split_last().expect("a layer");
        let mut x = x.shallow_clone();
        for (index, layer) in inner.iter().enumerate() {
            x = match self.options.activation {
                HeadActivation::BatchNormRelu => {
                    self.norms[index].forward(step, &layer.forward(step.weights, &x)?, updates)?.relu()
                }
                HeadActivation::Gelu => layer.forward_gelu(step.weights, &x, Gelu::Exact)?,
            };
        }
        last.forward(step.weights, &x)
    }

    /// Returns the operations on one sample.
    pub fn cost(&self) -> Vec<OpCost> {
        let HeadOptions { inputs, hidden, outputs, layers, .. } = self.options;
        let width = |end: usize| {
            if end == 0 {
                inputs
            } else if end == layers {
                outputs
            } else {
                hidden
            }
        };
        let mut ops = Vec::new();
        for layer in 0..layers {
            ops.push(cost::linear(1, width(layer), width(layer + 1)));
            if layer + 1 < layers {
                ops.push(cost::layer_norm(1, hidden));
            }
        }
        ops
    }
}
