//! OmniMAE: Girdhar, El-Nouby, Singh, Alwala, Joulin, Misra, "OmniMAE: Single Model Masked Pretraining on Images and
//! Videos", CVPR 2023. An image is a clip of one time slot; a step is of images or of clips. Random tokens are hidden,
//! in clips anywhere in space and time; mask tokens join at the encoder's width. Agrees with `transformers`' VideoMAE
//! layers.

use super::prelude::*;
use crate::part::mask::ByFrames;

/// The config's `method.omnimae`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder (B 768 wide, 12 deep, 12 heads; L 1024, 24, 16; H 1280, 32, 16 with patches of 14 pixels).
    pub encoder: Shape,
    /// Decoder (official code: B 384 wide, 4 deep, 16 heads; L 512, 4, 16; H 512, 8, 16).
    pub decoder: Shape,
    /// For images (official recipe 0.75; the paper also reports 0.9).
    #[serde(default = "Config::image_mask")]
    pub image_mask: Ratio,
    /// For clips (official recipe 0.9; the paper also reports 0.95).
    #[serde(default = "Config::clip_mask")]
    pub clip_mask: Ratio,
    /// Normalized by channel when left out.
    #[serde(default = "Config::target")]
    pub target: pixel::Config,
}

impl Config {
    fn image_mask() -> Ratio {
        Ratio { ratio: 0.75 }
    }
    fn clip_mask() -> Ratio {
        Ratio { ratio: 0.9 }
    }
    fn target() -> pixel::Config {
        pixel::Config { normalize: true }
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "omnimae";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        if grid.frames < 2 {
            return Err(Error::usage(format!(
                "input.frames makes one time slot of {} frames, as an image has; {at} reads clips beside images: give it \
                 more frames, or choose a method for images",
                grid.patch_frames
            )));
        }
        let image = Grid { frames: 1, ..*grid };
        let visible = image.visible_ceil(self.image_mask.ratio);
        self.image_mask.check(&format!("{at}.image_mask"), image.tokens(), visible, 0.75)?;
        let visible = grid.visible_ceil(self.clip_mask.ratio);
        self.clip_mask.check(&format!("{at}.clip_mask"), grid.tokens(), visible, 0.9)
    }

    fn requirements(&self) -> Requirements<'_> {
        Requirements { images_beside_video: true, ..Requirements::default() }
    }

    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(OmniMae::new(self, input)?))
    }
}

/// OmniMAE for one input shape.
pub struct OmniMae {
    pub model: Autoencoder,
    mask: ByFrames<RandomMask, RandomMask>,
}

impl OmniMae {
    /// Builds the model and its mask.
    pub fn new(config: &Config, input: &InputConfig) -> Result<OmniMae> {
        let patchify = Patchify::new(input)?;
        config.check("method.omnimae", &patchify.grid)?;
        // Both position tables have the encoder's width.
        let positions = || position::sincos_1d(&patchify.grid, config.encoder.width);
        let mask_token = Some(Init::Zero);
        let head_init = Init::Normal(0.02);
        let decoder =
            DecoderOptions { mask_token, mask_before_embed: true, head_init, ..DecoderOptions::new(positions()) };
        let target = if config.target.normalize { PixelTarget::PerChannelEpsInside } else { PixelTarget::Raw01 };
        let encoder = VitOptions::new(positions());
        let model = Autoencoder::new(patchify, &config.encoder, encoder, &config.decoder, decoder, target);
        let mask = |ratio| RandomMask { ratio, truncate_hidden: true };
        let mask = ByFrames { image: mask(config.image_mask.ratio), clip: mask(config.clip_mask.ratio) };
        Ok(OmniMae { model, mask })
    }
}

impl Method for OmniMae {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let x = batch.view(); // [B, C, T, Y, X]
        let mask = self.mask.sample(step, &self.model.patchify.grid_of(x), batch)?; // keep [B, K], drop [B, M]
        let pred = self.model.predict(step.weights, x, &mask)?; // [B, M, P]
        // The mean over each sample's hidden tokens, so that an image counts as much as a clip.
        let sum = masked_mse(&pred, &self.model.target(x, &mask)?)? / mask.drop.size()[1] as f64;
        Ok(LossOutput::term("pixel", sum, Per::Sample))
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { reconstruct: Some(&self.model), ..Capabilities::default() }
    }
}
