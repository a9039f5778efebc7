//! iGPT: Chen, Radford, Child, Wu, Jun, Luan, Sutskever, "Generative Pretraining from Pixels", ICML 2020. A transformer
//! predicts the palette color of each pixel, from the pixels before it or, as BERT, from those around it. Agrees with
//! `transformers`' ImageGPT (`tests/method/igpt.rs`). The palette is learned from the training set; which pixels the
//! authors clustered is not published.

use super::prelude::*;
use crate::part::buffers::BufferId;
use crate::part::color_transformer::ColorTransformer;
use crate::part::loss::token_cross_entropy;
use crate::part::model::Generate;
use crate::part::objective::color::ColorObjective;
use crate::part::training_samples::TrainingSamples;
use std::path::PathBuf;
use tch::Tensor;

/// The config's `method.igpt`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Transformer (paper: S 512 wide, 24 deep, 8 heads; M 1024, 36, 8; L 1536, 48, 16).
    pub encoder: Shape,
    /// Number of colors of the palette (paper: 512).
    pub colors: i64,
    /// The `palette.json` of another run on the same data set, so that losses can be compared; learned when left out.
    #[serde(default)]
    pub palette: Option<PathBuf>,
    #[serde(default)]
    pub objective: ColorObjective,
}

impl MethodConfig for Config {
    const NAME: &'static str = "igpt";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        check_number(&format!("{at}.colors"), self.colors as f64, 2.0..=65536.0)?;
        if let ColorObjective::Bert(hidden) = self.objective {
            check_number(&format!("{at}.objective.bert.ratio"), hidden.ratio, 0.01..=0.99)?;
        }
        if grid.patch != 1 || grid.rows != grid.cols {
            return Err(Error::usage(format!(
                "input makes {} x {} tokens of {} pixels; {at} reads square images pixel by pixel: set input.patch to 1 \
                 and input.height and input.width to the same number",
                grid.rows, grid.cols, grid.patch
            )));
        }
        check_image(at, grid)
    }
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(Igpt::new(self, input)?))
    }
}

/// iGPT for one input shape.
pub struct Igpt {
    pub model: ColorTransformer,
    mask: NoMask,
    buffers: BufferSpecs,
    config: Config,
}

impl Igpt {
    /// Builds the model.
    pub fn new(config: &Config, input: &InputConfig) -> Result<Igpt> {
        let patchify = Patchify::new(input)?;
        config.check("method.igpt", &patchify.grid)?;
        let mut buffers = BufferSpecs::default();
        let causal = config.objective == ColorObjective::Autoregressive;
        let model = ColorTransformer::new(patchify, &mut buffers, &config.encoder, config.colors, causal);
        Ok(Igpt { model, mask: NoMask, buffers, config: config.clone() })
    }
}

impl Method for Igpt {
    model_and_mask!();
    fn buffers(&self) -> BufferSpecs {
        self.buffers.clone()
    }
    fn learn_buffers(&self, samples: &mut TrainingSamples) -> Result<Vec<(BufferId, Tensor)>> {
        let palette = self.model.palette;
        Ok(vec![(palette.buffer, palette.learn(self.config.palette.as_deref(), samples)?)])
    }
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let w = step.weights;
        let colors = self.model.indices(step, batch); // [B, N]
        let ColorObjective::Bert(pixels) = self.config.objective else {
            let losses = token_cross_entropy(&self.model.predict_next(w, &colors)?, &colors); // [B, N]
            return Ok(LossOutput::term("color", losses.sum(losses.kind()), Per::Token));
        };
        let hidden = pixels.sample(batch, self.model.patchify.grid.tokens())?; // [B, N]
        let losses = token_cross_entropy(&self.model.predict_hidden(w, &colors, &hidden)?, &colors) * &hidden;
        let sum = |x: &Tensor| x.sum_dim_intlist([1i64].as_slice(), false, None); // [B, N] → [B]
        let means = sum(&losses) / sum(&hidden).clamp_min(1.0);
        Ok(LossOutput::term("color", means.sum(means.kind()), Per::Sample))
    }
    fn capabilities(&self) -> Capabilities<'_> {
        let causal = self.config.objective == ColorObjective::Autoregressive;
        let generate = causal.then_some(&self.model as &dyn Generate);
        Capabilities { reconstruct: Some(self), generate, ..Capabilities::default() }
    }
}

impl Reconstruct for Igpt {
    fn reconstruct(&self, step: &Step, batch: &Batch, _mask: &dyn MaskPolicy) -> Result<Reconstruction> {
        self.model.draw(step, batch, self.config.objective)
    }
}
