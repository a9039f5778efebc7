//! Which part of a JPEG is decoded, and at what scale.

use super::{Placed, Region, colour, fit};
use crate::bridge::jpeg::{Opened, Pixels, Space, Window};
use crate::fault::Result;

/// Pixels beside a region that its colours depend on: chroma is interpolated from the next sample, two pixels wide.
const REACH: u32 = 2;

/// Decodes `region` into `out`, [height, width, channels], at a scale that leaves it at least `least` pixels; all as
/// stored, not yet upright.
pub fn read(opened: &mut Opened, region: Region, least: [u32; 2], channels: u32, out: &mut Vec<u8>) -> Result<Placed> {
    let by = scale(region, least);
    let [width, height] = opened.scaled(by);
    let all = Window { left: 0, top: 0, width, height };
    let mut window = window(opened, region, by);
    if let Err(fault) = cut(opened, by, window, channels, out) {
        if window == all {
            return Err(fault);
        }
        // A file of unusual units can be decoded, but not cut where its header makes one believe.
        window = all;
        cut(opened, by, window, channels, out)?;
    }
    let [left, top, width, height] =
        [region.left, region.top, region.width, region.height].map(|value| f64::from(value) / f64::from(by));
    let place = [left - f64::from(window.left), top - f64::from(window.top), width, height];
    Ok(Placed { size: [window.width, window.height], place })
}

/// The smallest of the scales whose inverse transforms are fast that leaves at least `least` pixels.
fn scale(region: Region, least: [u32; 2]) -> u32 {
    let enough = |by: &u32| region.width / by >= least[0] && region.height / by >= least[1];
    [8, 4, 2].into_iter().find(enough).unwrap_or(1)
}

/// The pixels to decode for the region at 1/`by` of the size.
fn window(opened: &Opened, region: Region, by: u32) -> Window {
    let [width, height] = opened.scaled(by);
    let Some([unit_width, unit_height]) = opened.scaled_unit(by) else {
        return Window { left: 0, top: 0, width, height };
    };
    let left = (region.left / by).saturating_sub(REACH) / unit_width * unit_width;
    let right = (region.left + region.width).div_ceil(by).saturating_add(REACH).min(width);
    // Rows are skipped in whole units and one row more, which sees its neighbour above; the row after it is right.
    let top = (region.top / by).saturating_sub(1) / unit_height * unit_height;
    let top = if top == 0 { 0 } else { top + 1 };
    let bottom = (region.top + region.height).div_ceil(by).min(height);
    Window { left, top, width: right - left, height: bottom - top }
}

/// Decodes the window and brings it to `channels`.
fn cut(opened: &mut Opened, by: u32, window: Window, channels: u32, out: &mut Vec<u8>) -> Result<()> {
    let pixels = match (opened.head.space, channels) {
        (Space::Grey, 1) => Pixels::Grey,
        (Space::Ink, _) => Pixels::Cmyk,
        _ => Pixels::Rgb,
    };
    fit(out, window.width as usize * window.height as usize * pixels.bytes());
    let whole = [window.width, window.height] == opened.scaled(by);
    opened.read(pixels, by, (!whole).then_some(window), out)?;
    if pixels == Pixels::Cmyk {
        colour::ink_to_rgb(out);
    }
    if channels == 1 && pixels != Pixels::Grey {
        colour::rgb_to_grey(out);
    }
    Ok(())
}
