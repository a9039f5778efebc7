//! Frames as decoded → upright pixels [height, width, 3] of one region, smaller where that may be.

use crate::Refusal;
use crate::raw::ToRgb;
use crate::wire::Facts;
use ffmpeg_next::format::Pixel;
use ffmpeg_next::util::frame::Video as Frame;

/// Converts the frames of one video.
pub struct Converter {
    kept: Option<ToRgb>,
    /// What is converted, [left, top, width, height] in stored pixels; even where it begins.
    from: [u32; 4],
    /// The same, converted and not yet turned.
    rgb: Frame,
    rotation: u32,
    /// The region in it, upright.
    place: [f64; 4],
    pixels: Vec<u8>,
}

impl Converter {
    /// For `region` (upright) of a video's frames, at 1/1, 1/2, 1/4 or 1/8, whichever still leaves `least` pixels.
    pub fn new(facts: &Facts, region: [u32; 4], least: [u32; 2]) -> Result<Converter, Refusal> {
        let [left, top, width, height] = region;
        let inside = |from: u32, size: u32, all: u32| size > 0 && from.checked_add(size).is_some_and(|to| to <= all);
        if !inside(left, width, facts.width) || !inside(top, height, facts.height) {
            return Err(format!("no such region of {}x{} pixels: {region:?}", facts.width, facts.height));
        }
        let by = [8, 4, 2].into_iter().find(|by| width >= by * least[0] && height >= by * least[1]).unwrap_or(1);
        let rotation = facts.rotation;
        let [x, y, w, h] = stored(region, rotation, [facts.width, facts.height]);
        // Rows and columns in pairs, which share their chroma; FFmpeg converts a single row with other rounding.
        let all = stored([0, 0, facts.width, facts.height], rotation, [facts.width, facts.height]);
        let (left, top) = (x & !1, y & !1);
        let (right, bottom) = ((x + w).next_multiple_of(2).min(all[2]), (y + h).next_multiple_of(2).min(all[3]));
        let from = [left, top, right - left, bottom - top];
        let to = [from[2].div_ceil(by), from[3].div_ceil(by)];
        let scale = [f64::from(to[0]) / f64::from(from[2]), f64::from(to[1]) / f64::from(from[3])];
        let part = [(x - left, scale[0]), (y - top, scale[1]), (w, scale[0]), (h, scale[1])];
        let place = upright(part.map(|(pixels, scale)| f64::from(pixels) * scale), rotation, to);
        Ok(Converter {
            kept: None,
            from,
            rgb: Frame::new(Pixel::RGB24, to[0], to[1]),
            rotation,
            place,
            pixels: Vec::new(),
        })
    }

    /// Width and height of what comes out.
    pub fn size(&self) -> [u32; 2] {
        let [width, height] = [self.rgb.width(), self.rgb.height()];
        if self.rotation.is_multiple_of(180) { [width, height] } else { [height, width] }
    }

    /// Where the region lies in it: [left, top, width, height].
    pub fn place(&self) -> [f64; 4] {
        self.place
    }

    /// Bytes of what comes out.
    pub fn bytes(&self) -> usize {
        self.rgb.width() as usize * self.rgb.height() as usize * 3
    }

    /// One frame.
    pub fn convert(&mut self, frame: &Frame) -> Result<&[u8], Refusal> {
        ToRgb::convert(&mut self.kept, frame, self.from, &mut self.rgb)?;
        let (width, height) = (self.rgb.width() as usize, self.rgb.height() as usize);
        let (data, stride) = (self.rgb.data(0), self.rgb.stride(0));
        self.pixels.clear();
        let row = |y: usize| &data[y * stride..y * stride + width * 3];
        let at = |x: usize, y: usize| &data[y * stride + x * 3..y * stride + x * 3 + 3];
        let out = &mut self.pixels;
        match self.rotation {
            0 => (0..height).for_each(|y| out.extend_from_slice(row(y))),
            180 => (0..height).rev().for_each(|y| (0..width).rev().for_each(|x| out.extend_from_slice(at(x, y)))),
            90 => (0..width).for_each(|x| (0..height).rev().for_each(|y| out.extend_from_slice(at(x, y)))),
            _ => (0..width).rev().for_each(|x| (0..height).for_each(|y| out.extend_from_slice(at(x, y)))),
        }
        Ok(&self.pixels)
    }
}

/// An upright region of a picture of upright `size` in the stored picture, which is turned clockwise to stand upright.
fn stored([left, top, width, height]: [u32; 4], rotation: u32, size: [u32; 2]) -> [u32; 4] {
    let (right, bottom) = (size[0] - left - width, size[1] - top - height);
    match rotation {
        0 => [left, top, width, height],
        90 => [top, right, height, width],
        180 => [right, bottom, width, height],
        _ => [bottom, left, height, width],
    }
}

/// A stored box of a picture of stored `size`, upright.
fn upright([left, top, width, height]: [f64; 4], rotation: u32, size: [u32; 2]) -> [f64; 4] {
    let (right, bottom) = (f64::from(size[0]) - left - width, f64::from(size[1]) - top - height);
    match rotation {
        0 => [left, top, width, height],
        90 => [bottom, left, height, width],
        180 => [right, bottom, width, height],
        _ => [top, right, height, width],
    }
}
