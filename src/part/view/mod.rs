//! A view: one augmented form of a sample. Of a picture, still or moving, it is what the model receives but for the
//! normalisation, which happens on the device: 8-bit pixels, planes [C, T, Y, X]. Of a sound it is a spectrogram,
//! normalised (`spectrogram.rs`); for a GPU, the samples that it makes one of (`log_mel.rs`).

pub mod crop; // which box of a picture is shown, and its resize
pub mod tone; // curves from old values to new
pub mod colour; // brightness, contrast, saturation, hue, grey
pub mod sharpness;
pub mod blur;
pub mod affine; // shear, shift, rotation
pub mod jitter; // random colour
pub mod rand_augment; // random operations
pub mod augment; // the config's `view.augment`
pub mod plane; // pixel by pixel → plane by plane
pub mod clip; // videos: which frames, and one box for all of them
pub mod erase; // random boxes become noise, in batches
pub mod mix; // mixup and CutMix, of batches
pub mod caption; // how captions are read
pub mod spectrogram; // a window of a sound as an image
pub mod log_mel; // the same on a GPU, of a whole batch
mod said; // the config's `view`, as it is written

use crate::data::decode::Picture;
use crate::data::medium::{Medium, Sample};
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::rng::{Draw, Purpose};
use augment::Augment;
use caption::Caption;
use clip::Clip;
use crop::Crop;
use log_mel::LogMel;
use said::Said;
use serde::{Deserialize, Serialize};
use spectrogram::Sound;
use std::cell::RefCell;
use std::ops::Range;
use tch::Device;

/// How a sample becomes a view: the config's `view`. With `sound` its samples are sounds, and the other keys, which are
/// for pictures, say nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Said", into = "Said")]
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
    /// Whether training may decode a JPEG, or a video's frames, at 1/2, 1/4 or 1/8 of their size where the box still has
    /// as many pixels as the model takes: by a third faster on pictures of 1400 pixels a side, other pixels. They differ
    /// from those of a full decode on photographs by 0.4 to 1.7 of 255 in the mean, on noise with a photograph's
    /// spectrum by 2.6 (5.3 in the worst view, 43 in the worst pixel). Evaluation never does it.
    pub scaled_decode: bool,
    /// Of videos: which frames are shown, as many as `input.frames` says.
    pub clip: Option<Clip>,
    /// Of still pictures beside videos.
    pub still: Option<Box<View>>,
    /// How sounds become spectrograms.
    pub sound: Option<Sound>,
    /// Captions are read along with pictures.
    pub caption: Option<Caption>,
}

impl Default for View {
    fn default() -> Self {
        let (crop, augment) = (Crop::default(), Augment::default());
        let (flip, center, scaled_decode) = (0.5, 0.875, false);
        View { crop, flip, center, augment, scaled_decode, clip: None, still: None, sound: None, caption: None }
    }
}

impl View {
    pub fn check(&self) -> Result<()> {
        self.crop.check()?;
        self.augment.check()?;
        self.clip.as_ref().map_or(Ok(()), Clip::check)?;
        self.caption.as_ref().map_or(Ok(()), Caption::check)?;
        if let Some(still) = &self.still {
            let more = [still.clip.is_some(), still.still.is_some(), still.sound.is_some(), still.caption.is_some()];
            if self.clip.is_none() || more.contains(&true) {
                return Err(Fault::usage(
                    "view.still is how still pictures are shown beside videos: it stands beside view.clip, and has \
                     neither clip, still, sound nor caption",
                ));
            }
            still.check().map_err(|fault| fault.at("view.still"))?;
        }
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

    /// What samples are read as.
    pub fn medium(&self) -> Medium {
        if self.sound.is_some() { Medium::Sound } else { Medium::Picture }
    }

    /// The same for a model on this device. A GPU makes spectrograms itself: for one, views of sounds stay samples, and those
    /// that do so already go on.
    pub fn on(&self, device: Device) -> View {
        let sound = |sound: &Sound| Sound { raw: sound.raw || device.is_cuda(), ..sound.clone() };
        View { sound: self.sound.as_ref().map(sound), ..self.clone() }
    }

    /// [C, T, Y, X] of views, of which a video's are the longest.
    pub fn shape(&self, grid: &Grid) -> [i64; 4] {
        self.sound.as_ref().map_or(grid.pixels(), |sound| sound.shape(grid))
    }

    /// What makes spectrograms, where views stay samples.
    pub fn log_mel(&self, grid: &Grid, device: Device) -> Result<Option<LogMel>> {
        let raw = self.sound.as_ref().filter(|sound| sound.raw);
        raw.map(|sound| LogMel::new(sound, grid, device)).transpose()
    }

    /// Training's view of sample `id` in `epoch` into `out`, as [`View::train_all`] makes several; `repeat` says which.
    #[allow(clippy::too_many_arguments)] // as below
    pub fn train<'a>(
        &self,
        grid: &Grid,
        sample: impl Into<Sample<'a>>,
        seed: u64,
        id: u64,
        epoch: u64,
        repeat: u32,
        out: &mut [u8],
    ) -> Result<u32> {
        self.train_all(grid, sample, seed, id, epoch, repeat..repeat + 1, out)
    }

    /// Training's views of sample `id` in `epoch` into `out`, one after another: of a picture [C, T, Y, X], 8 bits: random
    /// frames of a video, random box, random flip, the same for all frames; of a sound as [`Sound::train`] says. How many of
    /// a view's rows show the sample. `repeats` tell several views of one sample apart: of a video as many as there are, of
    /// anything else one. The box is drawn from the header; no pixel outside of it is decoded for nothing. Faults as
    /// [`Picture::region`] does.
    #[allow(clippy::too_many_arguments)] // a sample's place in the training, and where it goes
    pub fn train_all<'a>(
        &self,
        grid: &Grid,
        sample: impl Into<Sample<'a>>,
        seed: u64,
        id: u64,
        epoch: u64,
        repeats: Range<u32>,
        out: &mut [u8],
    ) -> Result<u32> {
        let streams = |repeat| move |purpose| Draw::new(seed, id, epoch, purpose, repeat);
        let stream = streams(repeats.start);
        let picture = match (sample.into(), &self.sound) {
            (Sample::Sound(clip), Some(sound)) => {
                return sound.train(grid, &clip, &mut stream(Purpose::Crop), out);
            }
            (sample, sound) => picture(sample, sound)?,
        };
        if let Some(still) = self.still(grid, &picture, out.len() / repeats.len())? {
            return still.train_all(&grid.still(), picture, seed, id, epoch, repeats, out);
        }
        let size = size(grid);
        if picture.video().is_some() {
            self.train_clips(grid, picture, streams, repeats, out)?;
            return Ok(size[1]);
        }
        clip::still(grid, &repeats)?;
        let region = self.crop.region(picture.width(), picture.height(), &mut stream(Purpose::Crop));
        let least = if self.scaled_decode { size } else { [region.width, region.height] };
        let part = picture.region(region, least)?;
        with_pixels(out.len(), |pixels| {
            crop::resize(&part, size, self.crop.interpolation, pixels);
            // Ahead of the mirroring: what is drawn to the left is as likely drawn to the right.
            let shape = [size[1] as usize, size[0] as usize, part.image.channels as usize];
            self.augment.apply(pixels, shape, self.crop.interpolation, stream);
            let mirror = stream(Purpose::Flip).uniform() < self.flip;
            plane::planes(pixels, part.image.channels as usize, size[0] as usize, mirror, out);
        });
        Ok(size[1])
    }

    /// Evaluation's view into `out`, as [`View::train`]'s: of a picture its central crop, resized, always decoded at
    /// full size; of a video its middle frames; of a sound its middle.
    pub fn eval<'a>(&self, grid: &Grid, sample: impl Into<Sample<'a>>, out: &mut [u8]) -> Result<u32> {
        let picture = match (sample.into(), &self.sound) {
            (Sample::Sound(clip), Some(sound)) => return sound.eval(grid, &clip, out),
            (sample, sound) => picture(sample, sound)?,
        };
        if let Some(still) = self.still(grid, &picture, out.len())? {
            return still.eval(&grid.still(), picture, out);
        }
        let size = size(grid);
        if picture.video().is_some() {
            self.eval_clip(grid, picture, out)?;
            return Ok(size[1]);
        }
        clip::still(grid, &(0..1))?;
        let (width, height) = (picture.width(), picture.height());
        let [left, top, w, h] = crop::center(width, height, size, self.center);
        let region = self.crop.interpolation.sees([left, top, w, h], size, width, height);
        let part = picture.region(region, [region.width, region.height])?;
        let inside = [left - f64::from(region.left), top - f64::from(region.top), w, h];
        with_pixels(out.len(), |pixels| {
            crop::resize_box(&part, inside, size, self.crop.interpolation, pixels);
            plane::planes(pixels, part.image.channels as usize, size[0] as usize, false, out);
        });
        Ok(size[1])
    }
}

/// The picture that a view of pictures wants.
fn picture<'a>(sample: Sample<'a>, sound: &Option<Sound>) -> Result<Picture<'a>> {
    match (sample, sound) {
        (Sample::Picture(picture), None) => Ok(picture),
        (Sample::Picture(_), Some(_)) => Err(Fault::failed("view.sound was given a picture")),
        (Sample::Sound(_), _) => Err(Fault::failed("a view without `sound` was given a sound")),
    }
}

/// [width, height] of a view.
fn size(grid: &Grid) -> [u32; 2] {
    let [_, _, height, width] = grid.pixels();
    [width as u32, height as u32]
}

/// This thread's buffer for a view before it is laid into planes: [Y, X, C].
fn with_pixels(length: usize, make: impl FnOnce(&mut [u8])) {
    thread_local!(static PIXELS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    PIXELS.with_borrow_mut(|pixels| {
        pixels.resize(length, 0);
        make(pixels);
    });
}
