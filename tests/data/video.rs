//! Tests of video decoding in the process that links FFmpeg: the right frames, regions and colors.

use crate::support::Outcome;
use libtest_mimic::Failed;
use occlude::data::video::{Codec, Container, VideoDecoder, VideoEncoding, VideoLimits};
use occlude::error::{Error, ExitCode};
use occlude::rng::{Philox, Purpose};
use std::process::Command;

crate::trials![
    only_the_decoder_program_links_ffmpeg,
    the_requested_frames_are_decoded,
    a_clip_decodes_only_nearby_frames,
    a_region_equals_a_crop_of_the_whole_frame,
    colors_survive_encoding_and_decoding,
    a_rotated_video_is_decoded_upright,
    frames_are_scaled_down_where_allowed,
    encoding_is_deterministic,
];

/// Width and height of the test videos.
pub const SIZE: [u32; 2] = [96, 64];

/// Draws a frame that encodes its index: ten squares, white for 1 and black for 0, on gray.
pub fn draw_frame(number: u64) -> Vec<u8> {
    let mut pixels = vec![110; SIZE[0] as usize * SIZE[1] as usize * 3];
    for bit in 0..10 {
        let value = if number >> bit & 1 == 1 { 235 } else { 16 };
        for y in 0..16 {
            let at = ((16 + 16 * (bit / 5) + y) * SIZE[0] as usize + 8 + 16 * (bit % 5)) * 3;
            pixels[at..at + 48].fill(value);
        }
    }
    pixels
}

/// Reads the index that a frame of `width` columns shows; it survives lossy coding.
pub fn read_index(pixels: &[u8], width: u32) -> u64 {
    let scale = f64::from(width) / f64::from(SIZE[0]);
    let light = |bit: usize| {
        let x = (16 + 16 * (bit % 5)) as f64 * scale;
        let y = (24 + 16 * (bit / 5)) as f64 * scale;
        u64::from(pixels[(y as usize * width as usize + x as usize) * 3 + 1] > 128)
    };
    (0..10).map(|bit| light(bit) << bit).sum()
}

pub fn recipe(codec: Codec, container: Container, gop: u32, b_frames: u32) -> VideoEncoding {
    VideoEncoding { codec, container, max_keyframe_interval: gop, max_b_frames: b_frames, open_gop: false, quality: 75 }
}

/// Encodes a video of `frames` frames that show their indices, at 25 frames per second.
pub fn encode_video(videos: &mut VideoDecoder, recipe: &VideoEncoding, frames: u64) -> Result<Vec<u8>, Error> {
    let pixels: Vec<u8> = (0..frames).flat_map(draw_frame).collect();
    videos.encode(recipe, 25.0, SIZE, &pixels)
}

pub fn videos() -> VideoDecoder {
    VideoDecoder::new(VideoLimits::default())
}

/// Decodes the whole area of the requested frames.
fn decode_frames(videos: &mut VideoDecoder, file: &[u8], indices: &[u64]) -> Result<Vec<Vec<u8>>, Error> {
    let video = videos.open(file)?;
    let [width, height] = [video.info.width, video.info.height];
    let frames = video.frames(indices, [0, 0, width, height], [width, height])?;
    let read = |at| {
        let mut pixels = vec![0; frames.bytes()];
        frames.read(at, &mut pixels).map(|()| pixels)
    };
    (0..indices.len()).map(read).collect()
}

/// Decodes frames and reads their indices.
pub fn frame_indices(videos: &mut VideoDecoder, file: &[u8], indices: &[u64]) -> Result<Vec<u64>, Error> {
    Ok(decode_frames(videos, file, indices)?.iter().map(|pixels| read_index(pixels, SIZE[0])).collect())
}

fn only_the_decoder_program_links_ffmpeg() -> Outcome {
    let needed = |program: &str| -> Result<String, Failed> {
        let output = Command::new("readelf").args(["-d", program]).output()?;
        assert!(output.status.success(), "readelf of {program}");
        let text = String::from_utf8(output.stdout)?;
        Ok(text.lines().filter(|line| line.contains("(NEEDED)")).collect::<Vec<_>>().join("\n"))
    };
    let this = std::env::current_exe()?;
    for program in [env!("CARGO_BIN_EXE_occlude"), this.to_str().expect("UTF-8")] {
        let needed = needed(program)?;
        assert!(needed.contains("libtorch_cpu") && !needed.contains("libav") && !needed.contains("libsw"), "{needed}");
    }
    let needed = needed(env!("CARGO_BIN_EXE_occlude-decode"))?;
    assert!(needed.contains("libavcodec") && !needed.contains("torch") && !needed.contains("libmpi"), "{needed}");
    Ok(())
}

fn the_requested_frames_are_decoded() -> Outcome {
    use Codec::*;
    use Container::*;
    let mut videos = videos();
    for (codec, container, gop, b_frames, frames) in [
        (H264, Mp4, 250, 3, 300),
        (H264, Mkv, 12, 2, 80),
        (H264, Mp4, 1, 0, 30),
        (H264, Avi, 30, 0, 60),
        (H265, Mp4, 25, 3, 70),
        (Vp9, Webm, 20, 0, 70),
        (Av1, Mkv, 20, 0, 30),
        (Mpeg4, Avi, 12, 0, 60),
        (Mpeg4, Mp4, 12, 2, 60),
        (Mjpeg, Avi, 1, 0, 40),
        (Mjpeg, Mkv, 1, 0, 40),
    ] {
        let label = format!("{codec:?} in {container:?}");
        let file = encode_video(&mut videos, &recipe(codec, container, gop, b_frames), frames)?;
        let facts = videos.open(&file)?.info;
        assert_eq!(
            (facts.frames, facts.width, facts.height, facts.rotation),
            (frames, 96, 64, 0),
            "{label}: {facts:?}"
        );
        assert!(
            (facts.fps - 25.0).abs() < 0.1 && (facts.seconds - frames as f64 / 25.0).abs() < 0.1,
            "{label}: {facts:?}"
        );
        let last = frames - 1;
        let strided: Vec<u64> = (0..frames).skip(7).step_by(4).collect();
        let far = [2, last / 2, last];
        let around = [gop.min(last as u32) as u64 - 1, (u64::from(gop) + 1).min(last)];
        for indices in [&[0][..], &[last], &[last - 1, last], &strided, &far, &around, &Vec::from_iter(0..frames)] {
            assert_eq!(frame_indices(&mut videos, &file, indices)?, indices, "{label}");
        }
        let error = frame_indices(&mut videos, &file, &[frames]).expect_err("beyond the end");
        assert_eq!(error.code, ExitCode::Corrupt);
    }
    Ok(())
}

/// 16 frames at stride 4 of a video of 300, from several start frames, in groups of twelve.
fn a_clip_decodes_only_nearby_frames() -> Outcome {
    let mut videos = videos();
    for open in [false, true] {
        let recipe = VideoEncoding { open_gop: open, ..recipe(Codec::H264, Container::Mp4, 12, 2) };
        let file = encode_video(&mut videos, &recipe, 300)?;
        let all = decode_frames(&mut videos, &file, &Vec::from_iter(0..300))?;
        let mut max = 0;
        for first in (0..236).step_by(7) {
            let indices: Vec<u64> = (0..16).map(|at| first + 4 * at).collect();
            let frames = videos.open(&file)?.frames(&indices, [0, 0, 96, 64], [96, 64])?;
            max = max.max(frames.decoded);
            let mut pixels = vec![0; frames.bytes()];
            for (at, &frame) in indices.iter().enumerate() {
                frames.read(at, &mut pixels)?;
                assert!(pixels == all[frame as usize], "open {open}: frame {frame}, to the bit");
            }
        }
        println!("open {open}: {max} frames at most");
        // The window and the group in which it begins, or the one before; in open groups also the end of the window.
        let bound = if open { 61 + 24 + 16 } else { 61 + 12 };
        assert!(max <= bound, "open {open}: {max} frames were decoded for a clip");
    }
    Ok(())
}

fn a_region_equals_a_crop_of_the_whole_frame() -> Outcome {
    let mut videos = videos();
    let file = encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 2), 20)?;
    let all = decode_frames(&mut videos, &file, &[4, 11])?;
    let mut draw = Philox::new(3, 0, 0, Purpose::Probe, 0);
    for _ in 0..40 {
        let left = draw.uniform_int(90) as u32;
        let top = draw.uniform_int(60) as u32;
        let width = 1 + draw.uniform_int(96 - u64::from(left)) as u32;
        let height = 1 + draw.uniform_int(64 - u64::from(top)) as u32;
        let frames = videos.open(&file)?.frames(&[4, 11], [left, top, width, height], [width, height])?;
        let [x, y, w, h] = frames.region;
        assert_eq!([w, h], [f64::from(width), f64::from(height)]);
        let mut pixels = vec![0; frames.bytes()];
        for (at, all) in all.iter().enumerate() {
            frames.read(at, &mut pixels)?;
            for row in 0..height as usize {
                let from = ((y as usize + row) * frames.size[0] as usize + x as usize) * 3;
                let offset = ((top as usize + row) * 96 + left as usize) * 3;
                let length = width as usize * 3;
                assert_eq!(pixels[from..from + length], all[offset..offset + length], "{left} {top} {width} {height}");
            }
        }
    }
    Ok(())
}

/// Large blocks of color, because chroma is subsampled.
fn color_blocks() -> Vec<u8> {
    let patches = [[220, 40, 40], [40, 200, 60], [50, 60, 210], [230, 220, 60]];
    let pixel = |at: usize| patches[(at % 96) / 48 + 2 * (at / 96 / 32)];
    (0..96 * 64).flat_map(pixel).collect()
}

fn colors_survive_encoding_and_decoding() -> Outcome {
    let mut videos = videos();
    for codec in [Codec::H264, Codec::Mjpeg] {
        let recipe = VideoEncoding { quality: 95, ..recipe(codec, Container::Mkv, 5, 0) };
        let file = videos.encode(&recipe, 25.0, SIZE, &color_blocks().repeat(3))?;
        let visible = decode_frames(&mut videos, &file, &[1])?;
        for (x, y) in [(20, 14), (70, 14), (20, 50), (70, 50)] {
            let at = (y * 96 + x) * 3;
            let expected = &color_blocks()[at..at + 3];
            let ours = &visible[0][at..at + 3];
            assert!(
                expected.iter().zip(ours).all(|(a, b)| a.abs_diff(*b) < 12),
                "{codec:?}: {expected:?} became {ours:?}"
            );
        }
    }
    Ok(())
}

/// Returns the file with its track rotated: entries a, b, c, d of the matrix in its header.
fn rotate_track(file: &[u8], [a, b, c, d]: [i32; 4]) -> Vec<u8> {
    let mut file = file.to_vec();
    let header = file.windows(4).position(|four| four == b"tkhd").expect("the header of a track");
    // Version, times, layer and volume are 40 bytes after the name.
    let matrix = header + 4 + 40;
    assert_eq!(file[matrix..matrix + 4], [0, 1, 0, 0], "the matrix is here");
    for (at, value) in [(0, a), (4, b), (12, c), (16, d)] {
        file[matrix + at..matrix + at + 4].copy_from_slice(&(value << 16).to_be_bytes());
    }
    file
}

fn a_rotated_video_is_decoded_upright() -> Outcome {
    let mut videos = videos();
    let plain = encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 5)?;
    let straight = decode_frames(&mut videos, &plain, &[3])?.remove(0);
    for (matrix, degrees) in [([0, 1, -1, 0], 90), ([-1, 0, 0, -1], 180), ([0, -1, 1, 0], 270)] {
        let file = rotate_track(&plain, matrix);
        let facts = videos.open(&file)?.info;
        let (width, height) = if degrees == 180 { (96, 64) } else { (64, 96) };
        assert_eq!((facts.rotation, facts.width, facts.height), (degrees, width, height));
        let x = 7;
        let y = 10;
        let w = 33;
        let h = 20;
        let frames = videos.open(&file)?.frames(&[3], [x, y, w, h], [w, h])?;
        let mut pixels = vec![0; frames.bytes()];
        frames.read(0, &mut pixels)?;
        for row in 0..h {
            for column in 0..w {
                let right = x + column;
                let down = y + row;
                // The place at which an upright pixel is stored.
                let (a, b) = match degrees {
                    90 => (down, 63 - right),
                    180 => (95 - right, 63 - down),
                    _ => (95 - down, right),
                };
                let stored = (b * 96 + a) as usize * 3;
                let [left, top] = [frames.region[0] as u32, frames.region[1] as u32];
                let offset = ((top + row) * frames.size[0] + left + column) as usize * 3;
                assert_eq!(pixels[offset..offset + 3], straight[stored..stored + 3], "{degrees}: {right}, {down}");
            }
        }
    }
    Ok(())
}

fn frames_are_scaled_down_where_allowed() -> Outcome {
    let mut videos = videos();
    let file = encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 12)?;
    for (min, size) in
        [([96, 64], [96, 64]), ([49, 33], [96, 64]), ([48, 32], [48, 32]), ([20, 12], [24, 16]), ([1, 1], [12, 8])]
    {
        let frames = videos.open(&file)?.frames(&[9], [0, 0, 96, 64], min)?;
        assert_eq!((frames.size, frames.region), (size, [0.0, 0.0, f64::from(size[0]), f64::from(size[1])]), "{min:?}");
        let mut pixels = vec![0; frames.bytes()];
        frames.read(0, &mut pixels)?;
        assert_eq!(read_index(&pixels, size[0]), 9, "{size:?}");
    }
    Ok(())
}

fn encoding_is_deterministic() -> Outcome {
    for (codec, container, b_frames) in [(Codec::H264, Container::Mp4, 2), (Codec::Mjpeg, Container::Mkv, 0)] {
        let one = encode_video(&mut videos(), &recipe(codec, container, 12, b_frames), 40)?;
        assert!(encode_video(&mut videos(), &recipe(codec, container, 12, b_frames), 40)? == one, "{codec:?}");
    }
    Ok(())
}
