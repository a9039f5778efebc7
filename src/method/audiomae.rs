//! Audio-MAE: Huang, Xu, Li, Baevski, Auli, Galuba, Metze, Feichtenhofer, "Masked Autoencoders that Listen", NeurIPS
//! 2022. MAE on log-mel spectrograms with four fifths of the patches hidden; in the decoder tokens attend within
//! windows. Agrees with timm's blocks put together (`tests/method/audiomae.rs`). Beyond the paper, padding is ignored.

use super::prelude::*;
use crate::part::decoder::{Attention, Decode};
use crate::part::encoder::position::PositionAxes;
use crate::part::mask::TimeFrequencyMask;
use crate::part::ragged::Padding;

/// The config's `method.audiomae`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder (paper: S 384 wide, 12 deep, 6 heads; B 768, 12, 12; L 1024, 24, 16).
    pub encoder: Shape,
    /// Decoder (paper: 512 wide, 16 heads; 16 deep with windows, 8 without).
    #[serde(default = "Config::decoder")]
    pub decoder: Shape,
    /// Attention of the decoder: "global", or {"windows": {"size": [4, 4], "shift": [2, 0]}}, the paper's and the
    /// default.
    #[serde(default)]
    pub attention: Attention,
    #[serde(default)]
    pub mask: TimeFrequencyMask,
    #[serde(default = "Config::target")]
    pub target: pixel::Config,
    /// Positions by time and frequency, "grid", the default; "swapped" as in the official code.
    #[serde(default)]
    pub positions: PositionAxes,
    /// Patches beyond the end of a short clip: "ignore", the default, or "keep" as in the official code.
    #[serde(default)]
    pub padding: Padding,
}

impl Config {
    fn decoder() -> Shape {
        Shape { width: 512, depth: 16, heads: 16, mlp_ratio: 4 }
    }
    fn target() -> pixel::Config {
        pixel::Config { normalize: true }
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "audiomae";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        self.mask.check(&format!("{at}.mask"), grid)?;
        self.attention.check(&format!("{at}.attention"), grid)?;
        if grid.frames * grid.patch_frames != 1 || grid.channels != 1 {
            return Err(Error::usage(format!(
                "{at} reads spectrograms; set input.channels to 1, and leave frames out"
            )));
        }
        Ok(())
    }

    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(AudioMae::new(self, input)?))
    }
}

/// Audio-MAE for one input shape.
pub struct AudioMae {
    pub model: Autoencoder<Box<dyn Decode>>,
    mask: TimeFrequencyMask,
}

impl AudioMae {
    /// Builds the model and its mask.
    pub fn new(config: &Config, input: &InputConfig) -> Result<AudioMae> {
        let patchify = Patchify::new(input)?.with_padding(config.padding);
        let grid = patchify.grid;
        config.check("method.audiomae", &grid)?;
        let positions = |shape: &Shape| config.positions.positions(&grid, shape.width);
        let encoder = VitOptions { class_token: true, ..VitOptions::new(positions(&config.encoder)) };
        let decoder = DecoderOptions::new(positions(&config.decoder));
        let target = if config.target.normalize { PixelTarget::PerPatch } else { PixelTarget::Standardized };
        let model = Autoencoder::with_decoder(patchify, &config.encoder, encoder, target, |params| {
            config.attention.build(params, &grid, config.encoder.width, &config.decoder, decoder)
        })?;
        Ok(AudioMae { model, mask: config.mask })
    }
}

impl Method for AudioMae {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        // Samples of one length at a time.
        let sums = self.model.patchify.groups(batch)?.into_iter().map(|group| {
            let x = group.batch.view(); // [n, 1, 1, Y, X]
            let mask = self.mask.sample(step, &group.grid, &group.batch)?; // keep [n, K], drop [n, M]
            masked_mse(&self.model.predict(step.weights, x, &mask)?, &self.model.target(x, &mask)?)
        });
        let sum = sums.reduce(|a, b| Ok(a? + b?)).expect("a group")?;
        Ok(LossOutput::term("pixel", sum, Per::HiddenToken))
    }
    fn capabilities(&self) -> Capabilities<'_> {
        let ragged = "padding is ignored, so that the lengths of clips decide what a step does";
        let not_capturable = (self.model.patchify.padding == Padding::Ignore).then_some(ragged);
        Capabilities { reconstruct: Some(&self.model), not_capturable, ..Capabilities::default() }
    }
}
