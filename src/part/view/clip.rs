//! Views of videos: some of the frames, one box and one flip for all of them.
//!
//! The box is that of `view.crop`, or `MultiScaleCrop` (Wang et al., "Temporal Segment Networks", ECCV 2016), with which
//! VideoMAE pre-trains.

use super::{View, crop, plane, size, with_pixels};
use crate::data::clip::Sampling;
use crate::data::decode::{Part, Picture, Region};
use crate::fault::{Code, Fault, Result};
use crate::grid::Grid;
use crate::rng::{Draw, Purpose};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::Range;

/// How a video becomes a clip of `input.frames` frames: the config's `view.clip`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Clip {
    /// Which frames: `{"stride": 4}` or `"segments"`.
    pub sampling: Sampling,
    /// Training's box has its sides among these shares of a frame's shorter side, neighbours at most one apart, and lies
    /// at one of 13 places (VideoMAE: 1, 0.875, 0.75, 0.66); `view.crop` says the box where this is left out, and the
    /// interpolation in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multi_scale: Option<Vec<f64>>,
    /// Clips of each video that is opened, each with a place, box and mask of its own; their frames are decoded in one run
    /// forward ("repeated augmentation"; Feichtenhofer et al., 2022, 4). An epoch stays as many clips as there are videos, so
    /// that in as many epochs as there are repeats each video is opened once.
    #[serde(default = "Clip::once")]
    pub repeats: u32,
}

/// The greatest stride; at 30 frames a second, a frame every 34 seconds.
const STRIDES: u32 = 1024;

/// The most clips of a video.
const REPEATS: u32 = 64;

impl Clip {
    fn once() -> u32 {
        1
    }

    /// Refuses strides and shares that cannot be.
    pub fn check(&self) -> Result<()> {
        if let Sampling::Stride(stride) = self.sampling
            && !(1..=STRIDES).contains(&stride)
        {
            return Err(Fault::usage(format!("view.clip.sampling.stride is {stride}; it must lie in 1..={STRIDES}")));
        }
        if !(1..=REPEATS).contains(&self.repeats) {
            return Err(Fault::usage(format!("view.clip.repeats is {}; it must lie in 1..={REPEATS}", self.repeats)));
        }
        match &self.multi_scale {
            Some(shares) if shares.is_empty() || !shares.iter().all(|share| *share > 0.0 && *share <= 1.0) => {
                Err(Fault::usage(format!(
                    "view.clip.multi_scale is {shares:?}; it holds one or more shares of the shorter side, 0 < share <= 1"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The box of frames of `width` × `height` for a model of `size` [width, height]; none where `view.crop` says it.
    /// A side within 2 pixels of the model's becomes the model's, but never longer than the frame, which the official
    /// crop would pad with black.
    pub fn region(&self, [width, height]: [u32; 2], size: [u32; 2], draw: &mut Draw) -> Option<Region> {
        let shares = self.multi_scale.as_ref()?;
        let shorter = f64::from(width.min(height));
        let near = |side: u32, model: u32, most: u32| if side.abs_diff(model) < 3 { model.min(most) } else { side };
        let sides: Vec<u32> = shares.iter().map(|share| ((shorter * share) as u32).max(1)).collect();
        let mut boxes = Vec::new();
        for (at, &high) in sides.iter().enumerate() {
            for (other, &wide) in sides.iter().enumerate() {
                if at.abs_diff(other) <= 1 {
                    boxes.push([near(wide, size[0], width), near(high, size[1], height)]);
                }
            }
        }
        let [w, h] = boxes[draw.below(boxes.len() as u64) as usize];
        let [x, y] = PLACES[draw.below(PLACES.len() as u64) as usize];
        let (left, top) = (x * ((width - w) / 4), y * ((height - h) / 4));
        Some(Region { left, top, width: w, height: h })
    }
}

/// Places of a box, in quarters of what the frame is larger: corners, centre, edges, and between corners and centre.
const PLACES: [[u32; 2]; 13] =
    [[0, 0], [4, 0], [0, 4], [4, 4], [2, 2], [0, 2], [4, 2], [2, 4], [2, 0], [1, 1], [3, 1], [1, 3], [3, 3]];

/// Refuses a still picture where the model takes clips, or several of one video.
pub fn still(grid: &Grid, repeats: &Range<u32>) -> Result<()> {
    match grid.pixels()[1] {
        1 if repeats.len() == 1 => Ok(()),
        frames => Err(Fault::new(Code::Corrupt, format!("a still picture where clips of {frames} frames are wanted"))),
    }
}

impl View {
    /// The view of a still picture beside videos. A set is taken for what its first sample is: room for as many `bytes` as
    /// the other kind has says that this one is not like it.
    pub(super) fn still(&self, grid: &Grid, picture: &Picture, bytes: usize) -> Result<Option<&View>> {
        let Some(still) = &self.still else { return Ok(None) };
        let room = |grid: &Grid| grid.pixels().iter().product::<i64>() as usize;
        match (picture.video().is_some(), bytes == room(&grid.still())) {
            (true, false) => Ok(None),
            (false, true) => Ok(Some(still)),
            (true, true) => Err(Fault::new(Code::Corrupt, "a video in a data set of still pictures")),
            (false, false) => Err(Fault::new(Code::Corrupt, "a still picture in a data set of videos")),
        }
    }

    fn clip(&self) -> Result<&Clip> {
        self.clip.as_ref().ok_or_else(|| {
            Fault::usage("a video, and the config does not say which of its frames to show; give it view.clip, such as {\"sampling\": {\"stride\": 4}}")
        })
    }

    /// Training's views of a video into `out`, [C, T, Y, X] each: one for each of `repeats`, whose streams `streams` gives.
    /// What is decoded is decoded once, in one run forward. All that may be shown of the video in this epoch decides which
    /// part of its frames that is, so that a clip is the same whichever others are made along with it.
    pub(super) fn train_clips<S: Fn(Purpose) -> Draw>(
        &self,
        grid: &Grid,
        picture: Picture,
        streams: impl Fn(u32) -> S,
        repeats: Range<u32>,
        out: &mut [u8],
    ) -> Result<()> {
        let (clip, size, video) = (self.clip()?, size(grid), picture.video().expect("a video"));
        let (count, whole) = (grid.pixels()[1] as usize, [picture.width(), picture.height()]);
        let drawn = |repeat| {
            let mut draw = streams(repeat)(Purpose::Crop);
            let region = clip.region(whole, size, &mut draw);
            region.unwrap_or_else(|| self.crop.region(whole[0], whole[1], &mut draw))
        };
        let regions: Vec<Region> = (0..clip.repeats.max(repeats.end)).map(drawn).collect();
        let around = around(&regions);
        let least = if self.scaled_decode { least(&regions, around, size) } else { [around.width, around.height] };
        let clips: Vec<_> = repeats
            .map(|repeat| {
                let stream = streams(repeat);
                let indices = clip.sampling.draw(video.frames, count, &mut stream(Purpose::Clip));
                let mirror = stream(Purpose::Flip).uniform() < self.flip;
                (stream, indices, regions[repeat as usize], mirror)
            })
            .collect();
        let frames: Vec<u64> =
            clips.iter().flat_map(|(_, indices, ..)| indices).copied().collect::<BTreeSet<_>>().into_iter().collect();
        let room = out.len() / clips.len();
        picture.clip(&frames, around, least, |number, part| {
            for ((stream, indices, region, mirror), out) in clips.iter().zip(out.chunks_exact_mut(room)) {
                let part = inside(part, around, *region);
                for (at, _) in indices.iter().enumerate().filter(|(_, index)| **index == frames[number]) {
                    let made = |pixels: &mut [u8]| {
                        crop::resize(&part, size, self.crop.interpolation, pixels);
                        // The same streams for each frame: what is drawn for one is drawn for all.
                        let shape = [size[1] as usize, size[0] as usize, part.image.channels as usize];
                        self.augment.apply(pixels, shape, self.crop.interpolation, stream);
                    };
                    lay(&part, at, count, size, *mirror, out, made);
                }
            }
        })
    }

    /// Evaluation's view of a video into `out`, [C, T, Y, X].
    pub(super) fn eval_clip(&self, grid: &Grid, picture: Picture, out: &mut [u8]) -> Result<()> {
        let (clip, size, video) = (self.clip()?, size(grid), picture.video().expect("a video"));
        let count = grid.pixels()[1] as usize;
        let indices = clip.sampling.centred(video.frames, count);
        let (width, height) = (picture.width(), picture.height());
        let [left, top, w, h] = crop::center(width, height, size, self.center);
        let region = self.crop.interpolation.sees([left, top, w, h], size, width, height);
        let inside = [left - f64::from(region.left), top - f64::from(region.top), w, h];
        picture.clip(&indices, region, [region.width, region.height], |at, part| {
            let made = |pixels: &mut [u8]| crop::resize_box(part, inside, size, self.crop.interpolation, pixels);
            lay(part, at, count, size, false, out, made);
        })
    }
}

/// The smallest box around all of them.
fn around(regions: &[Region]) -> Region {
    let ends = |one: &Region| [one.left, one.top, one.left + one.width, one.top + one.height];
    let both = |a: [u32; 4], b: [u32; 4]| [a[0].min(b[0]), a[1].min(b[1]), a[2].max(b[2]), a[3].max(b[3])];
    let [left, top, right, bottom] = regions.iter().map(ends).reduce(both).expect("a box");
    Region { left, top, width: right - left, height: bottom - top }
}

/// The least size of `around` at which each of the regions in it still has `size` pixels, as far as it has them at all.
fn least(regions: &[Region], around: Region, size: [u32; 2]) -> [u32; 2] {
    let side = |all: u32, size: u32, own: fn(&Region) -> u32| {
        let scaled = |one: &Region| (u64::from(all) * u64::from(size)).div_ceil(u64::from(own(one)));
        regions.iter().map(scaled).max().expect("a box") as u32
    };
    [side(around.width, size[0], |one| one.width), side(around.height, size[1], |one| one.height)]
}

/// The part of `part`, which shows `around`, that shows `region`.
fn inside<'a>(part: &Part<'a>, around: Region, region: Region) -> Part<'a> {
    if region == around {
        return *part;
    }
    let (x, y) = (part.width / f64::from(around.width), part.height / f64::from(around.height));
    Part {
        image: part.image,
        left: part.left + f64::from(region.left - around.left) * x,
        top: part.top + f64::from(region.top - around.top) * y,
        width: f64::from(region.width) * x,
        height: f64::from(region.height) * y,
    }
}

/// Makes frame `at` of `count` and lays it into the planes of [C, T, Y, X].
fn lay(
    part: &Part,
    at: usize,
    count: usize,
    size: [u32; 2],
    mirror: bool,
    out: &mut [u8],
    make: impl FnOnce(&mut [u8]),
) {
    let (channels, plane) = (part.image.channels as usize, size[0] as usize * size[1] as usize);
    with_pixels(2 * channels * plane, |both| {
        let (pixels, planes) = both.split_at_mut(channels * plane);
        make(pixels);
        plane::planes(pixels, channels, size[0] as usize, mirror, planes);
        for (channel, from) in planes.chunks_exact(plane).enumerate() {
            out[(channel * count + at) * plane..][..plane].copy_from_slice(from);
        }
    });
}
