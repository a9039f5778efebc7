//! VideoMAE: Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised
//! Video Pre-Training", NeurIPS 2022. A clip is cut into cubes; nine tenths of the places are hidden, the same in every
//! time slot; the encoder attends over the visible cubes of all slots jointly; a small decoder predicts the pixels of
//! the hidden ones. Agrees with `transformers`' VideoMAEForPreTraining in loss and gradients
//! (`tests/method/videomae.rs`).

use super::prelude::*;
use crate::part::mask::TubeMask;

/// The config's `method.videomae`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder (S 384 wide, 12 deep, 6 heads; B 768, 12, 12; L 1024, 24, 16; H 1280, 32, 16).
    pub encoder: Shape,
    /// Decoder: half as wide as the encoder, and 4 deep for S and B, 12 for L and H (official scripts; S 192 wide, 3
    /// heads; B 384, 6; L 512, 8; H 640, 8).
    pub decoder: Shape,
    /// Fraction of the places of a time slot.
    #[serde(default = "Config::mask")]
    pub mask: Ratio,
    /// Normalized by channel when left out.
    #[serde(default = "Config::target")]
    pub target: pixel::Config,
}

impl Config {
    fn mask() -> Ratio {
        Ratio { ratio: 0.9 }
    }
    fn target() -> pixel::Config {
        pixel::Config { normalize: true }
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "videomae";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        let visible = grid.visible_per_frame(self.mask.ratio);
        self.mask.check(&format!("{at}.mask"), grid.rows * grid.cols, visible, 0.9)
    }

    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(VideoMae::new(self, input)?))
    }
}

/// VideoMAE for one input shape.
pub struct VideoMae {
    pub model: Autoencoder,
    mask: TubeMask,
}

impl VideoMae {
    /// Builds the model and its mask.
    pub fn new(config: &Config, input: &InputConfig) -> Result<VideoMae> {
        let patchify = Patchify::new(input)?;
        config.check("method.videomae", &patchify.grid)?;
        let positions = |shape: &Shape| position::sincos_1d(&patchify.grid, shape.width);
        let blocks = StackOptions { qkv_bias: QkvBias::QueryValue, ..StackOptions::default() };
        let encoder = VitOptions {
            // The official initialization skips the patch embedding's convolution: it begins as PyTorch's do.
            embed_init: Init::Uniform(1.0 / (patchify.grid.patch_values() as f64).sqrt()),
            blocks,
            ..VitOptions::new(positions(&config.encoder))
        };
        let decoder = DecoderOptions {
            mask_token: Some(Init::TruncatedNormal(0.02)),
            embed_bias: false,
            blocks,
            ..DecoderOptions::new(positions(&config.decoder))
        };
        let target = if config.target.normalize { PixelTarget::PerChannel } else { PixelTarget::Raw01 };
        let mut model = Autoencoder::new(patchify, &config.encoder, encoder, &config.decoder, decoder, target);
        // Official `no_weight_decay`.
        model.params.no_weight_decay(model.decoder.filler.mask_token.expect("a mask token"));
        Ok(VideoMae { model, mask: TubeMask { ratio: config.mask.ratio } })
    }
}

impl Method for VideoMae {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let x = batch.view(); // [B, C, T, Y, X]
        let mask = self.mask.sample(step, &self.model.patchify.grid, batch)?; // keep [B, K], drop [B, M]
        let pred = self.model.predict(step.weights, x, &mask)?; // [B, M, P]
        let target = self.model.target(x, &mask)?; // [B, M, P]
        Ok(LossOutput::term("pixel", masked_mse(&pred, &target)?, Per::HiddenToken))
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { reconstruct: Some(&self.model), ..Capabilities::default() }
    }
}
