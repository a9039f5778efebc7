//! VideoMAE: Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
//! Pre-Training", NeurIPS 2022. A clip is cut into cubes; nine tenths of the places are hidden, the same in every time
//! slot; the encoder attends over the visible cubes of all slots jointly; a small decoder guesses the pixels of the hidden
//! ones. Agrees with `transformers`' VideoMAEForPreTraining in loss and gradients (`tests/videomae.rs`).

use super::{Batch, Features, Method, Reconstruction, Term};
use crate::fault::Result;
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
    /// The encoder's shape (S 384 wide, 12 deep, 6 heads; B 768, 12, 12; L 1024, 24, 16; H 1280, 32, 16).
    pub encoder: Shape,
    /// The decoder's shape: half as wide as the encoder, and 4 deep for S and B, 12 for L and H (official scripts; S 192
    /// wide, 3 heads; B 384, 6; L 512, 8; H 640, 8).
    pub decoder: Shape,
    /// The share is of the places of a time slot.
    #[serde(default = "Config::mask")]
    pub mask: Ratio,
    /// Normalised by channel, unless told otherwise.
    #[serde(default = "Config::target")]
    pub target: pixel::Config,
}

impl Config {
    fn mask() -> Ratio {
        Ratio { ratio: 0.9 }
    }
    fn target() -> pixel::Config {
        pixel::Config { normalize: true }
    }

    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        let (places, kept) = (grid.rows * grid.cols, grid.kept_places(self.mask.ratio));
        self.mask.check(&format!("{at}.mask"), places, kept, 0.9)
    }
}

pub struct VideoMae {
    pub model: Autoencoder,
    ratio: f64,
}

impl VideoMae {
    pub fn new(config: &Config, input: &Input) -> Result<VideoMae> {
        let pixels = Pixels::new(input)?;
        config.check("method.videomae", &pixels.grid)?;
        let positions = |shape: Shape| position::by_number(&pixels.grid, shape.width);
        let biases = Biases::QueryValue;
        // The official initialisation passes the cubes' convolution by: it begins as PyTorch's do.
        let embed = Init::Uniform(1.0 / (pixels.grid.values() as f64).sqrt());
        let encoder =
            encoder::Make { class: false, in_place: false, embed, biases, positions: positions(config.encoder) };
        let token = Some(Init::Truncated(0.02));
        let decoder = decoder::Make {
            token,
            embed_bias: false,
            ahead: false,
            head: Init::Xavier,
            biases,
            positions: positions(config.decoder),
        };
        let target = if config.target.normalize { Pixel::PerChannel } else { Pixel::Unit };
        let mut model = Autoencoder::new(pixels, (&config.encoder, encoder), (&config.decoder, decoder), target);
        // Official `no_weight_decay`.
        model.table.spare(model.decoder.token.expect("a mask token"));
        Ok(VideoMae { model, ratio: config.mask.ratio })
    }
}

impl Method for VideoMae {
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let mask = self.mask(batch); // keep [B, K], drop [B, M]
        let guess = self.model.guess(w, &batch.pixels, &mask)?; // [B, M, P]
        let truth = self.model.truth(&batch.pixels, &mask)?; // [B, M, P]
        Ok(vec![Term { name: "pixel", sum: masked_mse(&guess, &truth)? }])
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        let grid = self.grid();
        let hidden = grid.frames * (grid.rows * grid.cols - grid.kept_places(self.ratio));
        vec![("pixel", (samples * hidden) as f64)]
    }
    fn capturable(&self) -> Result<(), &'static str> {
        mask::on_device(self.grid().rows * self.grid().cols)
    }
    fn work(&self, _batch: u64) -> Work {
        let grid = self.grid();
        self.model.work(grid.frames * grid.kept_places(self.ratio))
    }
    fn mask(&self, batch: &Batch) -> Mask {
        mask::tube(self.grid(), self.ratio, batch.seed, &batch.origins)
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
        "videomae"
    }
    fn grid(&self) -> &Grid {
        &self.model.pixels.grid
    }
    fn table(&self) -> &Table {
        &self.model.table
    }
}
