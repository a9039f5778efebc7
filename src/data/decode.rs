//! Decodes a member's bytes to pixels: JPEG, PNG, WebP and videos (`video.rs`), distinguished by their first bytes.
//!
//! Images are upright according to their EXIF orientation; 16 bits are scaled to 8; alpha is dropped; grayscale and
//! CMYK are converted as Pillow's `convert` does. Sizes are checked on the header, before anything of that size is
//! allocated. Pixels of a JPEG are those of libjpeg-turbo, and so equal Pillow's bit for bit. Only the region of a JPEG
//! that a view shows is decoded.

mod color; // conversion of channels and bit depth
mod jpeg; // region and scale of a JPEG
mod png_webp; // PNG and WebP
mod orientation; // EXIF orientation

use super::truncation::{ImageStructure, ImageStructureError, read_structure};
use super::video::{self, VideoDecoder, VideoInfo, VideoReader};
use crate::bridge::jpeg as turbo;
use crate::error::{Error, ExitCode, Result};
use image::ImageDecoder;
use image::metadata::Orientation;
use orientation::ExifOrientation;

/// A decoded image, 8 bits per channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodedImage {
    pub width: u32,
    pub height: u32,
    /// Number of channels: 1 (grayscale) or 3 (RGB).
    pub channels: u32,
    /// [height, width, channels].
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

impl Region {
    /// Returns [left, top, width, height] in fractional pixels.
    fn to_f64(self) -> [f64; 4] {
        [self.left, self.top, self.width, self.height].map(f64::from)
    }
}

/// A decoded region: pixels that contain it, perhaps with a margin, and its box in them. At a scale below 1 the box may
/// have fractional borders.
#[derive(Clone, Copy, Debug)]
pub struct DecodedRegion<'a> {
    pub image: &'a DecodedImage,
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

/// Limits of an image; all inclusive.
///
/// They bound decoding time as well. Worst cases found at the defaults, in seconds of one core (AMD EPYC, 2026): 2.4
/// for a lossy WebP of 50 million pixels of noise, 1.2 for a crafted progressive JPEG whose valid scans refine nothing,
/// 0.4 for a PNG of noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Bytes of the file.
    pub max_bytes: usize,
    /// Pixels of a side.
    pub max_side: u32,
    /// Pixels of the image. An image takes at most 8 bytes of memory per pixel, as much again for the state of its
    /// decoder, and the size of its profiles or, in a WebP, of its code tables.
    pub max_pixels: u64,
    /// Scans of a JPEG. Encoders write about ten; each takes time for every pixel.
    pub max_scans: u32,
}

impl Default for ImageLimits {
    /// 64 MiB, 16,384 pixels a side, 50 million pixels, 64 scans.
    fn default() -> Self {
        ImageLimits { max_bytes: 64 << 20, max_side: 1 << 14, max_pixels: 50_000_000, max_scans: 64 }
    }
}

impl ImageLimits {
    fn check_size(&self, [width, height]: [u32; 2]) -> Result<()> {
        if width == 0 || height == 0 || width.max(height) > self.max_side {
            return Err(corrupt_image(format!("{width}x{height} pixels, a side may have {}", self.max_side)));
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(corrupt_image(format!("{width}x{height} pixels, the limit is {} in all", self.max_pixels)));
        }
        Ok(())
    }

    /// Returns the limits for libjpeg-turbo. A JPEG of several scans keeps two bytes for each pixel of at most four
    /// channels, in whole coding units.
    fn jpeg_limits(&self) -> turbo::JpegLimits {
        let max_coefficients = 64 * u64::from(self.max_side) + self.max_pixels;
        turbo::JpegLimits {
            max_pixels: self.max_pixels,
            max_scans: self.max_scans,
            max_memory: max_coefficients.saturating_mul(8),
        }
    }
}

/// A decoder of images and videos; one per thread. It reuses libjpeg-turbo's state and its buffers, so that pixels need
/// no new memory once the largest image was decoded (buffers beyond 32 MiB are freed).
pub struct VisualDecoder {
    limits: ImageLimits,
    jpeg: Option<turbo::Decompressor>,
    videos: VideoDecoder,
    buffers: DecodeBuffers,
}

/// The buffers of a decoder.
struct DecodeBuffers {
    /// CPU time of decoding pixels.
    cpu_nanoseconds: u64,
    /// Pixels in the orientation of the file.
    stored: Vec<u8>,
    /// The upright image, which is returned.
    upright: DecodedImage,
}

/// An image or a video whose header was read: complete and within the limits. Pixels are decoded on request.
pub struct LazyImage<'a> {
    width: u32,
    height: u32,
    channels: u32,
    source: ImageSource<'a>,
}

/// A decoded region in the orientation of the file.
struct StoredRegion {
    /// Width and height of the pixels.
    size: [u32; 2],
    /// Box of the region in them, [left, top, width, height].
    region: [f64; 4],
}

enum ImageSource<'a> {
    Jpeg(turbo::JpegReader<'a>, ExifOrientation, &'a mut DecodeBuffers),
    PngOrWebp(Box<dyn ImageDecoder + 'a>, ExifOrientation, &'a mut DecodeBuffers),
    Decoded(&'a DecodedImage),
    Video(VideoReader<'a>, &'a mut DecodeBuffers),
}

impl VisualDecoder {
    /// Makes a decoder with these limits for images and [`video::VideoLimits::default`] for videos.
    pub fn new(limits: ImageLimits) -> VisualDecoder {
        let upright = DecodedImage { width: 0, height: 0, channels: 0, pixels: Vec::new() };
        VisualDecoder {
            limits,
            jpeg: None,
            videos: VideoDecoder::new(video::VideoLimits::default()),
            buffers: DecodeBuffers { cpu_nanoseconds: 0, stored: Vec::new(), upright },
        }
    }

    /// Reads the header of an image or video that will be decoded to 1 (grayscale) or 3 (RGB) channels.
    ///
    /// # Errors
    /// ExitCode::Corrupt for anything that is not a complete image, or a video, within the limits; and the errors of
    /// [`VideoDecoder::open`].
    pub fn open<'a>(&'a mut self, bytes: &'a [u8], channels: u32) -> Result<LazyImage<'a>> {
        assert!(channels == 1 || channels == 3, "{channels} channels");
        let VisualDecoder { limits, jpeg, videos, buffers } = self;
        if video::is_video(bytes) {
            let video = videos.open(bytes)?;
            let VideoInfo { width, height, .. } = video.info;
            return Ok(LazyImage { width, height, channels, source: ImageSource::Video(video, buffers) });
        }
        if bytes.len() > limits.max_bytes {
            return Err(corrupt_image(format!("{} bytes, the limit is {}", bytes.len(), limits.max_bytes)));
        }
        let structure = read_structure(bytes).map_err(|error| match error {
            ImageStructureError::UnknownFormat => corrupt_image("neither JPEG, PNG, WebP nor a video"),
            ImageStructureError::Truncated => corrupt_image("the file was cut before the end of the image"),
        })?;
        let (source, orientation, size) = match structure {
            ImageStructure::Jpeg { exif, scans } => {
                if scans > limits.max_scans {
                    let message = format!("a JPEG of {scans} scans, the limit is {}", limits.max_scans);
                    return Err(corrupt_image(message));
                }
                if jpeg.is_none() {
                    *jpeg = Some(turbo::Decompressor::new(limits.jpeg_limits())?);
                }
                let reader = jpeg.as_mut().expect("made above").read_header(bytes)?;
                let size = [reader.header.width, reader.header.height];
                limits.check_size(size)?;
                let orientation = ExifOrientation::from(exif.and_then(Orientation::from_exif_chunk));
                (ImageSource::Jpeg(reader, orientation, buffers), orientation, size)
            }
            ImageStructure::Png { size } | ImageStructure::WebP { size } => {
                // Checked before the decoder is made; for a WebP this covers each image inside.
                limits.check_size(size)?;
                let (decoder, orientation) = png_webp::open(bytes, size)?;
                let size = decoder.dimensions().into();
                limits.check_size(size)?;
                (ImageSource::PngOrWebp(decoder, orientation, buffers), orientation, size)
            }
        };
        let [width, height] = orientation.orient_size(size);
        Ok(LazyImage { width, height, channels, source })
    }

    /// Returns the CPU nanoseconds that decoding of pixels took since the last call; headers are not counted.
    pub fn take_cpu_nanoseconds(&mut self) -> u64 {
        std::mem::take(&mut self.buffers.cpu_nanoseconds)
    }
}

/// Returns the CPU time of this thread.
fn thread_cpu_nanoseconds() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl<'a> LazyImage<'a> {
    /// Returns the width in pixels, upright.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Returns the height in pixels, upright.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Returns the number of channels after decoding.
    pub fn channels(&self) -> u32 {
        self.channels
    }

    /// Decodes the full image.
    pub fn decode_full(self) -> Result<&'a DecodedImage> {
        let full = Region { left: 0, top: 0, width: self.width, height: self.height };
        let min_size = [self.width, self.height];
        Ok(self.decode(full, min_size)?.image)
    }

    /// Decodes `region` (upright coordinates), perhaps with a margin. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its
    /// size while the region keeps at least `min_size` [width, height] pixels; pass the region's own size for full
    /// scale.
    ///
    /// At full scale the region's pixels equal those of [`LazyImage::decode_full`]: libjpeg-turbo interpolates chroma
    /// at a crop's border differently, so two more pixels are decoded on either side. For damage below or to the right
    /// of the region only `decode_full` may return an error.
    pub fn decode_region(self, region: Region, min_size: [u32; 2]) -> Result<DecodedRegion<'a>> {
        let Region { left, top, width, height } = region;
        let inside = width > 0
            && height > 0
            && left.checked_add(width).is_some_and(|right| right <= self.width)
            && top.checked_add(height).is_some_and(|bottom| bottom <= self.height);
        assert!(inside, "{region:?} of an image of {}x{}", self.width, self.height);
        self.decode(region, min_size)
    }

    /// Returns the metadata of a video; none for an image.
    pub fn video_info(&self) -> Option<&VideoInfo> {
        match &self.source {
            ImageSource::Video(video, _) => Some(&video.info),
            _ => None,
        }
    }

    /// Decodes frames of a video; `indices` ascend and may repeat. Calls `on_frame` for each with its position in
    /// `indices` and the `region` as [`LazyImage::decode_region`] returns it.
    ///
    /// # Errors
    /// ExitCode::Corrupt where a frame cannot be decoded, and for an image.
    pub fn decode_frames(
        self,
        indices: &[u64],
        region: Region,
        min_size: [u32; 2],
        mut on_frame: impl FnMut(usize, &DecodedRegion),
    ) -> Result<()> {
        let LazyImage { channels, source: ImageSource::Video(video, buffers), .. } = self else {
            return Err(corrupt_image("an image where a video is expected"));
        };
        let mut unique = indices.to_vec();
        unique.dedup();
        let frames = video.frames(&unique, [region.left, region.top, region.width, region.height], min_size)?;
        [buffers.upright.width, buffers.upright.height] = frames.size;
        buffers.upright.channels = channels;
        let [left, top, width, height] = frames.region;
        let mut positions = 0..indices.len();
        for (frame, index) in unique.iter().enumerate() {
            let start = thread_cpu_nanoseconds();
            resize_buffer(&mut buffers.upright.pixels, frames.bytes());
            frames.read(frame, &mut buffers.upright.pixels)?;
            if channels == 1 {
                color::rgb_to_gray(&mut buffers.upright.pixels);
            }
            buffers.cpu_nanoseconds += thread_cpu_nanoseconds() - start;
            let decoded = DecodedRegion { image: &buffers.upright, left, top, width, height };
            while positions.start < indices.len() && indices[positions.start] == *index {
                on_frame(positions.next().expect("checked by the loop condition"), &decoded);
            }
        }
        Ok(())
    }

    /// Encodes a video again, like [`VideoReader::transcode`].
    ///
    /// # Errors
    /// ExitCode::Corrupt for an image.
    pub fn transcode(
        self,
        encoding: &video::VideoEncoding,
        fps: Option<f64>,
        short_side: Option<u32>,
    ) -> Result<Vec<u8>> {
        match self.source {
            ImageSource::Video(video, _) => video.transcode(encoding, fps, short_side),
            _ => Err(corrupt_image("an image where a video is expected")),
        }
    }

    fn decode(self, region: Region, min_size: [u32; 2]) -> Result<DecodedRegion<'a>> {
        let start = thread_cpu_nanoseconds();
        let LazyImage { channels, source, .. } = self;
        let (buffers, orientation, stored) = match source {
            ImageSource::Decoded(image) => return Ok(DecodedRegion::new(image, region.to_f64())),
            ImageSource::Video(..) => return Err(corrupt_image("a video where an image is expected")),
            ImageSource::Jpeg(mut reader, orientation, buffers) => {
                let stored = orientation.to_stored(region, [reader.header.width, reader.header.height]);
                let min_size = orientation.orient_size(min_size);
                let stored = jpeg::read(&mut reader, stored, min_size, channels, &mut buffers.stored)?;
                (buffers, orientation, stored)
            }
            ImageSource::PngOrWebp(decoder, orientation, buffers) => {
                let size = png_webp::read(decoder, channels, buffers)?;
                let region = orientation.to_stored(region, size).to_f64();
                (buffers, orientation, StoredRegion { size, region })
            }
        };
        let DecodeBuffers { cpu_nanoseconds, stored: pixels, upright } = buffers;
        [upright.width, upright.height] = orientation.orient_size(stored.size);
        upright.channels = channels;
        orientation.orient_pixels(pixels, stored.size, channels as usize, &mut upright.pixels);
        let region = orientation.to_upright(stored.region, stored.size);
        *cpu_nanoseconds += thread_cpu_nanoseconds() - start;
        Ok(DecodedRegion::new(upright, region))
    }
}

impl<'a> From<&'a DecodedImage> for LazyImage<'a> {
    fn from(image: &'a DecodedImage) -> Self {
        let DecodedImage { width, height, channels, .. } = *image;
        LazyImage { width, height, channels, source: ImageSource::Decoded(image) }
    }
}

impl<'a> DecodedRegion<'a> {
    fn new(image: &'a DecodedImage, [left, top, width, height]: [f64; 4]) -> Self {
        DecodedRegion { image, left, top, width, height }
    }
}

/// Makes `buffer` `length` bytes long, with unspecified content. The buffer grows in whole MiB; a large one is freed
/// where a much smaller one suffices.
fn resize_buffer(buffer: &mut Vec<u8>, length: usize) {
    const MAX_KEPT_BYTES: usize = 32 << 20;
    if length > buffer.capacity() || buffer.capacity() > MAX_KEPT_BYTES.max(2 * length) {
        // Freed before the new one is allocated, so that both never exist at once.
        *buffer = Vec::new();
        *buffer = vec![0; length.next_multiple_of(1 << 20)];
    }
    buffer.resize(length, 0);
}

/// Decodes one image to 1 (grayscale) or 3 (RGB) channels, with a decoder of its own.
pub fn decode(bytes: &[u8], channels: u32, limits: &ImageLimits) -> Result<DecodedImage> {
    let mut decoder = VisualDecoder::new(*limits);
    decoder.open(bytes, channels)?.decode_full()?;
    Ok(decoder.buffers.upright)
}

/// Reads the header alone and returns width and height, upright, if the file is complete and within the limits.
pub fn probe(bytes: &[u8], limits: &ImageLimits) -> Result<(u32, u32)> {
    let mut decoder = VisualDecoder::new(*limits);
    let image = decoder.open(bytes, 3)?;
    Ok((image.width, image.height))
}

fn corrupt_image(why: impl std::fmt::Display) -> Error {
    Error::new(ExitCode::Corrupt, format!("not an image that can be decoded: {why}"))
}
