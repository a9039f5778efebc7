//! Masked autoencoder: He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners",
//! CVPR 2022. Three quarters of the patches are hidden; the encoder sees the rest; a small decoder guesses the pixels of
//! the hidden ones. Agrees with `transformers`' ViTMAEForPreTraining in loss and gradients (`tests/mae.rs`).

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
    /// The encoder's shape (paper: B 768 wide, 12 deep, 12 heads; L 1024, 24, 16; H 1280, 32, 16).
    pub encoder: Shape,
    /// The decoder's shape (paper: 512 wide, 8 deep, 16 heads for every encoder).
    #[serde(default = "Config::decoder")]
    pub decoder: Shape,
    #[serde(default = "Config::mask")]
    pub mask: Ratio,
    #[serde(default = "Config::target")]
    pub target: pixel::Config,
    /// Where mask tokens enter: only in the decoder, or already in the encoder (paper, table 1c: slower and less
    /// accurate; kept for that comparison).
    #[serde(default)]
    pub mask_tokens: MaskTokens,
    /// The grid [rows, columns] that the weights were trained on, where it is another: its positions are interpolated
    /// to this input's grid, instead of counting on beyond it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_grid: Option<[i64; 2]>,
}

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

    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        position::check(&format!("{at}.trained_grid"), self.trained_grid)?;
        self.mask.check(&format!("{at}.mask"), grid.tokens(), grid.kept(self.mask.ratio), 0.75)?;
        match grid.frames * grid.patch_frames {
            1 => Ok(()),
            _ => Err(Fault::usage(format!(
                "input.frames makes {} time slots of {} frames; {at} reads images: set it to 1, or choose a method for video",
                grid.frames, grid.patch_frames
            ))),
        }
    }
}

pub struct Mae {
    pub model: Autoencoder,
    ratio: f64,
}

impl Mae {
    pub fn new(config: &Config, input: &Input) -> Result<Mae> {
        let pixels = Pixels::new(input)?;
        config.check("method.mae", &pixels.grid)?;
        let positions = |shape: Shape| position::table(&pixels.grid, shape.width, config.trained_grid);
        let (in_place, biases) = (config.mask_tokens == MaskTokens::Encoder, Biases::All);
        let encoder =
            encoder::Make { class: true, in_place, embed: Init::Xavier, biases, positions: positions(config.encoder) };
        let token = (!in_place).then_some(Init::Normal(0.02));
        let decoder = decoder::Make {
            token,
            embed_bias: true,
            ahead: false,
            head: Init::Xavier,
            biases,
            positions: positions(config.decoder),
        };
        let target = if config.target.normalize { Pixel::PerPatch } else { Pixel::Received };
        let model = Autoencoder::new(pixels, (&config.encoder, encoder), (&config.decoder, decoder), target);
        Ok(Mae { model, ratio: config.mask.ratio })
    }
}

impl Method for Mae {
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let mask = self.mask(batch); // keep [B, K], drop [B, M]
        let guess = self.model.guess(w, &batch.pixels, &mask)?; // [B, M, P]
        let truth = self.model.truth(&batch.pixels, &mask)?; // [B, M, P]
        Ok(vec![Term { name: "pixel", sum: masked_mse(&guess, &truth)? }])
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        vec![("pixel", (samples * (self.grid().tokens() - self.grid().kept(self.ratio))) as f64)]
    }
    fn capturable(&self) -> Result<(), &'static str> {
        mask::on_device(self.grid().tokens())
    }
    fn work(&self, _batch: u64) -> Work {
        self.model.work(self.grid().kept(self.ratio))
    }
    fn mask(&self, batch: &Batch) -> Mask {
        mask::random(self.grid(), self.ratio, batch.seed, &batch.origins)
    }
    fn features(&self, w: &Weights, batch: &Batch) -> Result<Features> {
        self.model.features(w, &batch.pixels)
    }
    fn reconstruct(&self, w: &Weights, batch: &Batch) -> Result<Reconstruction> {
        self.model.reconstruction(w, &batch.pixels, &self.mask(batch))
    }
    fn normalised(&self, batch: &Batch) -> Result<Tensor> {
        self.model.pixels.normalised(&batch.pixels)
    }
    fn recompute(&mut self) {
        self.model.recompute();
    }
    fn name(&self) -> &'static str {
        "mae"
    }
    fn grid(&self) -> &Grid {
        &self.model.pixels.grid
    }
    fn table(&self) -> &Table {
        &self.model.table
    }
}
