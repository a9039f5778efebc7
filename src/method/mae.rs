//! MAE: He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. Three
//! quarters of the patches are hidden; the encoder sees the rest; a small decoder predicts the pixels of the hidden
//! ones. Agrees with `transformers`' ViTMAEForPreTraining in loss and gradients (`tests/method/mae.rs`).

use super::prelude::*;

/// The config's `method.mae`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder (paper: B 768 wide, 12 deep, 12 heads; L 1024, 24, 16; H 1280, 32, 16).
    pub encoder: Shape,
    /// Decoder (paper: 512 wide, 8 deep, 16 heads for every encoder).
    #[serde(default = "Config::decoder")]
    pub decoder: Shape,
    #[serde(default = "Config::mask")]
    pub mask: Ratio,
    #[serde(default = "Config::target")]
    pub target: pixel::Config,
    /// Mask tokens enter in the decoder, or already in the encoder (paper, table 1c: slower and less accurate).
    #[serde(default)]
    pub mask_tokens: MaskTokens,
    /// The grid [rows, columns] of the training, where it differs: positions are interpolated to this input's grid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_grid: Option<[i64; 2]>,
}

/// The place at which mask tokens enter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MaskTokens {
    #[default]
    Decoder,
    Encoder,
}

impl Config {
    fn decoder() -> Shape {
        Shape { width: 512, depth: 8, heads: 16, mlp_ratio: 4 }
    }
    fn mask() -> Ratio {
        Ratio { ratio: 0.75 }
    }
    fn target() -> pixel::Config {
        pixel::Config { normalize: false }
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "mae";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        position::check_trained_grid(&format!("{at}.trained_grid"), self.trained_grid)?;
        self.mask.check(&format!("{at}.mask"), grid.tokens(), grid.visible(self.mask.ratio), 0.75)?;
        check_image(at, grid)
    }

    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(Mae::new(self, input)?))
    }
}

/// MAE for one input shape.
pub struct Mae {
    pub model: Autoencoder,
    mask: RandomMask,
}

impl Mae {
    /// Builds the model and its mask.
    pub fn new(config: &Config, input: &InputConfig) -> Result<Mae> {
        let patchify = Patchify::new(input)?;
        config.check("method.mae", &patchify.grid)?;
        let positions = |shape: &Shape| position::grid_positions(&patchify.grid, shape.width, config.trained_grid);
        let in_encoder = config.mask_tokens == MaskTokens::Encoder;
        let encoder = VitOptions {
            class_token: true,
            mask_tokens_in_encoder: in_encoder,
            ..VitOptions::new(positions(&config.encoder))
        };
        let mask_token = (!in_encoder).then_some(Init::Normal(0.02));
        let decoder = DecoderOptions { mask_token, ..DecoderOptions::new(positions(&config.decoder)) };
        let target = config.target.patch_target();
        let model = Autoencoder::new(patchify, &config.encoder, encoder, &config.decoder, decoder, target);
        Ok(Mae { model, mask: RandomMask { ratio: config.mask.ratio, truncate_hidden: false } })
    }
}

impl Method for Mae {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let x = batch.view(); // [B, C, 1, Y, X]
        let mask = self.mask.sample(step, &self.model.patchify.grid, batch)?; // keep [B, K], drop [B, M]
        let pred = self.model.predict(step.weights, x, &mask)?; // [B, M, P]
        let target = self.model.target(x, &mask)?; // [B, M, P]
        Ok(LossOutput::term("pixel", masked_mse(&pred, &target)?, Per::HiddenToken))
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { reconstruct: Some(&self.model), ..Capabilities::default() }
    }
}
