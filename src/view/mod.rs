//! A view: one augmented form of a sample. The view of an image or a video holds 8-bit pixels as planes [C, T, Y, X];
//! they are normalized on the device. The view of audio is a normalized spectrogram (`spectrogram.rs`) or, for a GPU,
//! the waveform that it is computed from (`log_mel.rs`).

pub mod crop; // random and central boxes, and their resize
pub mod tone; // tone curves
pub mod color; // brightness, contrast, saturation, hue, grayscale
pub mod sharpness;
pub mod blur;
pub mod affine; // shear, shift, rotation
pub mod jitter; // color jitter
pub mod rand_augment; // random operations
pub mod augment; // the config's `view.augment`
pub mod planar; // interleaved channels → planes
pub mod clip; // clips of videos
pub mod erase; // random erasing of batches
pub mod mixup; // mixup and CutMix of batches
pub mod caption; // the config's `view.caption`
pub mod spectrogram; // audio as an image of one channel
pub mod log_mel; // the same on a GPU, for a batch
mod config; // the config's `view` as it is written

use crate::data::decode::{LazyImage, Region};
use crate::data::modality::{Modality, Sample};
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::rng::{Philox, Purpose};
use augment::Augment;
use caption::CaptionConfig;
use clip::ClipConfig;
use config::ViewConfig;
use crop::Crop;
use log_mel::LogMel;
use serde::{Deserialize, Serialize};
use spectrogram::AudioView;
use std::cell::RefCell;
use std::ops::Range;
use tch::Device;

/// The key of the random streams of a sample's views in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewKey {
    /// Seed of the run.
    pub seed: u64,
    /// Id of the sample.
    pub id: u64,
    pub epoch: u64,
}

/// The config's `view`: how a sample becomes a view. Where `audio` is set the samples are audio, and the other keys,
/// which are for images and videos, are not used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ViewConfig", into = "ViewConfig")]
pub struct View {
    /// Random box in training.
    pub crop: Crop,
    /// Probability of a horizontal flip in training.
    pub hflip: f64,
    /// Fraction of the resized image's side that evaluation's center crop shows: 0.875 resizes to 256 for a model of
    /// 224; 1 shows all of the shorter side.
    pub center_crop: f64,
    /// Training's changes of colors and shape after crop and flip; nothing when left out.
    pub augment: Augment,
    /// Lets training decode a JPEG, or a video's frames, at 1/2, 1/4 or 1/8 of their size where the box still has at
    /// least the model's number of pixels: faster by a third on images of 1400 pixels a side, with different pixels.
    /// They differ from those of a full decode on photographs by 0.4 to 1.7 of 255 in the mean, on noise with a
    /// photograph's spectrum by 2.6 (5.3 in the worst view, 43 in the worst pixel). Evaluation always decodes at full
    /// size.
    pub scaled_decode: bool,
    /// Sampling of the `input.frames` frames of a video.
    pub clip: Option<ClipConfig>,
    /// View of images beside videos.
    pub image: Option<Box<View>>,
    /// View of audio.
    pub audio: Option<AudioView>,
    /// Captions, which are read along with images.
    pub caption: Option<CaptionConfig>,
}

impl Default for View {
    fn default() -> Self {
        View {
            crop: Crop::default(),
            hflip: 0.5,
            center_crop: 0.875,
            augment: Augment::default(),
            scaled_decode: false,
            clip: None,
            image: None,
            audio: None,
            caption: None,
        }
    }
}

impl View {
    /// Refuses values out of range and `view.image` without `view.clip`.
    pub fn check(&self) -> Result<()> {
        self.crop.check()?;
        self.augment.check()?;
        self.clip.as_ref().map_or(Ok(()), ClipConfig::check)?;
        self.caption.as_ref().map_or(Ok(()), CaptionConfig::check)?;
        if let Some(image) = &self.image {
            let nested = image.clip.is_some() || image.image.is_some();
            if self.clip.is_none() || nested || image.audio.is_some() || image.caption.is_some() {
                return Err(Error::usage(
                    "view.image is the view of images beside videos: it needs view.clip, and has neither clip, image, \
                     audio nor caption",
                ));
            }
            image.check().map_err(|error| error.with_context("view.image"))?;
        }
        if !(0.0..=1.0).contains(&self.hflip) {
            return Err(Error::usage(format!("view.hflip is {}; it is a probability, 0 to 1", self.hflip)));
        }
        if !(self.center_crop > 0.0 && self.center_crop <= 1.0) {
            return Err(Error::usage(format!(
                "view.center_crop is {}; it is a fraction of the side, 0 < fraction <= 1",
                self.center_crop
            )));
        }
        Ok(())
    }

    /// Returns the modality of the samples.
    pub fn modality(&self) -> Modality {
        if self.audio.is_some() { Modality::Audio } else { Modality::Image }
    }

    /// Returns the same view for a model on this device. A GPU computes spectrograms itself, so that views of audio are
    /// waveforms there; a view that already makes waveforms stays as it is.
    pub fn for_device(&self, device: Device) -> View {
        let mut view = self.clone();
        if let Some(audio) = &mut view.audio {
            audio.raw_waveform |= device.is_cuda();
        }
        view
    }

    /// Returns the shape [C, T, Y, X] of a view; where a data set has images and videos, that of a video.
    pub fn shape(&self, grid: &Grid) -> [i64; 4] {
        self.audio.as_ref().map_or(grid.pixel_shape(), |audio| audio.shape(grid))
    }

    /// Returns the transform of waveforms to spectrograms, where views are waveforms.
    pub fn log_mel(&self, grid: &Grid, device: Device) -> Result<Option<LogMel>> {
        let audio = self.audio.as_ref().filter(|audio| audio.raw_waveform);
        audio.map(|audio| LogMel::new(audio, grid, device)).transpose()
    }

    /// Writes one training view of a sample into `out`, as [`View::train_views`] writes several.
    pub fn train_view<'a>(
        &self,
        grid: &Grid,
        sample: impl Into<Sample<'a>>,
        key: ViewKey,
        repeat: u32,
        out: &mut [u8],
    ) -> Result<u32> {
        self.train_views(grid, sample, key, repeat..repeat + 1, out)
    }

    /// Writes the training views of a sample in an epoch into `out`, one after another, and returns the number of
    /// rows of a view that hold the sample. A view of an image or video is [C, T, Y, X], 8 bits: random frames, box and
    /// flip, the same box and flip for all frames; for audio see [`AudioView::train_view`]. `repeats` numbers the views
    /// of the sample: any number for a video, otherwise one. The box is drawn from the header, so that no pixel outside
    /// of it is decoded unnecessarily.
    ///
    /// # Errors
    /// Returns the errors of [`LazyImage::decode_region`].
    pub fn train_views<'a>(
        &self,
        grid: &Grid,
        sample: impl Into<Sample<'a>>,
        key: ViewKey,
        repeats: Range<u32>,
        out: &mut [u8],
    ) -> Result<u32> {
        let ViewKey { seed, id, epoch } = key;
        let streams = |repeat| move |purpose| Philox::new(seed, id, epoch, purpose, repeat);
        let stream = streams(repeats.start);
        let image = match (sample.into(), &self.audio) {
            (Sample::Audio(waveform), Some(audio)) => {
                return audio.train_view(grid, &waveform, &mut stream(Purpose::Crop), out);
            }
            (sample, audio) => require_image(sample, audio)?,
        };
        if let Some(view) = self.image_view(grid, &image, out.len() / repeats.len())? {
            return view.train_views(&grid.image(), image, key, repeats, out);
        }
        let size = size(grid);
        if image.video_info().is_some() {
            self.train_clips(grid, image, streams, repeats, out)?;
            return Ok(size[1]);
        }
        clip::check_single_frame(grid, &repeats)?;
        let region = self.crop.sample_region(image.width(), image.height(), &mut stream(Purpose::Crop));
        let min_size = if self.scaled_decode { size } else { [region.width, region.height] };
        let decoded = image.decode_region(region, min_size)?;
        let channels = decoded.image.channels as usize;
        with_pixels(out.len(), |pixels| {
            crop::resize(&decoded, size, self.crop.interpolation, pixels);
            // Before the flip, so that both horizontal directions of an operation are equally likely.
            let shape = [size[1] as usize, size[0] as usize, channels];
            self.augment.apply(pixels, shape, self.crop.interpolation, stream);
            let flip = stream(Purpose::Flip).uniform() < self.hflip;
            planar::to_planar(pixels, channels, size[0] as usize, flip, out);
        });
        Ok(size[1])
    }

    /// Writes the evaluation view into `out`, in the format of [`View::train_view`]: of an image its center crop,
    /// always decoded at full size; of a video its middle frames; of audio its middle.
    pub fn eval_view<'a>(&self, grid: &Grid, sample: impl Into<Sample<'a>>, out: &mut [u8]) -> Result<u32> {
        let image = match (sample.into(), &self.audio) {
            (Sample::Audio(waveform), Some(audio)) => return audio.eval_view(grid, &waveform, out),
            (sample, audio) => require_image(sample, audio)?,
        };
        if let Some(view) = self.image_view(grid, &image, out.len())? {
            return view.eval_view(&grid.image(), image, out);
        }
        let size = size(grid);
        if image.video_info().is_some() {
            self.eval_clip(grid, image, out)?;
            return Ok(size[1]);
        }
        clip::check_single_frame(grid, &(0..1))?;
        let (region, inside) = self.center_region(&image, size);
        let decoded = image.decode_region(region, [region.width, region.height])?;
        with_pixels(out.len(), |pixels| {
            crop::resize_box(&decoded, inside, size, self.crop.interpolation, pixels);
            planar::to_planar(pixels, decoded.image.channels as usize, size[0] as usize, false, out);
        });
        Ok(size[1])
    }

    /// Returns the region that evaluation decodes, and the box of the center crop [left, top, width, height] in it.
    fn center_region(&self, image: &LazyImage, size: [u32; 2]) -> (Region, [f64; 4]) {
        let [width, height] = [image.width(), image.height()];
        let center = crop::center_box(width, height, size, self.center_crop);
        let region = self.crop.interpolation.source_region(center, size, width, height);
        let [left, top, w, h] = center;
        (region, [left - f64::from(region.left), top - f64::from(region.top), w, h])
    }
}

/// Returns the image of a sample, or the error of a view for the other modality.
fn require_image<'a>(sample: Sample<'a>, audio: &Option<AudioView>) -> Result<LazyImage<'a>> {
    match (sample, audio) {
        (Sample::Image(image), None) => Ok(image),
        (Sample::Image(_), Some(_)) => Err(Error::failed("view.audio is set, and the sample is an image")),
        (Sample::Audio(_), _) => Err(Error::failed("view.audio is not set, and the sample is audio")),
    }
}

/// Returns the size [width, height] of a view.
fn size(grid: &Grid) -> [u32; 2] {
    let [_, _, height, width] = grid.pixel_shape();
    [width as u32, height as u32]
}

/// Calls `write` with this thread's pixel buffer, `length` bytes.
fn with_pixels(length: usize, write: impl FnOnce(&mut [u8])) {
    thread_local!(static PIXELS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    PIXELS.with_borrow_mut(|pixels| {
        pixels.resize(length, 0);
        write(pixels);
    });
}

/// Checks that a number of `view.augment` is in its range.
fn check_range(key: &str, value: f64, min: f64, max: f64) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::usage(format!("view.augment.{key} is {value}; it must lie in {min}..={max}")))
}
