//! The only list of methods.

use super::{Method, Needs, audio_mae, flip, mae, omnimae, videomae};
use crate::fault::Result;
use crate::grid::{Grid, Input};
use crate::part::encoder::text;
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
    Flip(flip::Config),
    OmniMae(omnimae::Config),
}

impl Config {
    /// What in its numbers does not fit, told before any work begins.
    pub fn check(&self, grid: &Grid) -> Result<()> {
        match self {
            Config::Mae(config) => config.check("method.mae", grid),
            Config::VideoMae(config) => config.check("method.videomae", grid),
            Config::AudioMae(config) => config.check("method.audio_mae", grid),
            Config::OmniMae(config) => config.check("method.omnimae", grid),
            Config::Flip(config) => config.check("method.flip", grid),
        }
    }

    /// What it asks of a run.
    pub fn needs(&self) -> Needs {
        match self {
            Config::Flip(_) => flip::Config::NEEDS,
            _ => Needs { whole_batch: false, pictures: true },
        }
    }

    /// The text tower, of a method that reads captions: the config must say how, and samples must have some.
    pub fn text(&self) -> Option<&text::Config> {
        match self {
            Config::Flip(config) => Some(&config.text),
            _ => None,
        }
    }

    /// Whether it reads still pictures beside clips.
    pub fn stills(&self) -> bool {
        matches!(self, Config::OmniMae(_))
    }

    /// The method, or what in its numbers or in the input does not fit.
    pub fn build(&self, input: &Input) -> Result<Box<dyn Method>> {
        Ok(match self {
            Config::Mae(config) => Box::new(mae::Mae::new(config, input)?),
            Config::VideoMae(config) => Box::new(videomae::VideoMae::new(config, input)?),
            Config::AudioMae(config) => Box::new(audio_mae::AudioMae::new(config, input)?),
            Config::Flip(config) => Box::new(flip::Flip::new(config, input)?),
            Config::OmniMae(config) => Box::new(omnimae::OmniMae::new(config, input)?),
        })
    }
}
