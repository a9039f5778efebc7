//! Bytes of a member become pixels: JPEG, PNG, WebP and videos (`clip.rs`), told apart by their first bytes.
//!
//! Upright as the camera's EXIF entry says; 16 bits scaled to 8; alpha dropped; grey and CMYK made as Pillow's `convert`
//! does. Sizes are checked on the header, before anything of that size is allocated. Pixels of a JPEG are those of
//! libjpeg-turbo, and so Pillow's bit for bit. Of a JPEG only the part that a view shows is decoded.

mod colour; // channels and bits as stored → as wanted
mod jpeg; // which part of a JPEG is decoded, and at what scale
mod still; // PNG and WebP
mod turn; // EXIF's orientation

use super::clip::{self, Facts, Video, Videos};
use super::complete::{Lack, Whole, complete};
use crate::bridge::jpeg as turbo;
use crate::fault::{Code, Fault, Result};
use image::ImageDecoder;
use image::metadata::Orientation;
use turn::Turn;

/// One decoded sample before its view: 8-bit pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    pub width: u32,
    pub height: u32,
    /// Channels interleaved: [height, width, channels].
    pub channels: u32,
    pub pixels: Vec<u8>,
}

/// A box of whole pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

/// A region of a picture as it was decoded: pixels that show it and perhaps more around it, and where it lies in them.
/// At a scale below 1 its borders need not be whole pixels.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub image: &'a Decoded,
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

/// What a picture may cost; all inclusive.
///
/// They bound the time as well. Worst found at the defaults, seconds of one core (AMD EPYC, 2026): 2.4 for a lossy
/// WebP of 50 million pixels of noise, 1.2 for a crafted progressive JPEG whose lawful scans refine nothing, 0.4 for a
/// PNG of noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file.
    pub max_bytes: usize,
    /// Pixels of a side.
    pub max_side: u32,
    /// Pixels of the picture. A picture takes at most 8 bytes of memory for each of them, as much again for what its
    /// decoder keeps, and what its profiles or, in a WebP, its tables of codes take.
    pub max_pixels: u64,
    /// Passes over the picture that a JPEG may ask for. Encoders write about ten; each costs time for every pixel.
    pub max_scans: u32,
}

impl Default for Limits {
    /// 64 MiB, 16,384 pixels a side, 50 million pixels, 64 scans.
    fn default() -> Self {
        Limits { max_bytes: 64 << 20, max_side: 1 << 14, max_pixels: 50_000_000, max_scans: 64 }
    }
}

/// Decodes pictures one after another; one for each thread. It keeps libjpeg-turbo's state and its buffers, so that
/// pixels need no new memory once the largest picture was seen (beyond 32 MiB they are given back).
pub struct Decoder {
    limits: Limits,
    jpeg: Option<turbo::Decompressor>,
    videos: Videos,
    scratch: Scratch,
}

/// The buffers of a decoder.
struct Scratch {
    /// Nanoseconds of processor that pixels took.
    spent: u64,
    /// Pixels as the file has them.
    stored: Vec<u8>,
    /// Pixels as they are given out.
    upright: Decoded,
}

/// A picture whose header was read: whole and within the limits.
pub struct Picture<'a> {
    width: u32,
    height: u32,
    channels: u32,
    source: Source<'a>,
}

/// What was read, as stored: width and height of the pixels, and where the region lies in them, [left, top, width,
/// height].
struct Placed {
    size: [u32; 2],
    place: [f64; 4],
}

enum Source<'a> {
    Jpeg(turbo::Opened<'a>, Turn, &'a mut Scratch),
    Still(Box<dyn ImageDecoder + 'a>, Turn, &'a mut Scratch),
    Ready(&'a Decoded),
    Moving(Video<'a>, &'a mut Scratch),
}

impl Decoder {
    /// Videos have limits of their own, [`clip::Limits::default`].
    pub fn new(limits: Limits) -> Decoder {
        let upright = Decoded { width: 0, height: 0, channels: 0, pixels: Vec::new() };
        let (videos, scratch) =
            (Videos::new(clip::Limits::default()), Scratch { spent: 0, stored: Vec::new(), upright });
        Decoder { limits, jpeg: None, videos, scratch }
    }

    /// Reads the header alone. `channels` of the pixels to come: 1 (grey) or 3 (red, green, blue). Faults with
    /// Code::Corrupt on anything that is not a whole picture, or a video, within the limits; and as [`Videos::open`] does.
    pub fn open<'a>(&'a mut self, bytes: &'a [u8], channels: u32) -> Result<Picture<'a>> {
        assert!(channels == 1 || channels == 3, "{channels} channels");
        let Decoder { limits, jpeg, videos, scratch } = self;
        if clip::is_video(bytes) {
            let video = videos.open(bytes)?;
            let (width, height) = (video.facts.width, video.facts.height);
            return Ok(Picture { width, height, channels, source: Source::Moving(video, scratch) });
        }
        if bytes.len() > limits.max_bytes {
            return Err(corrupt(format!("{} bytes, the limit is {}", bytes.len(), limits.max_bytes)));
        }
        let whole = complete(bytes).map_err(|lack| match lack {
            Lack::Format => corrupt("neither JPEG, PNG, WebP nor a video"),
            Lack::End => corrupt("the file was cut before the end of the picture"),
        })?;
        let (source, turn, size) = match whole {
            Whole::Jpeg { exif, scans } => {
                if scans > limits.max_scans {
                    return Err(corrupt(format!("a JPEG of {scans} scans, the limit is {}", limits.max_scans)));
                }
                if jpeg.is_none() {
                    *jpeg = Some(turbo::Decompressor::new(limits.bounds())?);
                }
                let opened = jpeg.as_mut().expect("made above").open(bytes)?;
                let size = [opened.head.width, opened.head.height];
                limits.allow(size)?;
                let turn = Turn::from(exif.and_then(Orientation::from_exif_chunk));
                (Source::Jpeg(opened, turn, scratch), turn, size)
            }
            Whole::Png { size } | Whole::WebP { size } => {
                // The header says it before the decoder is asked; of a WebP, each picture inside.
                limits.allow(size)?;
                let (decoder, turn) = still::open(bytes, size)?;
                let size = decoder.dimensions().into();
                limits.allow(size)?;
                (Source::Still(decoder, turn, scratch), turn, size)
            }
        };
        let [width, height] = turn.size(size);
        Ok(Picture { width, height, channels, source })
    }
}

impl Decoder {
    /// Nanoseconds of processor that pixels took since this was last asked; reading headers does not count.
    pub fn spent(&mut self) -> u64 {
        std::mem::take(&mut self.scratch.spent)
    }
}

/// Nanoseconds that this thread has used of a processor.
fn processor() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Limits {
    fn allow(&self, [width, height]: [u32; 2]) -> Result<()> {
        if width == 0 || height == 0 || width.max(height) > self.max_side {
            return Err(corrupt(format!("{width}x{height} pixels, a side may have {}", self.max_side)));
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(corrupt(format!("{width}x{height} pixels, the limit is {} in all", self.max_pixels)));
        }
        Ok(())
    }

    /// A JPEG of several scans keeps two bytes for each pixel of at most four channels, in whole units.
    fn bounds(&self) -> turbo::Bounds {
        let units = 64 * u64::from(self.max_side) + self.max_pixels;
        turbo::Bounds { pixels: self.max_pixels, scans: self.max_scans, memory: units.saturating_mul(8) }
    }
}

impl<'a> Picture<'a> {
    /// Width in pixels, upright.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels, upright.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Channels of its pixels once decoded.
    pub fn channels(&self) -> u32 {
        self.channels
    }

    /// All pixels.
    pub fn whole(self) -> Result<&'a Decoded> {
        let all = Region { left: 0, top: 0, width: self.width, height: self.height };
        let least = [self.width, self.height];
        Ok(self.decode(all, least)?.image)
    }

    /// The pixels of `region` (upright coordinates) and perhaps more around it. A JPEG may come smaller, by 1/2, 1/4 or
    /// 1/8, while the region still has at least `least` [width, height] pixels; ask for the region's own size where
    /// it may not.
    ///
    /// At full size the region's pixels are those of [`Picture::whole`], without exception: libjpeg-turbo takes chroma
    /// beyond the cut from one sample further, so two pixels more are decoded on either side. On damage below or right
    /// of the region `whole` may fault where this does not.
    pub fn region(self, region: Region, least: [u32; 2]) -> Result<Part<'a>> {
        let Region { left, top, width, height } = region;
        let inside = width > 0
            && height > 0
            && left.checked_add(width).is_some_and(|right| right <= self.width)
            && top.checked_add(height).is_some_and(|bottom| bottom <= self.height);
        assert!(inside, "{region:?} of a picture of {}x{}", self.width, self.height);
        self.decode(region, least)
    }

    /// What is known of a video; none for a still picture.
    pub fn video(&self) -> Option<&Facts> {
        match &self.source {
            Source::Moving(video, _) => Some(&video.facts),
            _ => None,
        }
    }

    /// Frames of a video, in rising order and perhaps several times the same: `see` is shown the `region` of each, as
    /// [`Picture::region`] gives it, with its place in `indices`. Faults with Code::Corrupt where one cannot be decoded,
    /// and for a still picture.
    pub fn clip(
        self,
        indices: &[u64],
        region: Region,
        least: [u32; 2],
        mut see: impl FnMut(usize, &Part),
    ) -> Result<()> {
        let Picture { channels, source: Source::Moving(video, scratch), .. } = self else {
            return Err(corrupt("a still picture where a video is wanted"));
        };
        let mut unique = indices.to_vec();
        unique.dedup();
        let frames = video.frames(&unique, [region.left, region.top, region.width, region.height], least)?;
        let upright = &mut scratch.upright;
        ([upright.width, upright.height], upright.channels) = (frames.size, channels);
        let [left, top, w, h] = frames.place;
        let mut shown = 0..indices.len();
        for (at, index) in unique.iter().enumerate() {
            let began = processor();
            fit(&mut scratch.upright.pixels, frames.bytes());
            frames.read(at, &mut scratch.upright.pixels)?;
            if channels == 1 {
                colour::rgb_to_grey(&mut scratch.upright.pixels);
            }
            scratch.spent += processor() - began;
            let part = Part { image: &scratch.upright, left, top, width: w, height: h };
            while shown.start < indices.len() && indices[shown.start] == *index {
                see(shown.next().expect("one is left"), &part);
            }
        }
        Ok(())
    }

    /// A video encoded anew, as [`Video::recode`] does it; Code::Corrupt for a still picture.
    pub fn recode(self, recipe: &clip::Recipe, fps: Option<f64>, shorter: Option<u32>) -> Result<Vec<u8>> {
        match self.source {
            Source::Moving(video, _) => video.recode(recipe, fps, shorter),
            _ => Err(corrupt("a still picture where a video is wanted")),
        }
    }

    fn decode(self, region: Region, least: [u32; 2]) -> Result<Part<'a>> {
        let began = processor();
        let Picture { channels, source, .. } = self;
        let (scratch, turn, part) = match source {
            Source::Ready(image) => return Ok(Part::whole_pixels(image, region)),
            Source::Moving(..) => return Err(corrupt("a video where a still picture is wanted")),
            Source::Jpeg(mut opened, turn, scratch) => {
                let stored = turn.stored(region, [opened.head.width, opened.head.height]);
                let part = jpeg::read(&mut opened, stored, turn.size(least), channels, &mut scratch.stored)?;
                (scratch, turn, part)
            }
            Source::Still(decoder, turn, scratch) => {
                let [width, height] = still::read(decoder, channels, scratch)?;
                let stored = turn.stored(region, [width, height]);
                let place = [stored.left, stored.top, stored.width, stored.height].map(f64::from);
                (scratch, turn, Placed { size: [width, height], place })
            }
        };
        let Scratch { spent, stored, upright } = scratch;
        [upright.width, upright.height] = turn.size(part.size);
        upright.channels = channels;
        turn.pixels(stored, part.size, channels as usize, &mut upright.pixels);
        let [left, top, width, height] = turn.place(part.place, part.size);
        *spent += processor() - began;
        Ok(Part { image: upright, left, top, width, height })
    }
}

/// Pixels that were decoded already.
impl<'a> From<&'a Decoded> for Picture<'a> {
    fn from(image: &'a Decoded) -> Self {
        let Decoded { width, height, channels, .. } = *image;
        Picture { width, height, channels, source: Source::Ready(image) }
    }
}

impl<'a> Part<'a> {
    fn whole_pixels(image: &'a Decoded, region: Region) -> Self {
        let [left, top, width, height] = [region.left, region.top, region.width, region.height].map(f64::from);
        Part { image, left, top, width, height }
    }
}

/// Makes `buffer` `length` bytes long, whatever they are. It grows in whole MiB, and is given back where it is large
/// and was needed for one picture alone.
fn fit(buffer: &mut Vec<u8>, length: usize) {
    const KEPT: usize = 32 << 20;
    if length > buffer.capacity() || buffer.capacity() > KEPT.max(2 * length) {
        *buffer = Vec::new();
        *buffer = vec![0; length.next_multiple_of(1 << 20)];
    }
    buffer.resize(length, 0);
}

/// Decodes one picture to 1 (grey) or 3 (red, green, blue) channels, with a decoder of its own.
pub fn decode(bytes: &[u8], channels: u32, limits: &Limits) -> Result<Decoded> {
    let mut decoder = Decoder::new(*limits);
    decoder.open(bytes, channels)?.whole()?;
    Ok(decoder.scratch.upright)
}

/// Reads the header alone: width and height, upright, once the file is whole and within the limits.
pub fn probe(bytes: &[u8], limits: &Limits) -> Result<(u32, u32)> {
    let mut decoder = Decoder::new(*limits);
    let picture = decoder.open(bytes, 3)?;
    Ok((picture.width, picture.height))
}

fn corrupt(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Corrupt, format!("not a picture that can be decoded: {why}"))
}
