//! Projections of pooled features to embeddings that a contrast compares.

use crate::error::{Error, Result};
use crate::op::at_least_float;
use crate::op::bias_gelu::Gelu;
use crate::part::cost::{self, OpCost};
use crate::part::params::{Linear, ParamSpecs, Weights};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// The config of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Width of the two hidden layers.
    pub hidden: i64,
    /// Width of the embeddings.
    pub embed_dim: i64,
}

impl Default for Config {
    fn default() -> Self {
        Config { hidden: 4096, embed_dim: 256 }
    }
}

impl Config {
    /// Checks the config, which is at `path`.
    ///
    /// # Errors
    /// A usage error if a width is out of range.
    pub fn check(&self, path: &str) -> Result<()> {
        for (name, value) in [("hidden", self.hidden), ("embed_dim", self.embed_dim)] {
            if !(1..=65536).contains(&value) {
                return Err(Error::usage(format!("{path}.{name} is {value}; it must lie in 1..=65536")));
            }
        }
        Ok(())
    }
}

/// Three linear layers with exact GELU between them, and a vector of length one at the end.
pub struct Projection {
    layers: [Linear; 3],
    widths: [i64; 4],
}

impl Projection {
    /// Declares `<name>.fc1`, `.fc2` and `.fc3`, from `inputs` over the hidden width twice to the embeddings.
    pub fn new(params: &mut ParamSpecs, name: &str, inputs: i64, config: Config) -> Projection {
        let widths = [inputs, config.hidden, config.hidden, config.embed_dim];
        let layers = std::array::from_fn(|layer| {
            Linear::new(params, &format!("{name}.fc{}", layer + 1), widths[layer], widths[layer + 1])
        });
        Projection { layers, widths }
    }

    /// x [B, D] → unit vectors, fp32 [B, E].
    pub fn forward(&self, w: &Weights, x: &Tensor) -> Result<Tensor> {
        let [fc1, fc2, fc3] = &self.layers;
        let hidden = fc2.forward_gelu(w, &fc1.forward_gelu(w, x, Gelu::Exact)?, Gelu::Exact)?;
        let x = at_least_float(&fc3.forward(w, &hidden)?);
        Ok(&x / x.norm_scalaropt_dim(2.0, [-1i64].as_slice(), true).clamp_min(1e-12))
    }

    /// Returns the operations on one sample.
    pub fn cost(&self) -> Vec<OpCost> {
        self.widths.windows(2).map(|ends| cost::linear(1, ends[0], ends[1])).collect()
    }
}
