//! FLIP: Li, Fan, Hu, Feichtenhofer, He, "Scaling Language-Image Pre-training via Masking", CVPR 2023. CLIP with half
//! or three quarters of each image hidden: the image encoder sees the rest, the text encoder the caption, and each
//! image must find its caption among those of the global batch, as each caption its image. Nothing is reconstructed.
//! With nothing hidden it is CLIP, and the paper's unmasked tuning. Agrees with `open_clip` in loss and gradients
//! (`tests/method/flip.rs`).

use super::prelude::*;
use crate::part::cost::ModelCost;
use crate::part::dual_encoder::{DualEncoder, DualEncoderOptions, TowerStyle};
use crate::part::encoder::text;
use crate::part::loss::contrastive;
use crate::part::mask::NoMask;

/// The config's `method.flip`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Image encoder (paper: B 768 wide, 12 deep, 12 heads; L 1024, 24, 16; H 1280, 32, 16).
    pub encoder: Shape,
    /// Text encoder (paper: 512 wide, 12 deep, 8 heads for B; 768, 12, 12 for L; 1024, 24, 16 for H).
    pub text: text::Config,
    /// Width of the space that both encoders project to (paper: 512 for B, 768 for L, 1024 for H).
    pub embed_dim: i64,
    /// The ratio may be 0: unmasked tuning (§3), with `occlude train --init RUN`.
    #[serde(default = "Config::mask")]
    pub mask: Ratio,
    #[serde(default)]
    pub towers: TowerStyle,
}

impl Config {
    fn mask() -> Ratio {
        Ratio { ratio: 0.5 }
    }
}

impl MethodConfig for Config {
    const NAME: &'static str = "flip";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.text.check(&format!("{at}.text"))?;
        if !(1..=16384).contains(&self.embed_dim) {
            return Err(Error::usage(format!("{at}.embed_dim is {}; it must be in 1..=16384", self.embed_dim)));
        }
        check_image(at, grid)?;
        if self.mask.ratio == 0.0 {
            return Ok(());
        }
        self.mask.check(&format!("{at}.mask"), grid.tokens(), grid.visible(self.mask.ratio), 0.5)
    }

    fn requirements(&self) -> Requirements<'_> {
        Requirements { whole_batch: true, captions: Some(&self.text), ..Requirements::default() }
    }

    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(Flip::new(self, input)?))
    }
}

/// FLIP for one input shape.
pub struct Flip {
    pub model: DualEncoder,
    mask: Box<dyn MaskPolicy>,
}

impl Flip {
    /// Builds the model and its mask.
    pub fn new(config: &Config, input: &InputConfig) -> Result<Flip> {
        let patchify = Patchify::new(input)?;
        config.check("method.flip", &patchify.grid)?;
        let options = DualEncoderOptions {
            style: config.towers,
            image: config.encoder,
            text: config.text,
            embed_dim: config.embed_dim,
        };
        let ratio = config.mask.ratio;
        let mask: Box<dyn MaskPolicy> =
            if ratio == 0.0 { Box::new(NoMask) } else { Box::new(RandomMask { ratio, truncate_hidden: false }) };
        Ok(Flip { model: DualEncoder::new(patchify, options), mask })
    }
}

impl Method for Flip {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let model = &self.model;
        let w = step.weights;
        let ids = batch.captions()?; // [B, L]
        let mask = self.mask.sample(step, &model.patchify.grid, batch)?; // keep [B, K]
        let visible = model.patchify.patches_at(batch.view(), &mask.keep, w.kind())?; // [B, K, P]
        let images = model.encode_images(w, &visible, &mask)?; // [B, E]
        let visible = model.sample_visible_tokens(ids, batch.seed, &batch.keys); // [B, K], where some are hidden
        let captions = model.encode_captions(w, ids, visible.as_ref())?; // [B, E]
        let sum = contrastive(&images, &captions, &model.logit_scale(w), &step.ranks)?;
        Ok(LossOutput::term("contrast", sum, Per::Sample))
    }
    fn cost(&self, grid: &Grid, global_batch: u64) -> ModelCost {
        self.model.cost_with_loss(grid, self.visible(grid), global_batch as i64)
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { image_text: Some(&self.model), gathers: true, ..Capabilities::default() }
    }
}
