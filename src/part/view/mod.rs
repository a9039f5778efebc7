//! A view: one augmented form of a sample, as the model receives it but for the normalisation, which happens on the
//! device: 8-bit pixels, planes [C, Y, X].

pub mod crop; // which part of a picture, at which size
pub mod tone; // curves from old values to new
pub mod colour; // brightness, contrast, saturation, hue, grey
pub mod sharpness;
pub mod blur;
pub mod affine; // shear, shift, rotation
pub mod jitter; // random colour
pub mod rand_augment; // random operations
pub mod augment; // the config's `view.augment`
pub mod erase; // random boxes become noise, in batches
pub mod mix; // mixup and CutMix, of batches

use crate::data::decode::Decoded;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::rng::{Draw, Purpose};
use augment::Augment;
use crop::Crop;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a sample becomes a view: the config's `view`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct View {
    /// The random box that training shows.
    pub crop: Crop,
    /// How likely training mirrors a sample, left to right.
    pub flip: f64,
    /// Share of the resized picture's side that evaluation's central crop shows: 0.875 resizes to 256 for a model of
    /// 224; 1 shows all of the shorter side.
    pub center: f64,
    /// What training does to colours and shape after crop and flip; nothing when left out.
    pub augment: Augment,
}

impl Default for View {
    fn default() -> Self {
        View { crop: Crop::default(), flip: 0.5, center: 0.875, augment: Augment::default() }
    }
}

impl View {
    pub fn check(&self) -> Result<()> {
        self.crop.check()?;
        self.augment.check()?;
        if !(0.0..=1.0).contains(&self.flip) {
            return Err(Fault::usage(format!("view.flip is {}; it is a probability, 0 to 1", self.flip)));
        }
        if !(self.center > 0.0 && self.center <= 1.0) {
            return Err(Fault::usage(format!(
                "view.center is {}; it is a share of the side, 0 < share <= 1",
                self.center
            )));
        }
        Ok(())
    }

    /// Training's view of sample `id` in `epoch`: random box, random flip. `repeat` tells several views of one sample
    /// apart. [C, Y, X], 8 bits.
    pub fn train(&self, grid: &Grid, image: &Decoded, seed: u64, id: u64, epoch: u64, repeat: u32) -> Vec<u8> {
        let [width, height] = size(grid);
        let mut draw = Draw::new(seed, id, epoch, Purpose::Crop, repeat);
        let region = self.crop.region(image.width, image.height, &mut draw);
        let mut pixels = crop::resize(image, region, width, height, self.crop.interpolation);
        if Draw::new(seed, id, epoch, Purpose::Flip, repeat).uniform() < self.flip {
            crop::mirror(&mut pixels, width as usize, image.channels as usize);
        }
        let shape = [height as usize, width as usize, image.channels as usize];
        let stream = |purpose| Draw::new(seed, id, epoch, purpose, repeat);
        self.augment.apply(&mut pixels, shape, self.crop.interpolation, stream);
        planes(pixels, image.channels as usize)
    }

    /// Evaluation's view: resized, central crop. [C, Y, X], 8 bits.
    pub fn eval(&self, grid: &Grid, image: &Decoded) -> Vec<u8> {
        let [width, height] = size(grid);
        let pixels = crop::resize_center(image, width, height, self.center, self.crop.interpolation);
        planes(pixels, image.channels as usize)
    }
}

fn size(grid: &Grid) -> [u32; 2] {
    let [_, _, height, width] = grid.pixels();
    [width as u32, height as u32]
}

/// [Y, X, C] → [C, Y, X].
fn planes(pixels: Vec<u8>, channels: usize) -> Vec<u8> {
    if channels == 1 {
        return pixels;
    }
    let mut out = Vec::with_capacity(pixels.len());
    for channel in 0..channels {
        out.extend(pixels.iter().skip(channel).step_by(channels));
    }
    out
}
