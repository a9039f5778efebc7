//! The region and the scale at which a JPEG is decoded.

use super::{Region, StoredRegion, color, resize_buffer};
use crate::bridge::jpeg::{ColorSpace, CropRegion, JpegReader, PixelFormat};
use crate::error::Result;

/// Margin in pixels that the colors of a region depend on: chroma is interpolated from the next sample, two pixels
/// wide.
const CHROMA_MARGIN: u32 = 2;

/// Decodes `region` into `out`, [height, width, channels], at the smallest scale that leaves it at least `min_size`
/// pixels. Everything is in the orientation of the file.
pub fn read(
    reader: &mut JpegReader,
    region: Region,
    min_size: [u32; 2],
    channels: u32,
    out: &mut Vec<u8>,
) -> Result<StoredRegion> {
    let divisor = choose_divisor(region, min_size);
    let [width, height] = reader.scaled_size(divisor);
    let full = CropRegion { left: 0, top: 0, width, height };
    let mut crop = crop_region(reader, region, divisor);
    if let Err(error) = decode_crop(reader, divisor, crop, channels, out) {
        if crop == full {
            return Err(error);
        }
        // A file with unusual coding units can be decoded, but not cropped as its header suggests.
        crop = full;
        decode_crop(reader, divisor, crop, channels, out)?;
    }
    let [left, top, width, height] =
        [region.left, region.top, region.width, region.height].map(|value| f64::from(value) / f64::from(divisor));
    let region = [left - f64::from(crop.left), top - f64::from(crop.top), width, height];
    Ok(StoredRegion { size: [crop.width, crop.height], region })
}

/// Returns the largest divisor with a fast inverse transform that leaves the region at least `min_size` pixels.
fn choose_divisor(region: Region, min_size: [u32; 2]) -> u32 {
    let suffices = |by: &u32| region.width / by >= min_size[0] && region.height / by >= min_size[1];
    [8, 4, 2].into_iter().find(suffices).unwrap_or(1)
}

/// Returns the pixels to decode for the region at 1/`divisor` of the size.
fn crop_region(reader: &JpegReader, region: Region, divisor: u32) -> CropRegion {
    let [width, height] = reader.scaled_size(divisor);
    let Some([unit_width, unit_height]) = reader.scaled_mcu_size(divisor) else {
        return CropRegion { left: 0, top: 0, width, height };
    };
    let left = (region.left / divisor).saturating_sub(CHROMA_MARGIN) / unit_width * unit_width;
    let right = (region.left + region.width).div_ceil(divisor).saturating_add(CHROMA_MARGIN).min(width);
    // Whole rows of units are skipped, and one pixel row more, whose upper neighbor is missing; the next row is exact.
    let unit_top = (region.top / divisor).saturating_sub(1) / unit_height * unit_height;
    let top = if unit_top == 0 { 0 } else { unit_top + 1 };
    let bottom = (region.top + region.height).div_ceil(divisor).min(height);
    CropRegion { left, top, width: right - left, height: bottom - top }
}

/// Decodes a crop and converts it to `channels`.
fn decode_crop(
    reader: &mut JpegReader,
    divisor: u32,
    crop: CropRegion,
    channels: u32,
    out: &mut Vec<u8>,
) -> Result<()> {
    let format = match (reader.header.color_space, channels) {
        (ColorSpace::Gray, 1) => PixelFormat::Gray,
        (ColorSpace::Cmyk, _) => PixelFormat::Cmyk,
        _ => PixelFormat::Rgb,
    };
    resize_buffer(out, crop.width as usize * crop.height as usize * format.bytes_per_pixel());
    let is_full = [crop.width, crop.height] == reader.scaled_size(divisor);
    reader.decode(format, divisor, (!is_full).then_some(crop), out)?;
    if format == PixelFormat::Cmyk {
        color::cmyk_to_rgb(out);
    }
    if channels == 1 && format != PixelFormat::Gray {
        color::rgb_to_gray(out);
    }
    Ok(())
}
