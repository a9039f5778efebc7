//! MaskFeat: Wei, Fan, Xie, Wu, Yuille, Feichtenhofer, "Masked Feature Prediction for Self-Supervised Visual
//! Pre-Training", CVPR 2022. Blocks of an image, or cubes of a clip, are replaced by mask tokens; the encoder sees all
//! places and a linear layer predicts histograms of oriented gradients at the hidden ones. Agrees with timm's blocks
//! and histograms of torch's operations (`tests/method/maskfeat.rs`). Every sample hides the same number of tokens, our
//! own choice; the paper's encoder of clips, MViT, is not here.

use super::prelude::*;
use crate::part::objective::draw_hog::draw_hog;
use crate::part::objective::hog::{hidden_hog_target, hog_values};
use tch::Kind;

/// The config's `method.maskfeat`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder (paper: B 768 wide, 12 deep, 12 heads; L 1024, 24, 16).
    pub encoder: Shape,
    /// Blocks hidden (paper: 0.4 of an image; of a clip 0.4 by units of [1, 2, 2] tokens, up to 100 tries).
    pub mask: BlockMask,
}

impl MethodConfig for Config {
    const NAME: &'static str = "maskfeat";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        if grid.patch % 8 != 0 {
            return Err(Error::usage(format!(
                "input.patch is {}; {at} predicts histograms of cells of 8 pixels: choose a multiple of 8",
                grid.patch
            )));
        }
        self.mask.check(&format!("{at}.mask"), grid)
    }
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(MaskFeat::new(self, input)?))
    }
}

/// MaskFeat for one input shape.
pub struct MaskFeat {
    pub model: EncoderWithHead,
    mask: BlockMask,
}

impl MaskFeat {
    /// Builds the model and its mask.
    pub fn new(config: &Config, input: &InputConfig) -> Result<MaskFeat> {
        let patchify = Patchify::new(input)?;
        config.check("method.maskfeat", &patchify.grid)?;
        // Official initialization: normal weights, and biases of 0.02.
        let init = Init::Normal(0.02);
        let positions = LearnedPositions { init, weight_decay: true, norm_pre: false };
        let encoder = VitOptions {
            class_token: true,
            mask_tokens_in_encoder: true,
            embed_init: init,
            embed_bias_init: Some(Init::Constant(0.02)),
            blocks: StackOptions { init: BlockInit::Normal { std: 0.02, bias: 0.02 }, ..StackOptions::default() },
            ..VitOptions::with_positions(PositionTable::Learned(positions))
        };
        let values = hog_values(&patchify.grid);
        let model = EncoderWithHead::new(patchify, &config.encoder, encoder, values, init);
        Ok(MaskFeat { model, mask: config.mask })
    }
}

impl Reconstruct for MaskFeat {
    fn reconstruct(&self, step: &Step, batch: &Batch, policy: &dyn MaskPolicy) -> Result<Reconstruction> {
        let x = batch.view();
        let patchify = &self.model.patchify;
        let mask = policy.sample(step, &patchify.grid, batch)?;
        let visible = patchify.patches_at(x, &mask.keep, step.weights.kind())?;
        let pred = self.model.predict(step.weights, &visible, &mask)?;
        draw_hog(patchify, x, &pred.to_kind(Kind::Float), &mask)
    }
}

impl Method for MaskFeat {
    model_and_mask!();
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let x = batch.view(); // [B, C, T, Y, X]
        let w = step.weights;
        let patchify = &self.model.patchify;
        let mask = self.mask.sample(step, &patchify.grid, batch)?; // keep [B, K], drop [B, M]
        let visible = patchify.patches_at(x, &mask.keep, w.kind())?; // [B, K, P]
        let pred = self.model.predict(w, &visible, &mask)?; // [B, M, 9 C cells²]
        let target = hidden_hog_target(patchify, x, &mask.drop)?;
        Ok(LossOutput::term("hog", masked_mse(&pred, &target)?, Per::HiddenToken))
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { reconstruct: Some(self), ..Capabilities::default() }
    }
}
