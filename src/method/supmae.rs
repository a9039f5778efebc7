//! SupMAE: Liang, Li, Marculescu, "SupMAE: Supervised Masked Autoencoders Are Efficient Vision Learners", 2022. MAE
//! with a second branch that classifies the mean of the visible patches' features. Agrees with `transformers`' ViTMAE
//! and torch's BatchNorm1d (`tests/method/supmae.rs`). Batch statistics are the global batch's, where the official
//! code's are each GPU's: our own choice.

use super::prelude::*;

/// The config's `method.supmae`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder (paper: B 768 wide, 12 deep, 12 heads).
    pub encoder: Shape,
    /// Decoder (paper: 512 wide, 1 deep, 16 heads).
    pub decoder: Shape,
    /// Share of patches hidden (paper: 0.75).
    pub mask: Ratio,
    /// Pixels to predict (paper: normalized).
    pub target: pixel::Config,
    /// Number of classes; a sample without label has no part in the class term.
    pub classes: i64,
    /// Weight of the class term (paper: 0.01).
    #[serde(default = "Config::class_weight")]
    pub class_weight: f64,
    /// Divisor of the logits (official code: 10).
    #[serde(default = "Config::temperature")]
    pub temperature: f64,
}

impl Config {
    fn class_weight() -> f64 {
        0.01
    }
    fn temperature() -> f64 {
        10.0
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "supmae";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        self.mask.check(&format!("{at}.mask"), grid.tokens(), grid.visible(self.mask.ratio), 0.75)?;
        check_number(&format!("{at}.classes"), self.classes as f64, 2.0..=1e6)?;
        check_number(&format!("{at}.class_weight"), self.class_weight, 0.0..=1e3)?;
        check_number(&format!("{at}.temperature"), self.temperature, 1e-3..=1e3)?;
        check_image(at, grid)
    }
    fn requirements(&self) -> Requirements<'_> {
        Requirements { whole_batch: true, classes: Some(self.classes), ..Requirements::default() }
    }
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(SupMae::new(self, input)?))
    }
}

/// SupMAE for one input shape.
pub struct SupMae {
    pub model: Autoencoder,
    mask: RandomMask,
    head: Head,
    buffers: BufferSpecs,
    config: Config,
}

impl SupMae {
    /// Builds MAE's model, and the head of classes beside its decoder.
    pub fn new(config: &Config, input: &InputConfig) -> Result<SupMae> {
        let patchify = Patchify::new(input)?;
        config.check("method.supmae", &patchify.grid)?;
        let width = config.encoder.width;
        let positions = |shape: &Shape| position::grid_positions(&patchify.grid, shape.width, None);
        let encoder = VitOptions { class_token: true, ..VitOptions::new(positions(&config.encoder)) };
        let decoder = DecoderOptions::new(positions(&config.decoder));
        let target = config.target.patch_target();
        let mut model = Autoencoder::new(patchify, &config.encoder, encoder, &config.decoder, decoder, target);
        let mut buffers = BufferSpecs::default();
        let head = HeadOptions { inputs: width, hidden: 4 * width, outputs: config.classes };
        let head = Head::new(&mut model.params, &mut buffers, "head", head);
        let mask = RandomMask { ratio: config.mask.ratio, truncate_hidden: false };
        Ok(SupMae { model, mask, head, buffers, config: config.clone() })
    }
}

impl Method for SupMae {
    model_and_mask!();
    fn buffers(&self) -> BufferSpecs {
        self.buffers.clone()
    }
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let x = batch.view(); // [B, C, 1, Y, X]
        let w = step.weights;
        let mask = self.mask.sample(step, &self.model.patchify.grid, batch)?; // keep [B, K], drop [B, M]
        let features = self.model.encode_visible(w, x, &mask)?; // [B, 1+K, D]
        let pred = self.model.decoder.forward(w, &features, &mask)?; // [B, M, P]
        let pixel = masked_mse(&pred, &self.model.target(x, &mask)?)?;
        let pooled = features.narrow(1, 1, mask.keep.size()[1]).mean_dim(1, false, features.kind()); // [B, D]
        let mut output = LossOutput::term("pixel", pixel, Per::HiddenToken);
        let logits = self.head.forward(step, &pooled, &mut output.buffers)? / self.config.temperature; // [B, classes]
        let class = cross_entropy(&logits, batch.labels()?) * self.config.class_weight;
        output.terms.push(LossTerm { name: "class", sum: class, per: Per::Labeled });
        Ok(output)
    }
    fn cost(&self, grid: &Grid, _global_batch: u64) -> ModelCost {
        let mut cost = self.model.cost(grid, self.visible(grid));
        cost.parts.push(("head", self.head.cost()));
        cost
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            reconstruct: Some(&self.model),
            gathers: true,
            varying_denominators: true,
            ..Capabilities::default()
        }
    }
}
