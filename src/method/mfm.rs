//! MFM: Xie, Li, Zhan, Liu, Ong, Loy, "Masked Frequency Modeling for Self-Supervised Visual Pre-Training", ICLR 2023.
//! The encoder sees a low- or high-passed image, nothing dropped, and a linear layer predicts the image; the loss is
//! over the spectrum's hidden frequencies. Agrees with timm's BEiT blocks and torch's FFT (`tests/method/mfm.rs`). One
//! quotient over the global batch is our own choice; the official code has one for each GPU.

use super::prelude::*;
use crate::op::patch::unpatchify;
use crate::part::frequency::{FilteredImages, FrequencyFilter};
use crate::part::loss::SpectrumAverage;
use tch::{Kind, Tensor};

/// The config's `method.mfm`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Encoder (paper: B 768 wide, 12 deep, 12 heads).
    pub encoder: Shape,
    /// Radius in cycles per image of the low frequencies (paper: 16 of images of 224 pixels).
    pub radius: f64,
    /// Share of samples that are low-passed; the others are high-passed (paper: 0.5).
    pub low_ratio: f64,
    /// Average over hidden frequencies, or over samples.
    #[serde(default)]
    pub average: SpectrumAverage,
}

impl MethodConfig for Config {
    const NAME: &'static str = "mfm";

    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        let side = grid.patch * grid.rows.min(grid.cols);
        check_number(&format!("{at}.radius"), self.radius, 1.0..=side as f64 / 2.0)?;
        check_number(&format!("{at}.low_ratio"), self.low_ratio, 0.0..=1.0)?;
        check_image(at, grid)
    }
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        Ok(Box::new(Mfm::new(self, input)?))
    }
}

/// MFM for one input shape.
pub struct Mfm {
    pub model: EncoderWithHead,
    pub filter: FrequencyFilter,
    mask: NoMask,
    average: SpectrumAverage,
}

impl Mfm {
    /// Builds the model and its filter.
    pub fn new(config: &Config, input: &InputConfig) -> Result<Mfm> {
        let patchify = Patchify::new(input)?;
        config.check("method.mfm", &patchify.grid)?;
        let init = Init::TruncatedNormal(0.02);
        let positions = LearnedPositions { init, weight_decay: false, norm_pre: false };
        let blocks = StackOptions {
            qkv_bias: QkvBias::QueryValue,
            init: BlockInit::ByDepth { std: 0.02 },
            ..StackOptions::default()
        };
        let encoder = VitOptions {
            class_token: true,
            embed_init: init,
            embed_bias_init: Some(Init::Zero),
            token_init: init,
            blocks,
            ..VitOptions::with_positions(PositionTable::Learned(positions))
        };
        let values = patchify.grid.patch_values();
        let mut model = EncoderWithHead::new(patchify, &config.encoder, encoder, values, init);
        model.params.no_weight_decay(model.encoder.class_token.expect("a class token"));
        let filter = FrequencyFilter { radius: config.radius, low_ratio: config.low_ratio };
        Ok(Mfm { model, filter, mask: NoMask, average: config.average })
    }
}

impl Mfm {
    /// Standardized pixels [B, C, 1, Y, X] of which the encoder sees all → predicted pixels of the same shape.
    fn predict(&self, step: &Step, input: &Tensor) -> Result<Tensor> {
        let patchify = &self.model.patchify;
        let patches = patchify.patchify(input, step.weights.kind())?; // [B, N, P]
        let all = Mask::all_visible(input.size()[0], patchify.grid.tokens(), input.device());
        Ok(unpatchify(&self.model.predict(step.weights, &patches, &all)?, &patchify.grid))
    }
}

impl Reconstruct for Mfm {
    fn reconstruct(&self, step: &Step, batch: &Batch, _mask: &dyn MaskPolicy) -> Result<Reconstruction> {
        let patchify = &self.model.patchify;
        let FilteredImages { input, .. } = self.filter.filter(patchify, batch)?;
        let pred = self.predict(step, &input)?;
        let picture = |standardized: &Tensor| patchify.to_01(&standardized.to_kind(Kind::Float));
        Ok(Reconstruction {
            original: patchify.to_01(batch.view()),
            masked: picture(&input),
            predicted: picture(&pred),
        })
    }
}

impl Method for Mfm {
    model_and_mask!();
    fn denominators(&self, batch: &Batch) -> Result<LossDenominators> {
        let channels = self.model.patchify.grid.channels as f64;
        let counted = channels * self.filter.count_hidden(batch)?;
        Ok(LossDenominators { samples: batch.size() as f64, counted, ..LossDenominators::default() })
    }
    fn loss(&self, step: &Step, batch: &Batch) -> Result<LossOutput> {
        let patchify = &self.model.patchify;
        let FilteredImages { input, hidden } = self.filter.filter(patchify, batch)?; // [B, C, 1, Y, X]; [B, 1, Y, X]
        let pred = self.predict(step, &input)?; // [B, C, 1, Y, X]
        let target = patchify.normalize(batch.view())?; // [B, C, 1, Y, X]
        let term = self.average.term(&pred.squeeze_dim(2), &target.squeeze_dim(2), &hidden);
        Ok(LossOutput { terms: vec![term], ..LossOutput::default() })
    }
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { reconstruct: Some(self), varying_denominators: true, ..Capabilities::default() }
    }
}
