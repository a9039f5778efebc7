//! Conversion of decoded frames to upright RGB pixels [height, width, 3] of a region, downscaled where permitted.

use crate::RequestError;
use crate::protocol::VideoInfo;
use crate::raw::RgbConverter;
use ffmpeg_next::format::Pixel;
use ffmpeg_next::util::frame::Video as Frame;

/// Converts the frames of one video.
pub struct Converter {
    cached: Option<RgbConverter>,
    /// The region to convert, [left, top, width, height] in coded pixels, extended to an even left and top.
    source: [u32; 4],
    /// The converted region, not yet rotated.
    rgb: Frame,
    rotation: u32,
    /// The requested region in the output, upright.
    region: [f64; 4],
    pixels: Vec<u8>,
}

impl Converter {
    /// Creates a converter for `region` (upright) of a video's frames, at the smallest of the scales 1/1, 1/2, 1/4, 1/8
    /// at which the region has at least `min_size` pixels.
    pub fn new(info: &VideoInfo, region: [u32; 4], min_size: [u32; 2]) -> Result<Converter, RequestError> {
        let [left, top, width, height] = region;
        let fits =
            |start: u32, size: u32, full: u32| size > 0 && start.checked_add(size).is_some_and(|end| end <= full);
        if !fits(left, width, info.width) || !fits(top, height, info.height) {
            return Err(format!("no such region of {}x{} pixels: {region:?}", info.width, info.height));
        }
        let denominator =
            [8, 4, 2].into_iter().find(|by| width >= by * min_size[0] && height >= by * min_size[1]).unwrap_or(1);
        let rotation = info.rotation;
        let full = [info.width, info.height];
        let [x, y, w, h] = upright_to_coded(region, rotation, full);
        // Rows and columns in pairs, which share their chroma; FFmpeg rounds differently in a single row.
        let [_, _, coded_width, coded_height] = upright_to_coded([0, 0, full[0], full[1]], rotation, full);
        let left = x & !1;
        let top = y & !1;
        let right = (x + w).next_multiple_of(2).min(coded_width);
        let bottom = (y + h).next_multiple_of(2).min(coded_height);
        let source = [left, top, right - left, bottom - top];
        let size = [source[2].div_ceil(denominator), source[3].div_ceil(denominator)];
        let scale = [f64::from(size[0]) / f64::from(source[2]), f64::from(size[1]) / f64::from(source[3])];
        let scaled = [
            f64::from(x - left) * scale[0],
            f64::from(y - top) * scale[1],
            f64::from(w) * scale[0],
            f64::from(h) * scale[1],
        ];
        Ok(Converter {
            cached: None,
            source,
            rgb: Frame::new(Pixel::RGB24, size[0], size[1]),
            rotation,
            region: coded_to_upright(scaled, rotation, size),
            pixels: Vec::new(),
        })
    }

    /// Returns the width and height of the output.
    pub fn output_size(&self) -> [u32; 2] {
        let width = self.rgb.width();
        let height = self.rgb.height();
        if self.rotation.is_multiple_of(180) { [width, height] } else { [height, width] }
    }

    /// Returns the requested region in the output: [left, top, width, height].
    pub fn region(&self) -> [f64; 4] {
        self.region
    }

    /// Returns the bytes of an output frame.
    pub fn frame_bytes(&self) -> usize {
        self.rgb.width() as usize * self.rgb.height() as usize * 3
    }

    /// Converts one frame.
    pub fn convert(&mut self, frame: &Frame) -> Result<&[u8], RequestError> {
        RgbConverter::convert(&mut self.cached, frame, self.source, &mut self.rgb)?;
        let width = self.rgb.width() as usize;
        let height = self.rgb.height() as usize;
        let data = self.rgb.data(0);
        let stride = self.rgb.stride(0);
        let row = |y: usize| &data[y * stride..y * stride + width * 3];
        let pixel = |x: usize, y: usize| &data[y * stride + x * 3..y * stride + x * 3 + 3];
        let out = &mut self.pixels;
        out.clear();
        match self.rotation {
            0 => (0..height).for_each(|y| out.extend_from_slice(row(y))),
            180 => (0..height).rev().for_each(|y| (0..width).rev().for_each(|x| out.extend_from_slice(pixel(x, y)))),
            90 => (0..width).for_each(|x| (0..height).rev().for_each(|y| out.extend_from_slice(pixel(x, y)))),
            _ => (0..width).rev().for_each(|x| (0..height).for_each(|y| out.extend_from_slice(pixel(x, y)))),
        }
        Ok(&self.pixels)
    }
}

/// Maps a region of an image of upright `size` to the coded image, which must be rotated clockwise to be upright.
fn upright_to_coded([left, top, width, height]: [u32; 4], rotation: u32, size: [u32; 2]) -> [u32; 4] {
    let right = size[0] - left - width;
    let bottom = size[1] - top - height;
    match rotation {
        0 => [left, top, width, height],
        90 => [top, right, height, width],
        180 => [right, bottom, width, height],
        _ => [bottom, left, height, width],
    }
}

/// Maps a region of an image of coded `size` to the upright image.
fn coded_to_upright([left, top, width, height]: [f64; 4], rotation: u32, size: [u32; 2]) -> [f64; 4] {
    let right = f64::from(size[0]) - left - width;
    let bottom = f64::from(size[1]) - top - height;
    match rotation {
        0 => [left, top, width, height],
        90 => [bottom, left, height, width],
        180 => [right, bottom, width, height],
        _ => [top, right, height, width],
    }
}
