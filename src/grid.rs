//! Token geometry of every modality, and the shape letters that all comments use.
//!
//! | letter | meaning |
//! |---|---|
//! | B | samples in a batch |
//! | N | tokens of a sample, without the class token |
//! | K | visible tokens (kept by the mask) |
//! | M | masked tokens, N = K + M |
//! | S | tokens of a sequence inside a block, with the class token |
//! | D | width |
//! | H | heads |
//! | P | values per patch |
//! | C, T, Y, X | channels, frames, height and width of a sample in pixels |
//!
//! "ratio" always means the fraction of masked tokens. An image is a clip of one frame; a spectrogram is an image with
//! one channel.

use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Shape and normalization of one input sample: the config's `input`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InputConfig {
    /// Number of channels: 3 for color, 1 for grayscale.
    #[serde(default = "InputConfig::three")]
    pub channels: i64,
    /// Number of frames of a clip; 1 for an image.
    #[serde(default = "InputConfig::one")]
    pub frames: i64,
    /// Height in pixels.
    pub height: i64,
    /// Width in pixels.
    pub width: i64,
    /// Side of a square patch, in pixels.
    pub patch: i64,
    /// Number of frames per token; 1 for an image.
    #[serde(default = "InputConfig::one")]
    pub patch_frames: i64,
    /// Mean of each channel, for pixels in 0..1. Default: ImageNet's for 3 channels, otherwise 0.5.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mean: Vec<f64>,
    /// Standard deviation of each channel, for pixels in 0..1. Default: ImageNet's for 3 channels, otherwise 0.5.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub std: Vec<f64>,
}

impl InputConfig {
    fn one() -> i64 {
        1
    }
    fn three() -> i64 {
        3
    }

    /// Returns the mean and the standard deviation of each channel.
    ///
    /// # Errors
    /// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if their number is not the number of channels, or if a
    /// standard deviation is not positive and finite.
    pub fn mean_std(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let mean = self.per_channel(&self.mean, [0.485, 0.456, 0.406], "mean")?;
        let std = self.per_channel(&self.std, [0.229, 0.224, 0.225], "std")?;
        if let Some(bad) = std.iter().find(|&&std| !(std > 0.0 && std.is_finite())) {
            return Err(Error::usage(format!("input.std holds {bad}; a standard deviation must be above 0")));
        }
        Ok((mean, std))
    }

    /// Returns `values`, or the default if there are none: `rgb` for 3 channels, otherwise 0.5 for each channel.
    fn per_channel(&self, values: &[f64], rgb: [f64; 3], name: &str) -> Result<Vec<f64>> {
        let channels = self.channels as usize;
        match values.len() {
            0 if channels == 3 => Ok(rgb.to_vec()),
            0 => Ok(vec![0.5; channels]),
            n if n == channels => Ok(values.to_vec()),
            n => Err(Error::usage(format!("input.{name} has {n} values for {channels} channels; give one for each"))),
        }
    }

    /// Returns the grid of tokens.
    ///
    /// # Errors
    /// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if a size is out of range or not a multiple of its patch
    /// size.
    pub fn grid(&self) -> Result<Grid> {
        let InputConfig { channels, frames, height, width, patch, patch_frames, .. } = *self;
        for (name, value, max) in [
            ("channels", channels, 64),
            ("frames", frames, 4096),
            ("height", height, 8192),
            ("width", width, 8192),
            ("patch", patch, 1024),
            ("patch_frames", patch_frames, 1024),
        ] {
            if !(1..=max).contains(&value) {
                return Err(Error::usage(format!("input.{name} is {value}; it must be in 1..={max}")));
            }
        }
        for (name, size, divisor, divisor_name) in [
            ("height", height, patch, "patch"),
            ("width", width, patch, "patch"),
            ("frames", frames, patch_frames, "patch_frames"),
        ] {
            if size % divisor != 0 {
                let nearest = (size / divisor).max(1) * divisor;
                return Err(Error::usage(format!(
                    "input.{name} is {size}, which is not a multiple of input.{divisor_name} = {divisor}; \
                     try input.{name} = {nearest}"
                )));
            }
        }
        Ok(Grid {
            frames: frames / patch_frames,
            rows: height / patch,
            cols: width / patch,
            channels,
            patch_frames,
            patch,
        })
    }
}

/// The token grid of a sample in row-major order (frame, row, column), and the size of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub frames: i64,
    pub rows: i64,
    pub cols: i64,
    pub channels: i64,
    pub patch_frames: i64,
    pub patch: i64,
}

impl Grid {
    /// Returns N, the number of tokens.
    pub fn tokens(&self) -> i64 {
        self.frames * self.rows * self.cols
    }
    /// Returns P, the number of values per patch, in the order (frame, row, column, channel).
    pub fn patch_values(&self) -> i64 {
        self.patch_frames * self.patch * self.patch * self.channels
    }
    /// Returns the shape [C, T, Y, X] of one sample in pixels.
    pub fn pixel_shape(&self) -> [i64; 4] {
        [self.channels, self.frames * self.patch_frames, self.rows * self.patch, self.cols * self.patch]
    }
    /// Returns K = ⌊N·(1 − ratio)⌋ as the official MAE code does (196 tokens at 0.75: 49 visible).
    pub fn visible(&self, ratio: f64) -> i64 {
        (self.tokens() as f64 * (1.0 - ratio)) as i64
    }
    /// Returns K = N − ⌊N·ratio⌋, which rounds K up (1,568 tokens at 0.9: 157 visible).
    pub fn visible_ceil(&self, ratio: f64) -> i64 {
        self.tokens() - (self.tokens() as f64 * ratio) as i64
    }
    /// Returns the visible tokens of one frame of tokens, rounded up as in the official VideoMAE code (196 tokens at
    /// 0.9: 20 visible).
    pub fn visible_per_frame(&self, ratio: f64) -> i64 {
        let tokens = self.rows * self.cols;
        tokens - (tokens as f64 * ratio) as i64
    }
    /// Returns the grid of an image of the same size: one frame.
    pub fn image(&self) -> Grid {
        Grid { frames: 1, patch_frames: 1, ..*self }
    }
}
