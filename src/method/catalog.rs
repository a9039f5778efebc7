//! The only list of methods.

use super::{Method, audio_mae, mae, videomae};
use crate::fault::Result;
use crate::grid::{Grid, Input};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The config's `method`: its name and its numbers, `{"mae": {..}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Config {
    Mae(mae::Config),
    VideoMae(videomae::Config),
    #[serde(rename = "audio_mae")]
    AudioMae(audio_mae::Config),
}

impl Config {
    /// What in its numbers does not fit, told before any work begins.
    pub fn check(&self, grid: &Grid) -> Result<()> {
        match self {
            Config::Mae(config) => config.check("method.mae", grid),
            Config::VideoMae(config) => config.check("method.videomae", grid),
            Config::AudioMae(config) => config.check("method.audio_mae", grid),
        }
    }

    /// The method, or what in its numbers or in the input does not fit.
    pub fn build(&self, input: &Input) -> Result<Box<dyn Method>> {
        Ok(match self {
            Config::Mae(config) => Box::new(mae::Mae::new(config, input)?),
            Config::VideoMae(config) => Box::new(videomae::VideoMae::new(config, input)?),
            Config::AudioMae(config) => Box::new(audio_mae::AudioMae::new(config, input)?),
        })
    }
}
