//! Token geometry for every modality, and the one legend of shape letters.
//!
//! | letter | meaning |
//! |---|---|
//! | B | samples in a batch |
//! | N | tokens of a sample, class token not counted |
//! | K | tokens kept (visible) |
//! | M | tokens dropped (hidden), N = K + M |
//! | S | tokens of a sequence as a block sees it, class token counted |
//! | D | width |
//! | H | heads |
//! | P | values per patch |
//! | C, T, Y, X | channels, frames, height and width of a sample in pixels |
//!
//! "ratio" is always the share of tokens hidden. An image is a clip of one frame; a spectrogram is an image of one
//! channel.

use crate::fault::{Fault, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a model sees of one sample, in pixels: the config's `input`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Channels: 3 for colour, 1 for grey.
    #[serde(default = "Input::three")]
    pub channels: i64,
    /// Frames of a clip; 1 for an image.
    #[serde(default = "Input::one")]
    pub frames: i64,
    pub height: i64,
    pub width: i64,
    /// Side of a square patch, in pixels.
    pub patch: i64,
    /// Frames that one token covers; 1 for an image.
    #[serde(default = "Input::one")]
    pub patch_frames: i64,
    /// Mean of each channel, pixels read as 0..1; ImageNet's for colour and 0.5 otherwise when left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mean: Vec<f64>,
    /// Deviation of each channel, as `mean`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub std: Vec<f64>,
}

impl Input {
    fn one() -> i64 {
        1
    }
    fn three() -> i64 {
        3
    }

    /// Mean and deviation per channel, or what does not fit.
    pub fn scale(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let count = self.channels as usize;
        let fill = |given: &[f64], colour: [f64; 3], name: &str| match given.len() {
            0 if count == 3 => Ok(colour.to_vec()),
            0 => Ok(vec![0.5; count]),
            n if n == count => Ok(given.to_vec()),
            n => Err(Fault::usage(format!("input.{name} has {n} values for {count} channels; give one for each"))),
        };
        let mean = fill(&self.mean, [0.485, 0.456, 0.406], "mean")?;
        let std = fill(&self.std, [0.229, 0.224, 0.225], "std")?;
        if let Some(bad) = std.iter().find(|&&std| !(std > 0.0 && std.is_finite())) {
            return Err(Fault::usage(format!("input.std holds {bad}; a deviation must be above 0")));
        }
        Ok((mean, std))
    }

    /// The grid of tokens, or what does not divide.
    pub fn grid(&self) -> Result<Grid> {
        let Input { channels, frames, height, width, patch, patch_frames, .. } = *self;
        for (name, value, most) in [
            ("channels", channels, 64),
            ("frames", frames, 4096),
            ("height", height, 8192),
            ("width", width, 8192),
            ("patch", patch, 1024),
            ("patch_frames", patch_frames, 1024),
        ] {
            if !(1..=most).contains(&value) {
                return Err(Fault::usage(format!("input.{name} is {value}; it must lie in 1..={most}")));
            }
        }
        for (name, size, by, part) in [
            ("height", height, patch, "patch"),
            ("width", width, patch, "patch"),
            ("frames", frames, patch_frames, "patch_frames"),
        ] {
            if size % by != 0 {
                let near = (size / by).max(1) * by;
                return Err(Fault::usage(format!(
                    "input.{name} is {size}, which input.{part} = {by} does not divide; the nearest that fits is {near}"
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

/// Tokens in row-major order (frame, row, column), and what each covers.
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
    /// N.
    pub fn tokens(&self) -> i64 {
        self.frames * self.rows * self.cols
    }
    /// P: values per patch, in the order (frame, row, column, channel).
    pub fn values(&self) -> i64 {
        self.patch_frames * self.patch * self.patch * self.channels
    }
    /// [C, T, Y, X] of one sample in pixels.
    pub fn pixels(&self) -> [i64; 4] {
        [self.channels, self.frames * self.patch_frames, self.rows * self.patch, self.cols * self.patch]
    }
    /// K at a ratio: N·(1 − ratio), truncated as the official code does (196 tokens at 0.75 keep 49).
    pub fn kept(&self, ratio: f64) -> i64 {
        (self.tokens() as f64 * (1.0 - ratio)) as i64
    }
    /// K at a ratio where what is hidden is truncated: N − ⌊N·ratio⌋ (1,568 tokens at 0.9 keep 157).
    pub fn kept_at_least(&self, ratio: f64) -> i64 {
        self.tokens() - (self.tokens() as f64 * ratio) as i64
    }
    /// Of a still picture beside such clips: one frame.
    pub fn still(&self) -> Grid {
        Grid { frames: 1, patch_frames: 1, ..*self }
    }
    /// Of the rows · cols places of a time slot, those kept at a ratio: what is hidden is truncated, as the official
    /// VideoMAE code does (196 places at 0.9 keep 20).
    pub fn kept_places(&self, ratio: f64) -> i64 {
        let places = self.rows * self.cols;
        places - (places as f64 * ratio) as i64
    }
}
