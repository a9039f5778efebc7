//! The contact sheet: a grid of thumbnails of images, video frames and audio spectrograms.

use super::read::evenly_spaced;
use crate::data::audio::Waveform;
use crate::data::audio::filterbank::{Filterbank, FrameLayout};
use crate::data::audio::resample::Resampler;
use crate::data::decode::{DecodedRegion, ImageLimits, LazyImage, Region};
use crate::data::index::MemberRef;
use crate::data::modality::{Modality, Sample, SampleDecoder};
use crate::data::set::DataSet;
use crate::data::shard::{AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS};
use crate::data::video::Sampling;
use crate::error::{ExitCode, Result};
use crate::log::image_grid::{Tile, compose, save_png};
use crate::view::crop::{Interpolation, resize};
use std::path::Path;

/// Number of tiles per row.
const COLUMNS: usize = 8;
/// Maximum number of tiles.
const MAX_TILES: u64 = 64;
/// Frames per video.
const VIDEO_FRAMES: u64 = 4;
/// Length of a tile's longer side in pixels.
const TILE_SIDE: u32 = 112;
/// Sample rate of spectrograms in Hz.
const SAMPLE_RATE: u32 = 16_000;
/// Mel bands of spectrograms, their height in pixels.
const MEL_BANDS: usize = 64;
/// Maximum duration of spectrograms in seconds.
const MAX_SECONDS: u32 = 10;
/// Frames of spectrograms per second.
const FRAMES_PER_SECOND: u32 = 100;
/// Dynamic range of spectrograms in nepers of power (60 dB).
const DYNAMIC_RANGE: f32 = 13.8;

/// Writes a contact sheet of up to 64 tiles, evenly spaced among the `count` samples that were read. Returns false, and
/// writes nothing, if no sample can be decoded.
pub fn write(set: &DataSet, count: u64, path: &Path) -> Result<bool> {
    let mut decoder = SampleDecoder::new(ImageLimits::default());
    let (shard, row) = set.find_sample(0)?;
    let has_videos = shard.member(row, IMAGE_EXTENSIONS).is_some_and(|member| is_video(&member));
    let tiles_per_sample = if has_videos { VIDEO_FRAMES } else { 1 };
    let shown = count.min(MAX_TILES / tiles_per_sample);
    let mut tiles = Vec::new();
    for i in 0..shown {
        let index = evenly_spaced(evenly_spaced(i, shown, count), count, set.len());
        match sample_tiles(set, index, &mut decoder) {
            Ok(sample) => tiles.extend(sample),
            // The report lists the sample.
            Err(error) if error.code == ExitCode::Corrupt => {}
            Err(error) => return Err(error),
        }
    }
    if tiles.is_empty() {
        return Ok(false);
    }
    let rows: Vec<Vec<Tile>> = tiles.chunks(COLUMNS).map(<[Tile]>::to_vec).collect();
    save_png(&compose(&[], &rows), path)?;
    Ok(true)
}

fn is_video(member: &MemberRef) -> bool {
    VIDEO_EXTENSIONS.iter().any(|extension| member.split_name().1.eq_ignore_ascii_case(extension))
}

/// Returns the tile of an image or an audio clip, or the tiles of a video.
fn sample_tiles(set: &DataSet, index: u64, decoder: &mut SampleDecoder) -> Result<Vec<Tile>> {
    let (shard, row) = set.find_sample(index)?;
    let has_image = shard.member(row, IMAGE_EXTENSIONS).is_some();
    let has_audio = shard.member(row, AUDIO_EXTENSIONS).is_some();
    let modality = if has_audio && !has_image { Modality::Audio } else { Modality::Image };
    let bytes = shard.read(row, modality.extensions())?;
    match decoder.open(&bytes, modality, 3)? {
        Sample::Image(image) => image_tiles(image),
        Sample::Audio(clip) => Ok(vec![spectrogram(&clip)?]),
    }
}

fn image_tiles(image: LazyImage) -> Result<Vec<Tile>> {
    let width = image.width();
    let height = image.height();
    let longer = width.max(height).max(TILE_SIDE);
    let size = [width, height].map(|side| (side * TILE_SIDE / longer).max(1));
    let full = Region { left: 0, top: 0, width, height };
    let Some(video) = image.video_info() else {
        return Ok(vec![thumbnail(&image.decode_region(full, size)?, size)]);
    };
    let indices = Sampling::Segments.sample_center(video.frames, VIDEO_FRAMES as usize);
    let mut tiles = Vec::new();
    image.decode_frames(&indices, full, size, |_, frame| tiles.push(thumbnail(frame, size)))?;
    Ok(tiles)
}

/// Resizes an image to `size`, [width, height].
fn thumbnail(image: &DecodedRegion, size: [u32; 2]) -> Tile {
    let mut pixels = vec![0; size[0] as usize * size[1] as usize * 3];
    resize(image, size, Interpolation::Bicubic, &mut pixels);
    Tile::from_rgb(size[0], size[1], pixels)
}

/// Returns the log-mel spectrogram of the first seconds: time from left to right on a common scale, low frequencies at
/// the bottom.
fn spectrogram(clip: &Waveform) -> Result<Tile> {
    let samples = clip.samples.len().min((MAX_SECONDS * clip.sample_rate) as usize);
    let mut resampler = Resampler::default();
    let samples = resampler.resample(&clip.samples[..samples], [clip.sample_rate, SAMPLE_RATE])?;
    let frames = FrameLayout::from_sample_rate(SAMPLE_RATE).count(samples.len());
    let mut log_mel = vec![0.0; frames * MEL_BANDS];
    Filterbank::new(SAMPLE_RATE, MEL_BANDS).log_mel(samples, &mut log_mel);
    let frames_per_column = (MAX_SECONDS * FRAMES_PER_SECOND).div_ceil(TILE_SIDE) as usize;
    let columns: Vec<Vec<f32>> = log_mel.chunks(frames_per_column * MEL_BANDS).map(mean_over_frames).collect();
    let max = columns.iter().flatten().copied().fold(f32::MIN, f32::max);
    let gray = |value: f32| ((1.0 - (max - value) / DYNAMIC_RANGE).clamp(0.0, 1.0) * 255.0) as u8;
    let mut pixels: Vec<u8> =
        (0..MEL_BANDS).rev().flat_map(|band| columns.iter().map(move |column| gray(column[band]))).collect();
    // A clip shorter than a frame has no column.
    if columns.is_empty() {
        pixels = vec![0; MEL_BANDS];
    }
    Ok(Tile::from_gray(columns.len().max(1) as u32, MEL_BANDS as u32, &pixels))
}

/// Returns the mean of each band over consecutive frames [frames, MEL_BANDS].
fn mean_over_frames(frames: &[f32]) -> Vec<f32> {
    let count = (frames.len() / MEL_BANDS) as f32;
    (0..MEL_BANDS).map(|band| frames.iter().skip(band).step_by(MEL_BANDS).sum::<f32>() / count).collect()
}
