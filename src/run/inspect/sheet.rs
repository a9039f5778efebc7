//! The contact sheet: some of the pictures, small, side by side; of a video some of its frames, of a sound its
//! spectrogram.

use super::look::spread;
use crate::data::clip::Sampling;
use crate::data::decode::{Limits, Part, Picture, Region};
use crate::data::index::Row;
use crate::data::medium::{Decoder, Medium, Sample};
use crate::data::set::DataSet;
use crate::data::shard::{IMAGE, SOUND, VIDEO};
use crate::data::sound::Clip;
use crate::data::sound::filterbank::{Filterbank, Frames};
use crate::data::sound::resample::Resampler;
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
/// Of a sound's spectrogram: samples a second, mel filters (its height in pixels), and the most seconds that are shown.
const RATE: u32 = 16_000;
const MELS: usize = 64;
const SECONDS: u32 = 10;
/// Below the loudest value of a spectrogram by this much (in the logarithm of power: 60 dB), it is black.
const DEPTH: f32 = 13.8;

/// Writes up to 64 of the `wanted` samples that were looked at, spread evenly, of videos up to 16; false where none has
/// a picture or sound that can be decoded.
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

/// A sample's picture, frames of its video, or the spectrogram of its sound.
fn look(set: &DataSet, number: u64, decoder: &mut Decoder) -> Result<Vec<Tile>> {
    let (shard, row) = set.sample(number)?;
    let pictured = shard.member(row, IMAGE).is_some();
    let heard = shard.member(row, SOUND).is_some();
    let medium = if heard && !pictured { Medium::Sound } else { Medium::Picture };
    let bytes = shard.read(row, medium.extensions())?;
    match decoder.open(&bytes, medium, 3)? {
        Sample::Picture(picture) => small(picture),
        Sample::Sound(clip) => Ok(vec![spectrogram(&clip)?]),
    }
}

fn small(picture: Picture) -> Result<Vec<Tile>> {
    let (width, height) = (picture.width(), picture.height());
    let longer = width.max(height).max(SIDE);
    let short = |side: u32| (side * SIDE / longer).max(1);
    let size = [short(width), short(height)];
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

/// Time from left to right, the highest frequency on top, as bright as loud: the first seconds of the sound, all of them
/// on the same number of columns per second.
fn spectrogram(clip: &Clip) -> Result<Tile> {
    let first = &clip.samples[..clip.samples.len().min((SECONDS * clip.rate) as usize)];
    let mut resampler = Resampler::default();
    let samples = resampler.resample(first, [clip.rate, RATE])?;
    let frames = Frames::at(RATE).of(samples.len());
    let mut rows = vec![0.0; frames * MELS];
    Filterbank::new(RATE, MELS).log_mel(samples, &mut rows);
    // Frames under one column.
    let under = (SECONDS * 100).div_ceil(SIDE) as usize;
    let columns: Vec<Vec<f32>> = rows
        .chunks(under * MELS)
        .map(|frames| {
            let count = (frames.len() / MELS) as f32;
            (0..MELS).map(|mel| frames.iter().skip(mel).step_by(MELS).sum::<f32>() / count).collect()
        })
        .collect();
    let loudest = columns.iter().flatten().copied().fold(f32::MIN, f32::max);
    let shade = |value: f32| ((1.0 - (loudest - value) / DEPTH).clamp(0.0, 1.0) * 255.0) as u8;
    let pixels: Vec<u8> =
        (0..MELS).rev().flat_map(|mel| columns.iter().map(move |column| shade(column[mel]))).collect();
    // A sound shorter than a frame has no column.
    let pixels = if columns.is_empty() { vec![0; MELS] } else { pixels };
    Ok(Tile::grey(columns.len().max(1) as u32, MELS as u32, &pixels))
}
