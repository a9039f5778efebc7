//! FLIP: Li, Fan, Hu, Feichtenhofer, He, "Scaling Language-Image Pre-training via Masking", CVPR 2023. CLIP with half or
//! three quarters of each image hidden: the image tower sees the rest, the text tower the caption, and each image is to
//! find its caption among those of the whole batch, as each caption its image. Nothing is reconstructed. With nothing
//! hidden it is CLIP, and the paper's unmasked tuning. Agrees with `open_clip` in loss and gradients (`tests/flip.rs`).

use super::{Batch, Features, Method, Needs, Term};
use crate::device::World;
use crate::fault::{Fault, Result};
use crate::grid::{Grid, Input};
use crate::part::encoder::{stack::Shape, text};
use crate::part::loss::{contrastive, gather::Gather};
use crate::part::mask::{self, Mask, Ratio};
use crate::part::pair::{Pair, Towers};
use crate::part::pixels::Pixels;
use crate::part::weights::{Table, Weights};
use crate::part::work::Work;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};
use tch::Tensor;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The image tower's shape (paper: B 768 wide, 12 deep, 12 heads; L 1024, 24, 16; H 1280, 32, 16).
    pub encoder: Shape,
    /// The text tower (paper: 512 wide, 12 deep, 8 heads for B; 768, 12, 12 for L; 1024, 24, 16 for H).
    pub text: text::Config,
    /// Width of the space that both towers project to (paper: 512 for B, 768 for L, 1024 for H).
    pub embed: i64,
    /// The share may be 0: unmasked tuning (§3), with `occlude train --init RUN`.
    #[serde(default = "Config::mask")]
    pub mask: Ratio,
    #[serde(default)]
    pub towers: Towers,
}

impl Config {
    pub const NEEDS: Needs = Needs { whole_batch: true, pictures: false };

    fn mask() -> Ratio {
        Ratio { ratio: 0.5 }
    }

    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        self.encoder.check(&format!("{at}.encoder"))?;
        self.text.check(&format!("{at}.text"))?;
        if !(1..=16384).contains(&self.embed) {
            return Err(Fault::usage(format!("{at}.embed is {}; it must lie in 1..=16384", self.embed)));
        }
        let (slots, frames) = (grid.frames, grid.patch_frames);
        match self.mask.ratio {
            _ if slots * frames != 1 => Err(Fault::usage(format!(
                "input.frames makes {slots} time slots of {frames} frames; {at} reads images: set it to 1"
            ))),
            0.0 => Ok(()),
            ratio => self.mask.check(&format!("{at}.mask"), grid.tokens(), grid.kept(ratio), 0.5),
        }
    }
}

pub struct Flip {
    pub pixels: Pixels,
    pub pair: Pair,
    ranks: Gather,
    ratio: f64,
}

impl Flip {
    pub fn new(config: &Config, input: &Input) -> Result<Flip> {
        let pixels = Pixels::new(input)?;
        config.check("method.flip", &pixels.grid)?;
        let pair = Pair::new(&pixels.grid, config.towers, &config.encoder, &config.text, config.embed);
        Ok(Flip { pixels, pair, ranks: Gather::default(), ratio: config.mask.ratio })
    }
}

impl Method for Flip {
    fn loss(&self, w: &Weights, batch: &Batch) -> Result<Vec<Term>> {
        let mask = self.mask(batch); // keep [B, K]
        let visible = self.pixels.rows(&batch.pixels, &mask.keep, w.kind())?; // [B, K, P]
        let images = self.pair.images(w, &visible, &mask)?; // [B, E]
        let words = self.pair.words(batch.captions()?, batch.seed, &batch.origins); // keep [B, K], where some are hidden
        let captions = self.pair.captions(w, batch.captions()?, words.as_ref())?; // [B, E]
        Ok(vec![Term { name: "contrast", sum: contrastive(&images, &captions, &self.pair.scale(w), &self.ranks)? }])
    }
    fn capturable(&self) -> Result<(), &'static str> {
        self.ranks.capturable()?;
        if self.ratio == 0.0 { Ok(()) } else { mask::on_device(self.grid().tokens()) }
    }
    fn recompute(&mut self) {
        self.pair.recompute();
    }
    fn work(&self, batch: u64) -> Work {
        let kept = if self.ratio == 0.0 { self.grid().tokens() } else { self.grid().kept(self.ratio) };
        self.pair.work(kept, batch as i64)
    }
    fn counts(&self, samples: i64) -> Vec<(&'static str, f64)> {
        vec![("contrast", samples as f64)]
    }
    fn mask(&self, batch: &Batch) -> Mask {
        let grid = self.grid();
        match self.ratio {
            0.0 => Mask::none(batch.pixels.size()[0], grid.tokens(), batch.pixels.device()),
            ratio => mask::random(grid, ratio, batch.seed, &batch.origins),
        }
    }
    fn join(&mut self, world: &Arc<dyn World>, deadline: Duration) -> Result<()> {
        self.ranks = Gather::join(world, deadline)?;
        Ok(())
    }
    fn features(&self, w: &Weights, batch: &Batch) -> Result<Features> {
        self.pair.features(w, &self.pixels.all(&batch.pixels, w.kind())?)
    }
    fn match_images(&self, w: &Weights, batch: &Batch) -> Result<Tensor> {
        let mask = Mask::none(batch.pixels.size()[0], self.grid().tokens(), batch.pixels.device());
        self.pair.images(w, &self.pixels.all(&batch.pixels, w.kind())?, &mask)
    }
    fn match_captions(&self, w: &Weights, ids: &Tensor) -> Result<Tensor> {
        self.pair.captions(w, ids, None)
    }
    fn normalised(&self, batch: &Batch) -> Result<Tensor> {
        self.pixels.normalised(&batch.pixels)
    }
    fn name(&self) -> &'static str {
        "flip"
    }
    fn grid(&self) -> &Grid {
        &self.pixels.grid
    }
    fn table(&self) -> &Table {
        &self.pair.table
    }
}
