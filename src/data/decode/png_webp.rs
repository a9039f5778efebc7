//! PNG and WebP, by the `image` crate. They are decoded in full: neither format allows access to a region.

use super::orientation::ExifOrientation;
use super::{DecodeBuffers, color, corrupt_image, resize_buffer};
use crate::error::Result;
use image::{ImageDecoder, ImageReader};
use std::io::Cursor;

/// Maximum memory of a decoder besides pixels: color profiles and other ancillary chunks, uncompressed.
const MAX_ANCILLARY_BYTES: u64 = 8 << 20;

/// Reads the header of a file whose largest image has `size`.
pub fn open<'a>(bytes: &'a [u8], size: [u32; 2]) -> Result<(Box<dyn ImageDecoder + 'a>, ExifOrientation)> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(corrupt_image)?;
    let mut limits = image::Limits::default();
    [limits.max_image_width, limits.max_image_height] = size.map(Some);
    // The widest pixel has four channels of 16 bits.
    limits.max_alloc = Some(u64::from(size[0]) * u64::from(size[1]) * 8 + MAX_ANCILLARY_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(corrupt_image)?;
    let orientation = ExifOrientation::from(decoder.orientation().ok());
    Ok((Box::new(decoder), orientation))
}

/// Decodes into `buffers.stored`, [height, width, channels] in the orientation of the file, and returns width and
/// height.
pub fn read(decoder: Box<dyn ImageDecoder + '_>, channels: u32, buffers: &mut DecodeBuffers) -> Result<[u32; 2]> {
    let size = decoder.dimensions().into();
    let color_type = decoder.color_type();
    let length = usize::try_from(decoder.total_bytes()).map_err(corrupt_image)?;
    if color::is_output_format(color_type, channels) {
        resize_buffer(&mut buffers.stored, length);
        decoder.read_image_boxed(&mut buffers.stored).map_err(corrupt_image)?;
    } else {
        let raw = &mut buffers.upright.pixels;
        resize_buffer(raw, length);
        decoder.read_image_boxed(raw).map_err(corrupt_image)?;
        color::convert(raw, color_type, channels, &mut buffers.stored)?;
    }
    Ok(size)
}
