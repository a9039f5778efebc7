//! R-MAE: Kong, Zhang, "Understanding Masked Image Modeling via Learning Occlusion Invariant Feature", CVPR 2023: MAE
//! as a siamese network whose views are a random mask and its complement. This is our reading: the paper has no code,
//! and its body was not within our reach. With a second decoder that returns the target it is MAE exactly, and without
//! the anchor constant decoders would be a solution; both are tests (`tests/method/rmae.rs`).

use super::prelude::*;

/// The config's `method.rmae`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder of both views.
    pub encoder: Shape,
    /// Both decoders, each with weights of its own.
    pub decoder: Shape,
    /// Share of patches hidden from the first view; the second sees exactly these.
    pub mask: Ratio,
    /// Pixels to predict.
    pub target: pixel::Config,
    /// Weight of the anchor, which holds the second decoder to the pixels.
    #[serde(default = "Config::anchor")]
    pub anchor: f64,
    /// Stops the gradient of the first term at the second decoder's output.
    #[serde(default)]
    pub stop_gradient: bool,
}

impl Config {
    fn anchor() -> f64 {
        1.0
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "rmae";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        self.mask.check(&format!("{at}.mask"), grid.tokens(), grid.visible(self.mask.ratio), 0.75)?;
        check_number(&format!("{at}.anchor"), self.anchor, 0.0..=1e6)?;
        check_image(at, grid)
    }
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(RMae::new(self, input)?))
    }
}

/// R-MAE for one input shape.
pub struct RMae {
    pub model: Autoencoder,
    pub anchor_decoder: VitDecoder,
    mask: RandomMask,
    config: Config,
}

impl RMae {
    /// Builds MAE's model, and a second decoder that predicts the places it sees.
    pub fn new(config: &Config, input: &InputConfig) -> Result<RMae> {
        let patchify = Patchify::new(input)?;
        config.check("method.rmae", &patchify.grid)?;
        let grid = patchify.grid;
        let positions = |shape: &Shape| position::grid_positions(&grid, shape.width, None);
        let encoder = VitOptions { class_token: true, ..VitOptions::new(positions(&config.encoder)) };
        let decoder = || DecoderOptions::new(positions(&config.decoder));
        let target = config.target.patch_target();
        let mut model = Autoencoder::new(patchify, &config.encoder, encoder, &config.decoder, decoder(), target);
        let anchor = DecoderOptions { outputs: OutputTokens::Visible, ..decoder() };
        let inputs = config.encoder.width;
        let anchor_decoder =
            VitDecoder::new(&mut model.params, "anchor_decoder", &grid, inputs, &config.decoder, anchor);
        let mask = RandomMask { ratio: config.mask.ratio, truncate_hidden: false };
        Ok(RMae { model, anchor_decoder, mask, config: config.clone() })
    }
}

impl Method for RMae {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let x = batch.view(); // [B, C, 1, Y, X]
        let w = step.weights;
        let mask = self.mask.sample(step, &self.model.patchify.grid, batch)?; // keep [B, K], drop [B, M]
        let complement = mask.complement();
        let pred = self.model.predict(w, x, &mask)?; // [B, M, P], from the visible patches
        let features = self.model.encode_visible(w, x, &complement)?; // [B, 1+M, D]
        let anchor = self.anchor_decoder.forward(w, &features, &complement)?; // [B, M, P], from themselves
        let target = self.model.target(x, &mask)?; // [B, M, P]
        let other = if self.config.stop_gradient { anchor.detach() } else { anchor.shallow_clone() };
        let siamese = mse_between(&pred, &other);
        let anchor = masked_mse(&anchor, &target)? * self.config.anchor;
        let mut output = LossOutput::term("siamese", siamese, Per::HiddenToken);
        output.terms.push(LossTerm { name: "anchor", sum: anchor, per: Per::HiddenToken });
        Ok(output)
    }
    fn cost(&self, grid: &Grid, _global_batch: u64) -> ModelCost {
        let visible = self.visible(grid);
        let hidden = grid.tokens() - visible;
        let mut cost = self.model.cost(grid, visible);
        cost.parts.push(("second encoder", self.model.encoder_cost(grid, hidden)));
        cost.parts.push(("anchor decoder", self.anchor_decoder.cost(hidden, visible, 1)));
        cost
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { reconstruct: Some(&self.model), ..Capabilities::default() }
    }
}
