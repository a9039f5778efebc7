//! The contact sheet: some of the pictures, small, side by side; of a video some of its frames.

use super::look::spread;
use crate::data::clip::Sampling;
use crate::data::decode::{Decoder, Limits, Part, Region};
use crate::data::index::Row;
use crate::data::set::DataSet;
use crate::data::shard::{IMAGE, VIDEO};
use crate::fault::{Code, Result};
use crate::part::view::crop::{Interpolation, resize};
use crate::run::picture::{Tile, grid, save_png};
use std::path::Path;

/// Pictures on a row, and rows.
const ROW: usize = 8;
const PICTURES: u64 = 64;
/// Frames of a video that are shown.
const FRAMES: u64 = 4;
/// Pixels of a picture's longer side on the sheet; a smaller picture is not enlarged but by whole factors.
const SIDE: u32 = 112;

/// Writes up to 64 of the `wanted` samples that were looked at, spread evenly, of videos up to 16; false where none has
/// a picture that can be decoded.
pub fn write(set: &DataSet, wanted: u64, path: &Path) -> Result<bool> {
    let mut decoder = Decoder::new(Limits::default());
    let (shard, row) = set.sample(0)?;
    let each = if shard.member(row, IMAGE).is_some_and(|member| moves(&member)) { FRAMES } else { 1 };
    let shown = wanted.min(PICTURES / each);
    let mut tiles = Vec::new();
    for at in 0..shown {
        let number = spread(spread(at, shown, wanted), wanted, set.len());
        match look(set, number, &mut decoder) {
            Ok(seen) => tiles.extend(seen),
            // The report has named it.
            Err(fault) if fault.code == Code::Corrupt => {}
            Err(fault) => return Err(fault),
        }
    }
    if tiles.is_empty() {
        return Ok(false);
    }
    let rows: Vec<Vec<Tile>> = tiles.chunks(ROW).map(<[Tile]>::to_vec).collect();
    save_png(&grid(&[], &rows), path)?;
    Ok(true)
}

fn moves(member: &Row) -> bool {
    VIDEO.iter().any(|video| member.split().1.eq_ignore_ascii_case(video))
}

/// A sample's picture, or frames of its video.
fn look(set: &DataSet, number: u64, decoder: &mut Decoder) -> Result<Vec<Tile>> {
    let (shard, row) = set.sample(number)?;
    let bytes = shard.read(row, IMAGE)?;
    let picture = decoder.open(&bytes, 3)?;
    let (width, height) = (picture.width(), picture.height());
    let longer = width.max(height).max(SIDE);
    let small = |side: u32| (side * SIDE / longer).max(1);
    let size = [small(width), small(height)];
    let all = Region { left: 0, top: 0, width, height };
    let tile = |part: &Part| {
        let mut pixels = vec![0; size[0] as usize * size[1] as usize * 3];
        resize(part, size, Interpolation::Bicubic, &mut pixels);
        Tile::rgb(size[0], size[1], pixels)
    };
    let Some(video) = picture.video() else {
        return Ok(vec![tile(&picture.region(all, size)?)]);
    };
    let mut tiles = Vec::new();
    let indices = Sampling::Segments.centred(video.frames, FRAMES as usize);
    picture.clip(&indices, all, size, |_, part| tiles.push(tile(part)))?;
    Ok(tiles)
}
