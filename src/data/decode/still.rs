//! PNG and WebP, through the `image` crate. They are decoded whole: neither format can be entered in the middle.

use super::turn::Turn;
use super::{Scratch, colour, corrupt, fit};
use crate::fault::Result;
use image::{ImageDecoder, ImageReader};
use std::io::Cursor;

/// What a decoder may keep besides pixels: colour profiles and other ancillary chunks, unpacked.
const ASIDE: u64 = 8 << 20;

/// Reads the header of a file whose largest picture has `size`.
pub fn open<'a>(bytes: &'a [u8], size: [u32; 2]) -> Result<(Box<dyn ImageDecoder + 'a>, Turn)> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(corrupt)?;
    let mut caps = image::Limits::default();
    [caps.max_image_width, caps.max_image_height] = size.map(Some);
    // 16 bits of four channels is the widest pixel there is.
    caps.max_alloc = Some(u64::from(size[0]) * u64::from(size[1]) * 8 + ASIDE);
    reader.limits(caps);
    let mut decoder = reader.into_decoder().map_err(corrupt)?;
    let turn = Turn::from(decoder.orientation().ok());
    Ok((Box::new(decoder), turn))
}

/// Decodes into `scratch.stored`, [height, width, channels], not yet upright, and says its width and height.
pub fn read(decoder: Box<dyn ImageDecoder + '_>, channels: u32, scratch: &mut Scratch) -> Result<[u32; 2]> {
    let size = decoder.dimensions().into();
    let kind = decoder.color_type();
    let length = usize::try_from(decoder.total_bytes()).map_err(corrupt)?;
    if colour::fits(kind, channels) {
        fit(&mut scratch.stored, length);
        decoder.read_image_boxed(&mut scratch.stored).map_err(corrupt)?;
    } else {
        let raw = &mut scratch.upright.pixels;
        fit(raw, length);
        decoder.read_image_boxed(raw).map_err(corrupt)?;
        colour::convert(raw, kind, channels, &mut scratch.stored)?;
    }
    Ok(size)
}
