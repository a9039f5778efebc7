//! OmniMAE: Girdhar, El-Nouby, Singh, Alwala, Joulin, Misra, "OmniMAE: Single Model Masked Pretraining on Images and
//! Videos", CVPR 2023. One model for both: a picture, repeated to the frames of a cube, is a clip of one time slot; a step
//! is of pictures or of clips. Random tokens are hidden, of clips anywhere in space and time; mask tokens join the others
//! at the encoder's width. Agrees with `transformers`' VideoMAE layers in loss and gradients (`tests/omnimae.rs`).

use super::{Batch, Features, Method, Reconstruction, Term};
use crate::fault::{Fault, Result};
use crate::grid::{Grid, Input};
use crate::part::autoencoder::Autoencoder;
use crate::part::encoder::vit::{self as encoder, Shape};
use crate::part::encoder::{block::Biases, position};
use crate::part::loss::masked_mse;
use crate::part::mask::{self, Mask, Ratio};
use crate::part::target::pixel::{self, Pixel};
use crate::part::weights::{Init, Table, Weights};
use crate::part::work::Work;
use crate::part::{decoder::vit as decoder, pixels::Pixels};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The encoder's shape (B 768 wide, 12 deep, 12 heads; L 1024, 24, 16; H 1280, 32, 16 with patches of 14 pixels).
    pub encoder: Shape,
    /// The decoder's shape (official code: B 384 wide, 4 deep, 16 heads; L 512, 4, 16; H 512, 8, 16).
    pub decoder: Shape,
    /// Of pictures (official recipe 0.75; the paper also reports 0.9).
    #[serde(default = "Config::image_mask")]
    pub image_mask: Ratio,
    /// Of clips, over all of their tokens (official recipe 0.9; the paper also reports 0.95).
    #[serde(default = "Config::clip_mask")]
    pub clip_mask: Ratio,
    /// Normalised by channel, unless told otherwise.
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

    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        if grid.frames < 2 {
            return Err(Fault::usage(format!(
                "input.frames makes one time slot of {} frames, as a picture has; {at} reads clips beside pictures: give \
                 it more frames, or choose a method for pictures",
                grid.patch_frames
            )));
        }
        for (name, mask, frames, papers) in
            [("image_mask", self.image_mask, 1, 0.75), ("clip_mask", self.clip_mask, grid.frames, 0.9)]
        {
            let grid = Grid { frames, ..*grid };
            mask.check(&format!("{at}.{name}"), grid.tokens(), grid.kept_at_least(mask.ratio), papers)?;
        }
        Ok(())
    }
}

pub struct OmniMae {
    pub model: Autoencoder,
    /// Shares hidden, of pictures and of clips.
    ratios: [f64; 2],
}

impl OmniMae {
    pub fn new(config: &Config, input: &Input) -> Result<OmniMae> {
        let pixels = Pixels::new(input)?;
        config.check("method.omnimae", &pixels.grid)?;
        // Both tables have the encoder's width; a picture's tokens are those of the first slot.
        let positions = || position::by_number(&pixels.grid, config.encoder.width);
        let (biases, embed, head) = (Biases::All, Init::Xavier, Init::Normal(0.02));
        let encoder = encoder::Make { class: false, in_place: false, embed, biases, positions: positions() };
        let (token, positions) = (Some(Init::Zero), positions());
        let decoder = decoder::Make { token, embed_bias: true, ahead: true, head, biases, positions };
        let target = if config.target.normalize { Pixel::PerChannelInside } else { Pixel::Unit };
        let model = Autoencoder::new(pixels, (&config.encoder, encoder), (&config.decoder, decoder), target);
        Ok(OmniMae { model, ratios: [config.image_mask.ratio, config.clip_mask.ratio] })
    }

    /// Pictures [B, C, 1, Y, X] as clips of one slot; clips as they are.
    fn clips(&self, batch: &Batch) -> Tensor {
        let frames = batch.pixels.size()[2].max(self.grid().patch_frames);
        batch.pixels.expand([-1, -1, frames, -1, -1], false)
    }

    /// How many tokens of a sample stay visible.
    fn kept(&self, grid: &Grid) -> i64 {
        grid.kept_at_least(self.ratios[usize::from(grid.frames > 1)])
    }
}

impl Method for OmniMae {
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let (x, mask) = (self.clips(batch), self.mask(batch)); // keep [B, K], drop [B, M]
        let guess = self.model.guess(w, &x, &mask)?; // [B, M, P]
        let truth = self.model.truth(&x, &mask)?; // [B, M, P]
        // Of each sample the mean over its hidden tokens, so that a picture counts as much as a clip.
        Ok(vec![Term { name: "pixel", sum: masked_mse(&guess, &truth)? / mask.drop.size()[1] as f64 }])
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        vec![("pixel", samples as f64)]
    }
    fn capturable(&self) -> Result<(), &'static str> {
        mask::on_device(self.grid().tokens())
    }
    fn work(&self, _batch: u64) -> Work {
        self.model.work(self.kept(self.grid()))
    }
    fn still(&self) -> Option<(Grid, Work)> {
        let slot = Grid { frames: 1, ..*self.grid() };
        Some((slot.still(), self.model.work_of(1, self.kept(&slot))))
    }
    fn mask(&self, batch: &Batch) -> Mask {
        let grid = self.model.pixels.grid_of(&self.clips(batch));
        mask::keeping(&grid, self.kept(&grid), batch.seed, &batch.origins)
    }
    fn features(&self, w: &Weights, batch: &Batch) -> Result<Features> {
        self.model.features(w, &self.clips(batch))
    }
    fn reconstruct(&self, w: &Weights, batch: &Batch) -> Result<Reconstruction> {
        self.model.reconstruction(w, &self.clips(batch), &self.mask(batch))
    }
    fn normalised(&self, batch: &Batch) -> Result<Tensor> {
        self.model.pixels.normalised(&self.clips(batch))
    }
    fn recompute(&mut self) {
        self.model.recompute();
    }
    fn name(&self) -> &'static str {
        "omnimae"
    }
    fn grid(&self) -> &Grid {
        &self.model.pixels.grid
    }
    fn table(&self) -> &Table {
        &self.model.table
    }
}
