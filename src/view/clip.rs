//! Views of videos: sampled frames, with one box and one flip for all of them.
//!
//! The box is that of `view.crop`, or of `MultiScaleCrop` (Wang et al., "Temporal Segment Networks", ECCV 2016), with
//! which VideoMAE pre-trains.

use super::{View, crop, planar, size, with_pixels};
use crate::data::decode::{DecodedRegion, LazyImage, Region};
use crate::data::video::Sampling;
use crate::error::{Error, ExitCode, Result};
use crate::grid::Grid;
use crate::rng::{Philox, Purpose};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::Range;

/// The config's `view.clip`: how a video becomes a clip of `input.frames` frames.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClipConfig {
    /// Sampling of frames: `{"stride": 4}` or `"segments"`.
    pub sampling: Sampling,
    /// Sides of training's box as fractions of a frame's shorter side (VideoMAE: 1, 0.875, 0.75, 0.66). Width and
    /// height take fractions at most one apart in the list, and the box has one of 13 positions. When left out,
    /// `view.crop` gives the box; it gives the interpolation in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multi_scale: Option<Vec<f64>>,
    /// Clips per opened video, each with its own position, box and mask; their frames are decoded in one forward pass
    /// through the file ("repeated augmentation"; Feichtenhofer et al., 2022: 4). An epoch still has one clip per
    /// video, so that each video is opened once in `repeats` epochs.
    #[serde(default = "ClipConfig::default_repeats")]
    pub repeats: u32,
}

/// The maximum stride; at 30 frames a second, a frame every 34 seconds.
const MAX_STRIDE: u32 = 1024;

/// The maximum number of clips per opened video.
const MAX_REPEATS: u32 = 64;

impl ClipConfig {
    fn default_repeats() -> u32 {
        1
    }

    /// Refuses strides, repeats and fractions out of range.
    pub fn check(&self) -> Result<()> {
        if let Sampling::Stride(stride) = self.sampling
            && !(1..=MAX_STRIDE).contains(&stride)
        {
            return Err(Error::usage(format!(
                "view.clip.sampling.stride is {stride}; it must lie in 1..={MAX_STRIDE}"
            )));
        }
        if !(1..=MAX_REPEATS).contains(&self.repeats) {
            return Err(Error::usage(format!(
                "view.clip.repeats is {}; it must lie in 1..={MAX_REPEATS}",
                self.repeats
            )));
        }
        match &self.multi_scale {
            Some(fractions) if fractions.is_empty() || !fractions.iter().all(|side| *side > 0.0 && *side <= 1.0) => {
                Err(Error::usage(format!(
                    "view.clip.multi_scale is {fractions:?}; it holds one or more fractions of the shorter side, \
                     0 < fraction <= 1"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Samples the box of frames of `width` × `height` for a model of `size` [width, height]; none where `view.crop`
    /// gives it. A side within 2 pixels of the model's becomes the model's, but never longer than the frame, which the
    /// official crop would pad with black.
    pub fn sample_region(&self, [width, height]: [u32; 2], size: [u32; 2], rng: &mut Philox) -> Option<Region> {
        let fractions = self.multi_scale.as_ref()?;
        let short_side = f64::from(width.min(height));
        let snap = |side: u32, model: u32, max: u32| if side.abs_diff(model) < 3 { model.min(max) } else { side };
        let sides: Vec<u32> = fractions.iter().map(|fraction| ((short_side * fraction) as u32).max(1)).collect();
        let mut boxes = Vec::new();
        for (i, &h) in sides.iter().enumerate() {
            for (j, &w) in sides.iter().enumerate() {
                if i.abs_diff(j) <= 1 {
                    boxes.push([snap(w, size[0], width), snap(h, size[1], height)]);
                }
            }
        }
        let [w, h] = boxes[rng.uniform_int(boxes.len() as u64) as usize];
        let [x, y] = POSITIONS[rng.uniform_int(POSITIONS.len() as u64) as usize];
        let left = x * ((width - w) / 4);
        let top = y * ((height - h) / 4);
        Some(Region { left, top, width: w, height: h })
    }
}

/// Positions of a box, in quarters of the margin: corners, center, edges, and between corners and center.
const POSITIONS: [[u32; 2]; 13] =
    [[0, 0], [4, 0], [0, 4], [4, 4], [2, 2], [0, 2], [4, 2], [2, 4], [2, 0], [1, 1], [3, 1], [1, 3], [3, 3]];

/// Refuses an image where the model takes clips, or several views of one.
pub fn check_single_frame(grid: &Grid, repeats: &Range<u32>) -> Result<()> {
    match grid.pixel_shape()[1] {
        1 if repeats.len() == 1 => Ok(()),
        frames => Err(Error::new(ExitCode::Corrupt, format!("an image where clips of {frames} frames are expected"))),
    }
}

/// One training view of a video.
struct TrainClip<S> {
    stream: S,
    /// Frames of the clip, in ascending order.
    indices: Vec<u64>,
    region: Region,
    flip: bool,
}

/// The position of a frame in a clip, and the clip's format.
#[derive(Clone, Copy)]
struct FrameSlot {
    index: usize,
    /// Frames of the clip.
    count: usize,
    /// Width and height.
    size: [u32; 2],
    flip: bool,
}

impl View {
    /// Returns the view of images beside videos, where the sample is an image and `view.image` is given.
    ///
    /// # Errors
    /// ExitCode::Corrupt where the sample is not of the kind of its data set, which is that of the set's first sample:
    /// the length of a view, `bytes`, is that of an image or that of a clip.
    pub(super) fn image_view(&self, grid: &Grid, image: &LazyImage, bytes: usize) -> Result<Option<&View>> {
        let Some(view) = &self.image else { return Ok(None) };
        let is_video = image.video_info().is_some();
        let is_image_set = bytes == grid.image().pixel_shape().iter().product::<i64>() as usize;
        match (is_video, is_image_set) {
            (true, false) => Ok(None),
            (false, true) => Ok(Some(view)),
            (true, true) => Err(Error::new(ExitCode::Corrupt, "a video in a data set of images")),
            (false, false) => Err(Error::new(ExitCode::Corrupt, "an image in a data set of videos")),
        }
    }

    fn require_clip(&self) -> Result<&ClipConfig> {
        self.clip.as_ref().ok_or_else(|| {
            Error::usage(
                "the sample is a video, and the config does not say which frames to use; give view.clip, such as \
                 {\"sampling\": {\"stride\": 4}}",
            )
        })
    }

    /// Writes the training views of a video into `out`, [C, T, Y, X] each: one for each of `repeats`, with random
    /// streams from `streams`. All frames are decoded in one forward pass. The decoded part of the frames covers the
    /// boxes of all repeats of the epoch, so that a clip does not depend on the clips that are decoded with it.
    pub(super) fn train_clips<S: Fn(Purpose) -> Philox>(
        &self,
        grid: &Grid,
        image: LazyImage,
        streams: impl Fn(u32) -> S,
        repeats: Range<u32>,
        out: &mut [u8],
    ) -> Result<()> {
        let config = self.require_clip()?;
        let size = size(grid);
        let count = grid.pixel_shape()[1] as usize;
        let video_frames = image.video_info().expect("a video").frames;
        let [width, height] = [image.width(), image.height()];
        let sample_region = |repeat| {
            let mut rng = streams(repeat)(Purpose::Crop);
            let region = config.sample_region([width, height], size, &mut rng);
            region.unwrap_or_else(|| self.crop.sample_region(width, height, &mut rng))
        };
        let regions: Vec<Region> = (0..config.repeats.max(repeats.end)).map(sample_region).collect();
        let bounds = bounding_box(&regions);
        let min_size =
            if self.scaled_decode { min_size(&regions, bounds, size) } else { [bounds.width, bounds.height] };
        let sample_clip = |repeat| {
            let stream = streams(repeat);
            let indices = config.sampling.sample(video_frames, count, &mut stream(Purpose::Clip));
            let flip = stream(Purpose::Flip).uniform() < self.hflip;
            TrainClip { stream, indices, region: regions[repeat as usize], flip }
        };
        let clips: Vec<TrainClip<S>> = repeats.map(sample_clip).collect();
        let frames: BTreeSet<u64> = clips.iter().flat_map(|clip| &clip.indices).copied().collect();
        let frames: Vec<u64> = frames.into_iter().collect();
        let clip_bytes = out.len() / clips.len();
        image.decode_frames(&frames, bounds, min_size, |frame, decoded| {
            for (clip, out) in clips.iter().zip(out.chunks_exact_mut(clip_bytes)) {
                let region = sub_region(decoded, bounds, clip.region);
                let shape = [size[1] as usize, size[0] as usize, region.image.channels as usize];
                for (index, _) in clip.indices.iter().enumerate().filter(|(_, index)| **index == frames[frame]) {
                    let slot = FrameSlot { index, count, size, flip: clip.flip };
                    write_frame(&region, slot, out, |pixels| {
                        crop::resize(&region, size, self.crop.interpolation, pixels);
                        // The same streams for each frame, so that all frames are changed alike.
                        self.augment.apply(pixels, shape, self.crop.interpolation, &clip.stream);
                    });
                }
            }
        })
    }

    /// Writes the evaluation view of a video into `out`, [C, T, Y, X].
    pub(super) fn eval_clip(&self, grid: &Grid, image: LazyImage, out: &mut [u8]) -> Result<()> {
        let config = self.require_clip()?;
        let size = size(grid);
        let count = grid.pixel_shape()[1] as usize;
        let indices = config.sampling.sample_center(image.video_info().expect("a video").frames, count);
        let (region, inside) = self.center_region(&image, size);
        image.decode_frames(&indices, region, [region.width, region.height], |index, decoded| {
            let slot = FrameSlot { index, count, size, flip: false };
            write_frame(decoded, slot, out, |pixels| {
                crop::resize_box(decoded, inside, size, self.crop.interpolation, pixels);
            });
        })
    }
}

/// Returns the smallest box that contains all regions.
fn bounding_box(regions: &[Region]) -> Region {
    let left = regions.iter().map(|region| region.left).min().expect("a region");
    let top = regions.iter().map(|region| region.top).min().expect("a region");
    let right = regions.iter().map(|region| region.left + region.width).max().expect("a region");
    let bottom = regions.iter().map(|region| region.top + region.height).max().expect("a region");
    Region { left, top, width: right - left, height: bottom - top }
}

/// Returns the smallest size of `bounds` at which each region in it still has `size` pixels, unless it has fewer at
/// full size.
fn min_size(regions: &[Region], bounds: Region, size: [u32; 2]) -> [u32; 2] {
    let min_side = |full: u32, size: u32, side: fn(&Region) -> u32| {
        let scaled = |region: &Region| (u64::from(full) * u64::from(size)).div_ceil(u64::from(side(region)));
        regions.iter().map(scaled).max().expect("a region") as u32
    };
    [min_side(bounds.width, size[0], |region| region.width), min_side(bounds.height, size[1], |region| region.height)]
}

/// Returns the part of `decoded`, which shows `bounds`, that shows `region`.
fn sub_region<'a>(decoded: &DecodedRegion<'a>, bounds: Region, region: Region) -> DecodedRegion<'a> {
    if region == bounds {
        return *decoded;
    }
    let scale_x = decoded.width / f64::from(bounds.width);
    let scale_y = decoded.height / f64::from(bounds.height);
    DecodedRegion {
        image: decoded.image,
        left: decoded.left + f64::from(region.left - bounds.left) * scale_x,
        top: decoded.top + f64::from(region.top - bounds.top) * scale_y,
        width: f64::from(region.width) * scale_x,
        height: f64::from(region.height) * scale_y,
    }
}

/// Lets `render` write a frame [Y, X, C] and copies it into the planes of the clip `out` [C, T, Y, X].
fn write_frame(decoded: &DecodedRegion, slot: FrameSlot, out: &mut [u8], render: impl FnOnce(&mut [u8])) {
    let FrameSlot { index, count, size, flip } = slot;
    let channels = decoded.image.channels as usize;
    let plane = size[0] as usize * size[1] as usize;
    with_pixels(2 * channels * plane, |buffer| {
        let (pixels, planes) = buffer.split_at_mut(channels * plane);
        render(pixels);
        planar::to_planar(pixels, channels, size[0] as usize, flip, planes);
        for (channel, source) in planes.chunks_exact(plane).enumerate() {
            out[(channel * count + index) * plane..][..plane].copy_from_slice(source);
        }
    });
}
