//! Audio-MAE: Huang, Xu, Li, Baevski, Auli, Galuba, Metze, Feichtenhofer, "Masked Autoencoders that Listen", NeurIPS 2022.
//! MAE on log-mel spectrograms, four fifths of whose patches are hidden; in the decoder tokens see their neighbours alone.
//! Agrees with timm's blocks put together (`tests/audio_mae.rs`). Beyond the paper, padding is left out.

use super::{Batch, Features, Method, Reconstruction, Term};
use crate::fault::{Fault, Result};
use crate::grid::{Grid, Input};
use crate::part::autoencoder::Autoencoder;
use crate::part::decoder::{Attention, Decode};
use crate::part::encoder::vit::{self as encoder, Shape};
use crate::part::encoder::{block::Biases, position::Axes};
use crate::part::lengths::{Group, Padding};
use crate::part::loss::masked_mse;
use crate::part::mask::{self, Lines, Mask};
use crate::part::pixels::Pixels;
use crate::part::target::pixel::{self, Pixel};
use crate::part::weights::{Init, Table, Weights};
use crate::part::work::Work;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The encoder's shape (paper: S 384 wide, 12 deep, 6 heads; B 768, 12, 12; L 1024, 24, 16).
    pub encoder: Shape,
    /// The decoder's shape (paper: 512 wide, 16 heads; 16 deep with windows, 8 without).
    #[serde(default = "Config::decoder")]
    pub decoder: Shape,
    /// Who sees whom in the decoder: "global", or {"windows": {"size": [4, 4], "shift": [2, 0]}}, the paper's, when left out.
    #[serde(default)]
    pub attention: Attention,
    #[serde(default)]
    pub mask: Lines,
    #[serde(default = "Config::target")]
    pub target: pixel::Config,
    /// By time and frequency, "grid", when left out; "swapped" as in the official code.
    #[serde(default)]
    pub positions: Axes,
    /// Patches behind the end of a short sound: "left_out", when left out, or "seen" as in the official code.
    #[serde(default)]
    pub padding: Padding,
}

impl Config {
    fn decoder() -> Shape {
        Shape { width: 512, depth: 16, heads: 16, mlp_ratio: 4 }
    }
    fn target() -> pixel::Config {
        pixel::Config { normalize: true }
    }

    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.decoder.check(&format!("{at}.decoder"))?;
        self.mask.check(&format!("{at}.mask"), grid)?;
        self.attention.check(&format!("{at}.attention"), grid)?;
        if [grid.frames * grid.patch_frames, grid.channels] != [1, 1] {
            return Err(Fault::usage(format!(
                "{at} reads spectrograms; set input.channels to 1, and leave frames out"
            )));
        }
        Ok(())
    }
}

pub struct AudioMae {
    pub model: Autoencoder<Box<dyn Decode>>,
    mask: Lines,
    padding: Padding,
}

impl AudioMae {
    pub fn new(config: &Config, input: &Input) -> Result<AudioMae> {
        let pixels = Pixels::new(input)?;
        let (grid, biases, inside, outside) = (pixels.grid, Biases::All, &config.encoder, &config.decoder);
        config.check("method.audio_mae", &grid)?;
        let positions = |shape: &Shape| config.positions.table(&grid, shape.width);
        let encoder =
            encoder::Make { class: true, in_place: false, embed: Init::Xavier, biases, positions: positions(inside) };
        let target = if config.target.normalize { Pixel::PerPatch } else { Pixel::Received };
        let model = Autoencoder::with(pixels, (inside, encoder), target, |table| {
            let begin = (Init::Normal(0.02), positions(outside));
            config.attention.decoder(table, (&grid, inside.width), outside, begin)
        })?;
        Ok(AudioMae { model, mask: config.mask, padding: config.padding })
    }

    fn groups(&self, batch: &Batch) -> Vec<Group> {
        self.padding.groups(self.grid(), &batch.pixels, &batch.origins, batch.valid.as_deref())
    }
}

impl Method for AudioMae {
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let sum = |group: &Group| {
            let mask = self.mask.draw(group, batch.seed);
            masked_mse(&self.model.guess(w, &group.pixels, &mask)?, &self.model.truth(&group.pixels, &mask)?)
        };
        let sums = self.groups(batch).iter().map(sum).collect::<Result<Vec<_>>>()?;
        Ok(vec![Term { name: "pixel", sum: sums.into_iter().reduce(|a, b| a + b).expect("a group") }])
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        vec![("pixel", (samples * (self.grid().tokens() - self.mask.kept(self.grid()))) as f64)]
    }
    fn counts_of(&self, valid: &[u32]) -> Vec<(&'static str, f64)> {
        let read = valid.iter().map(|&valid| self.padding.read(self.grid(), valid));
        vec![("pixel", read.map(|grid| grid.tokens() - self.mask.kept(&grid)).sum::<i64>() as f64)]
    }
    fn capturable(&self) -> Result<(), &'static str> {
        match self.padding {
            Padding::LeftOut => Err("padding is left out, and so the lengths of sounds decide what a step does"),
            Padding::Seen => mask::on_device(self.grid().tokens()),
        }
    }
    fn work(&self, _batch: u64) -> Work {
        self.model.work(self.mask.kept(self.grid()))
    }
    fn mask(&self, batch: &Batch) -> Mask {
        let groups = self.groups(batch);
        let masks: Vec<Mask> = groups.iter().map(|group| self.mask.draw(group, batch.seed)).collect();
        Mask::together(&groups, &masks, [self.grid().tokens(), self.mask.kept(self.grid())])
    }
    fn features(&self, w: &Weights, batch: &Batch) -> Result<Features> {
        let of = |group: &Group| self.model.features_of(w, &group.pixels, group.grid.tokens());
        Features::in_order(&self.groups(batch), of)
    }
    fn reconstruct(&self, w: &Weights, batch: &Batch) -> Result<Reconstruction> {
        let draw = |group: &Group| self.mask.draw(group, batch.seed);
        let of = |group: &Group| self.model.reconstruction(w, &group.pixels, &draw(group));
        Reconstruction::in_order(&self.groups(batch), of)
    }
    fn normalised(&self, batch: &Batch) -> Result<Tensor> {
        self.model.pixels.normalised(&batch.pixels)
    }
    fn recompute(&mut self) {
        self.model.recompute();
    }
    fn name(&self) -> &'static str {
        "audio_mae"
    }
    fn grid(&self) -> &Grid {
        &self.model.pixels.grid
    }
    fn table(&self) -> &Table {
        &self.model.table
    }
}
