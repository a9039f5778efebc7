//! Masked autoencoder: He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners",
//! CVPR 2022. Three quarters of the patches are hidden; the encoder sees the rest; a small decoder guesses the pixels of
//! the hidden ones. Agrees with `transformers`' ViTMAEForPreTraining in loss and gradients (`tests/mae.rs`).

use super::{Batch, Features, Method, Reconstruction, Term};
use crate::fault::{Fault, Result};
use crate::grid::{Grid, Input};
use crate::op::patch::{self, Scale};
use crate::part::decoder::vit::Decoder;
use crate::part::encoder::position;
use crate::part::encoder::vit::{Shape, Vit};
use crate::part::weights::{Table, Weights};
use crate::part::{loss, mask, mask::Mask, target};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The encoder's shape (paper: B 768 wide, 12 deep, 12 heads; L 1024, 24, 16; H 1280, 32, 16).
    pub encoder: Shape,
    /// The decoder's shape (paper: 512 wide, 8 deep, 16 heads for every encoder).
    #[serde(default = "Config::decoder")]
    pub decoder: Shape,
    #[serde(default)]
    pub mask: MaskConfig,
    #[serde(default)]
    pub target: TargetConfig,
    /// Where mask tokens enter: only in the decoder, or already in the encoder (paper, table 1c: slower and less
    /// accurate; kept for that comparison).
    #[serde(default)]
    pub mask_tokens: MaskTokens,
    /// The grid [rows, columns] that the weights were trained on, where it is another: its positions are interpolated
    /// to this input's grid, instead of counting on beyond it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_grid: Option<[i64; 2]>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MaskConfig {
    /// The share of patches hidden, in (0, 1).
    pub ratio: f64,
}

impl Default for MaskConfig {
    fn default() -> Self {
        MaskConfig { ratio: 0.75 }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// Each patch with mean 0 and deviation 1 instead of raw pixels.
    pub normalize: bool,
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

    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        if let Some([rows, cols]) =
            self.trained_grid.filter(|sides| sides.iter().any(|side| !(1..=4096).contains(side)))
        {
            return Err(Fault::usage(format!(
                "{at}.trained_grid is [{rows}, {cols}]; it is the rows and columns of patches that weights were trained on"
            )));
        }
        let ratio = self.mask.ratio;
        if !(ratio > 0.0 && ratio < 1.0) {
            return Err(Fault::usage(format!(
                "{at}.mask.ratio is {ratio}; it is the share of patches hidden and must lie in (0, 1), 0.75 in the paper"
            )));
        }
        let (tokens, kept) = (grid.tokens(), grid.kept(ratio));
        if kept == 0 || kept == tokens {
            return Err(Fault::usage(format!(
                "{at}.mask.ratio is {ratio}, which keeps {kept} of {tokens} patches; at least one must be kept and one \
                 hidden: choose a ratio between {:.3} and {:.3}, or smaller patches",
                1.0 / tokens as f64,
                1.0 - 1.0 / tokens as f64
            )));
        }
        if grid.frames != 1 {
            return Err(Fault::usage(format!(
                "input.frames makes {} time slots; {at} reads images: set it to 1",
                grid.frames
            )));
        }
        Ok(())
    }
}

pub struct Mae {
    grid: Grid,
    scale: Scale,
    table: Table,
    ratio: f64,
    normalize: bool,
    mask_tokens: MaskTokens,
    pub encoder: Vit,
    pub decoder: Decoder,
}

impl Mae {
    pub fn new(config: &Config, input: &Input) -> Result<Mae> {
        let grid = input.grid()?;
        config.check("method.mae", &grid)?;
        let (mean, std) = input.scale()?;
        let mut table = Table::default();
        let in_place = config.mask_tokens == MaskTokens::Encoder;
        let mut encoder = Vit::new(&mut table, "encoder", &grid, &config.encoder, in_place);
        let mut decoder = Decoder::new(&mut table, "decoder", &grid, config.encoder.width, &config.decoder, !in_place);
        encoder.positions = position::table(&grid, config.encoder.width, config.trained_grid);
        decoder.positions = position::table(&grid, config.decoder.width, config.trained_grid);
        Ok(Mae {
            grid,
            scale: Scale { mean, std },
            table,
            ratio: config.mask.ratio,
            normalize: config.target.normalize,
            mask_tokens: config.mask_tokens,
            encoder,
            decoder,
        })
    }

    /// [B, M, P] at the dropped places.
    fn guess(&self, w: &Weights, batch: &Batch, mask: &Mask) -> Result<Tensor> {
        let rows = patch::patch(&batch.pixels, &self.grid, &self.scale, &mask.keep, w.kind())?; // [B, K, P]
        match self.mask_tokens {
            MaskTokens::Decoder => self.decoder.fill(w, &self.encoder.visible(w, &rows, mask)?, mask),
            MaskTokens::Encoder => self.decoder.refine(w, &self.encoder.in_place(w, &rows, mask)?, mask),
        }
    }
}

impl Method for Mae {
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let mask = self.mask(batch); // keep [B, K], drop [B, M]
        let guess = self.guess(w, batch, &mask)?; // [B, M, P]
        let truth = target::pixel::pixel(&batch.pixels, &self.grid, &self.scale, &mask.drop, self.normalize)?;
        Ok(vec![Term { name: "pixel", sum: loss::masked_mse(&guess, &truth)? }])
    }

    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        vec![("pixel", (samples * (self.grid.tokens() - self.grid.kept(self.ratio))) as f64)]
    }

    fn mask(&self, batch: &Batch) -> Mask {
        mask::random(&self.grid, self.ratio, batch.seed, &batch.origins, batch.pixels.device())
    }

    fn features(&self, w: &Weights, batch: &Batch) -> Result<Features> {
        let mask = Mask::none(batch.pixels.size()[0], self.grid.tokens(), batch.pixels.device());
        let rows = patch::patch(&batch.pixels, &self.grid, &self.scale, &mask.keep, w.kind())?;
        let all = match self.mask_tokens {
            MaskTokens::Decoder => self.encoder.visible(w, &rows, &mask)?,
            MaskTokens::Encoder => self.encoder.in_place(w, &rows, &mask)?,
        }
        .to_kind(Kind::Float);
        let patches = all.narrow(1, 1, self.grid.tokens());
        Ok(Features { class: all.select(1, 0), mean: patches.mean_dim(1, false, Kind::Float) })
    }

    fn reconstruct(&self, w: &Weights, batch: &Batch) -> Result<Reconstruction> {
        let mask = self.mask(batch);
        let rows = |at: &Tensor| patch::patch(&batch.pixels, &self.grid, &self.scale, at, Kind::Float);
        let (seen, hidden) = (rows(&mask.keep)?, rows(&mask.drop)?);
        let mut guess = self.guess(w, batch, &mask)?.to_kind(Kind::Float);
        if self.normalize {
            // The truth's own mean and deviation would leak the answer into the picture: those of what is visible
            // stand in for them.
            let mean = seen.mean_dim([1, 2].as_slice(), true, Kind::Float);
            let deviation = (&seen - &mean).square().mean_dim([1, 2].as_slice(), true, Kind::Float).sqrt();
            guess = guess * deviation + mean;
        }
        let grey = hidden.zeros_like();
        let restore = mask.restore();
        let picture = |at_hidden: &Tensor| {
            let rows = patch::gather(&Tensor::cat(&[&seen, at_hidden], 1), &restore);
            self.scale.to_unit(&patch::pixels(&rows, &self.grid))
        };
        Ok(Reconstruction { original: picture(&hidden), masked: picture(&grey), guessed: picture(&guess) })
    }

    fn normalised(&self, batch: &Batch) -> Tensor {
        let mask = Mask::none(batch.pixels.size()[0], self.grid.tokens(), batch.pixels.device());
        let rows = patch::formula(&batch.pixels, &self.grid, &self.scale, &mask.keep, patch::Level::Raw, Kind::Float);
        patch::pixels(&rows, &self.grid)
    }

    fn grid(&self) -> &Grid {
        &self.grid
    }

    fn table(&self) -> &Table {
        &self.table
    }
}
