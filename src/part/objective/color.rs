//! Colors of pixels as what is to be predicted: each from those before it, or hidden ones from all others.

use crate::error::Result;
use crate::op::noise::noise;
use crate::part::batch::Batch;
use crate::rng::Purpose;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The config's `objective` of a transformer of colors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ColorObjective {
    /// Each pixel from those before it (iGPT, equation 2).
    #[default]
    Autoregressive,
    /// Hidden pixels from all others (iGPT, equation 3).
    Bert(HiddenPixels),
}

/// The pixels that are hidden.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HiddenPixels {
    /// Probability of each pixel to be hidden (paper: 0.15).
    pub ratio: f64,
}

impl HiddenPixels {
    /// Tosses a coin for each pixel → 1 where it is hidden, else 0, fp32 [B, N].
    pub fn sample(&self, batch: &Batch, tokens: i64) -> Result<Tensor> {
        Ok(noise(batch.seed, &batch.keys, Purpose::Token, tokens)?.lt(self.ratio).to_kind(Kind::Float))
    }
}
