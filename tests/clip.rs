//! Videos, decoded by the process that links FFmpeg: the right frames, and what becomes of bad files and bad children.

use crate::support::Outcome;
use libtest_mimic::Failed;
use occlude::data::clip::{Codec, Container, Limits, Recipe, Videos};
use occlude::fault::{Code, Fault};
use occlude::rng::{Draw, Purpose};
use rustix::process::{Pid, Signal, kill_process};
use std::process::Command;
use std::time::{Duration, Instant};

crate::trials![
    one_program_alone_links_ffmpeg,
    the_very_frames_that_are_wanted_come,
    a_clip_costs_the_frames_around_it_alone,
    a_region_is_that_of_the_whole_frame,
    colours_are_those_that_went_in,
    a_turned_video_stands_upright,
    smaller_frames_come_where_that_may_be,
    a_cut_video_gives_its_frames_or_is_refused,
    flipped_bits_cost_one_sample_at_most,
    a_killed_child_costs_one_video,
    a_hanging_child_is_given_up,
    what_costs_too_much_is_refused,
    what_shows_nothing_is_refused,
    the_child_can_open_nothing,
    a_child_dies_with_its_thread,
    a_child_that_cannot_start_says_what_is_missing,
    encoding_twice_gives_the_same_bytes,
];

/// Width and height of the videos that are made here.
pub const SIZE: [u32; 2] = [96, 64];

/// A frame that says its number: ten squares, white for 1 and black for 0, on grey.
pub fn drawn(number: u64) -> Vec<u8> {
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

/// The number that a frame of `width` columns shows, whatever was lost in coding.
pub fn number(pixels: &[u8], width: u32) -> u64 {
    let scale = f64::from(width) / f64::from(SIZE[0]);
    let light = |bit: usize| {
        let (x, y) = ((16 + 16 * (bit % 5)) as f64 * scale, (24 + 16 * (bit / 5)) as f64 * scale);
        u64::from(pixels[(y as usize * width as usize + x as usize) * 3 + 1] > 128)
    };
    (0..10).map(|bit| light(bit) << bit).sum()
}

pub fn recipe(codec: Codec, container: Container, gop: u32, b_frames: u32) -> Recipe {
    Recipe { codec, container, gop, b_frames, open: false, quality: 75 }
}

/// A video of so many frames that say their numbers, 25 a second.
pub fn made(videos: &mut Videos, recipe: &Recipe, frames: u64) -> Result<Vec<u8>, Fault> {
    let pixels: Vec<u8> = (0..frames).flat_map(drawn).collect();
    videos.encode(recipe, 25.0, SIZE, &pixels)
}

pub fn videos() -> Videos {
    Videos::new(Limits::default())
}

/// All that a whole frame shows of the frames that are asked for.
fn whole(videos: &mut Videos, file: &[u8], indices: &[u64]) -> Result<Vec<Vec<u8>>, Fault> {
    let video = videos.open(file)?;
    let [width, height] = [video.facts.width, video.facts.height];
    let frames = video.frames(indices, [0, 0, width, height], [width, height])?;
    let read = |at| {
        let mut pixels = vec![0; frames.bytes()];
        frames.read(at, &mut pixels).map(|()| pixels)
    };
    (0..indices.len()).map(read).collect()
}

fn numbers(videos: &mut Videos, file: &[u8], indices: &[u64]) -> Result<Vec<u64>, Fault> {
    Ok(whole(videos, file, indices)?.iter().map(|pixels| number(pixels, SIZE[0])).collect())
}

fn one_program_alone_links_ffmpeg() -> Outcome {
    let needed = |program: &str| -> Result<String, Failed> {
        let told = Command::new("readelf").args(["-d", program]).output()?;
        assert!(told.status.success(), "readelf of {program}");
        let text = String::from_utf8(told.stdout)?;
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

fn the_very_frames_that_are_wanted_come() -> Outcome {
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
        let what = format!("{codec:?} in {container:?}");
        let file = made(&mut videos, &recipe(codec, container, gop, b_frames), frames)?;
        let facts = videos.open(&file)?.facts;
        assert_eq!((facts.frames, facts.width, facts.height, facts.rotation), (frames, 96, 64, 0), "{what}: {facts:?}");
        assert!(
            (facts.fps - 25.0).abs() < 0.1 && (facts.seconds - frames as f64 / 25.0).abs() < 0.1,
            "{what}: {facts:?}"
        );
        let last = frames - 1;
        let strided: Vec<u64> = (0..frames).skip(7).step_by(4).collect();
        let far = [2, last / 2, last];
        let around = [gop.min(last as u32) as u64 - 1, (u64::from(gop) + 1).min(last)];
        for indices in [&[0][..], &[last], &[last - 1, last], &strided, &far, &around, &Vec::from_iter(0..frames)] {
            assert_eq!(numbers(&mut videos, &file, indices)?, indices, "{what}");
        }
        let fault = numbers(&mut videos, &file, &[frames]).expect_err("beyond the end");
        assert_eq!(fault.code, Code::Corrupt);
    }
    Ok(())
}

/// Of 300 frames 16 at stride 4 from each of some places on, in groups of twelve.
fn a_clip_costs_the_frames_around_it_alone() -> Outcome {
    let mut videos = videos();
    for open in [false, true] {
        let recipe = Recipe { open, ..recipe(Codec::H264, Container::Mp4, 12, 2) };
        let file = made(&mut videos, &recipe, 300)?;
        let all = whole(&mut videos, &file, &Vec::from_iter(0..300))?;
        let mut most = 0;
        for first in (0..236).step_by(7) {
            let indices: Vec<u64> = (0..16).map(|at| first + 4 * at).collect();
            let frames = videos.open(&file)?.frames(&indices, [0, 0, 96, 64], [96, 64])?;
            most = most.max(frames.decoded);
            let mut pixels = vec![0; frames.bytes()];
            for (at, &frame) in indices.iter().enumerate() {
                frames.read(at, &mut pixels)?;
                assert!(pixels == all[frame as usize], "open {open}: frame {frame}, to the bit");
            }
        }
        println!("open {open}: {most} frames at most");
        // The window and the group that it begins in, or the one before; where one is open, its end once more.
        let bound = if open { 61 + 24 + 16 } else { 61 + 12 };
        assert!(most <= bound, "open {open}: {most} frames were decoded for a clip");
    }
    Ok(())
}

fn a_region_is_that_of_the_whole_frame() -> Outcome {
    let mut videos = videos();
    let file = made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 2), 20)?;
    let all = whole(&mut videos, &file, &[4, 11])?;
    let mut draw = Draw::new(3, 0, 0, Purpose::Probe, 0);
    for _ in 0..40 {
        let (left, top) = (draw.below(90) as u32, draw.below(60) as u32);
        let (width, height) = (1 + draw.below(96 - u64::from(left)) as u32, 1 + draw.below(64 - u64::from(top)) as u32);
        let frames = videos.open(&file)?.frames(&[4, 11], [left, top, width, height], [width, height])?;
        let [x, y, w, h] = frames.place;
        assert_eq!([w, h], [f64::from(width), f64::from(height)]);
        let mut pixels = vec![0; frames.bytes()];
        for (at, all) in all.iter().enumerate() {
            frames.read(at, &mut pixels)?;
            for row in 0..height as usize {
                let from = ((y as usize + row) * frames.size[0] as usize + x as usize) * 3;
                let there = ((top as usize + row) * 96 + left as usize) * 3;
                let length = width as usize * 3;
                assert_eq!(pixels[from..from + length], all[there..there + length], "{left} {top} {width} {height}");
            }
        }
    }
    Ok(())
}

/// Large patches of colour: chroma is coarse.
fn coloured() -> Vec<u8> {
    let patches = [[220, 40, 40], [40, 200, 60], [50, 60, 210], [230, 220, 60]];
    let pixel = |at: usize| patches[(at % 96) / 48 + 2 * (at / 96 / 32)];
    (0..96 * 64).flat_map(pixel).collect()
}

fn colours_are_those_that_went_in() -> Outcome {
    let mut videos = videos();
    for codec in [Codec::H264, Codec::Mjpeg] {
        let recipe = Recipe { quality: 95, ..recipe(codec, Container::Mkv, 5, 0) };
        let file = videos.encode(&recipe, 25.0, SIZE, &coloured().repeat(3))?;
        let seen = whole(&mut videos, &file, &[1])?;
        for (x, y) in [(20, 14), (70, 14), (20, 50), (70, 50)] {
            let at = (y * 96 + x) * 3;
            let (wanted, got) = (&coloured()[at..at + 3], &seen[0][at..at + 3]);
            assert!(wanted.iter().zip(got).all(|(a, b)| a.abs_diff(*b) < 12), "{codec:?}: {wanted:?} became {got:?}");
        }
    }
    Ok(())
}

/// The file, its one track turned: entries a, b, c, d of the matrix in its header.
fn turned(file: &[u8], [a, b, c, d]: [i32; 4]) -> Vec<u8> {
    let mut file = file.to_vec();
    let header = file.windows(4).position(|four| four == b"tkhd").expect("a track's header");
    // Version, times, layer and volume are 40 bytes after the name.
    let matrix = header + 4 + 40;
    assert_eq!(file[matrix..matrix + 4], [0, 1, 0, 0], "the matrix is here");
    for (at, value) in [(0, a), (4, b), (12, c), (16, d)] {
        file[matrix + at..matrix + at + 4].copy_from_slice(&(value << 16).to_be_bytes());
    }
    file
}

fn a_turned_video_stands_upright() -> Outcome {
    let mut videos = videos();
    let plain = made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 5)?;
    let straight = whole(&mut videos, &plain, &[3])?.remove(0);
    for (matrix, degrees) in [([0, 1, -1, 0], 90), ([-1, 0, 0, -1], 180), ([0, -1, 1, 0], 270)] {
        let file = turned(&plain, matrix);
        let facts = videos.open(&file)?.facts;
        let (width, height) = if degrees == 180 { (96, 64) } else { (64, 96) };
        assert_eq!((facts.rotation, facts.width, facts.height), (degrees, width, height));
        let (x, y, w, h) = (7, 10, 33, 20);
        let frames = videos.open(&file)?.frames(&[3], [x, y, w, h], [w, h])?;
        let mut pixels = vec![0; frames.bytes()];
        frames.read(0, &mut pixels)?;
        for row in 0..h {
            for column in 0..w {
                let (right, down) = (x + column, y + row);
                // Where a pixel that stands upright is stored.
                let (a, b) = match degrees {
                    90 => (down, 63 - right),
                    180 => (95 - right, 63 - down),
                    _ => (95 - down, right),
                };
                let stored = (b * 96 + a) as usize * 3;
                let [left, top] = [frames.place[0] as u32, frames.place[1] as u32];
                let here = ((top + row) * frames.size[0] + left + column) as usize * 3;
                assert_eq!(pixels[here..here + 3], straight[stored..stored + 3], "{degrees}: {right}, {down}");
            }
        }
    }
    Ok(())
}

fn smaller_frames_come_where_that_may_be() -> Outcome {
    let mut videos = videos();
    let file = made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 12)?;
    for (least, size) in
        [([96, 64], [96, 64]), ([49, 33], [96, 64]), ([48, 32], [48, 32]), ([20, 12], [24, 16]), ([1, 1], [12, 8])]
    {
        let frames = videos.open(&file)?.frames(&[9], [0, 0, 96, 64], least)?;
        assert_eq!(
            (frames.size, frames.place),
            (size, [0.0, 0.0, f64::from(size[0]), f64::from(size[1])]),
            "{least:?}"
        );
        let mut pixels = vec![0; frames.bytes()];
        frames.read(0, &mut pixels)?;
        assert_eq!(number(&pixels, size[0]), 9, "{size:?}");
    }
    Ok(())
}

fn a_cut_video_gives_its_frames_or_is_refused() -> Outcome {
    let mut videos = videos();
    for (codec, container) in
        [(Codec::H264, Container::Mp4), (Codec::Vp9, Container::Webm), (Codec::Mpeg4, Container::Avi)]
    {
        let file = made(&mut videos, &recipe(codec, container, 10, 0), 50)?;
        let mut refused = 0;
        for share in 0..20 {
            let cut = &file[..file.len() * share / 20];
            let wanted = [0, 10, 25, 49];
            match numbers(&mut videos, cut, &wanted) {
                Ok(seen) => assert_eq!(seen, wanted, "{container:?}, {share}/20"),
                Err(fault) => {
                    assert_eq!(fault.code, Code::Corrupt);
                    refused += 1;
                }
            }
            // What is there is still to be had.
            if let Ok(seen) = numbers(&mut videos, cut, &[0, 1]) {
                assert_eq!(seen, [0, 1], "{container:?}, {share}/20");
            }
        }
        assert!(refused >= 19, "{container:?}: {refused} of 20 cuts were noticed");
        assert_eq!(numbers(&mut videos, &file, &[3])?, [3]);
    }
    Ok(())
}

fn flipped_bits_cost_one_sample_at_most() -> Outcome {
    let mut videos = Videos::new(Limits { deadline: Duration::from_secs(20), ..Limits::default() });
    let mut refused = 0;
    for (kind, (codec, container)) in [
        (Codec::H264, Container::Mp4),
        (Codec::Vp9, Container::Webm),
        (Codec::H265, Container::Mkv),
        (Codec::Mjpeg, Container::Avi),
    ]
    .into_iter()
    .enumerate()
    {
        let file = made(&mut videos, &recipe(codec, container, 15, 0), 30)?;
        let mut draw = Draw::new(5, kind as u64, 0, Purpose::Probe, 0);
        for round in 0..60 {
            let mut damaged = file.clone();
            // In the header more often than behind it.
            let reach = if round % 2 == 0 { damaged.len() } else { damaged.len().min(900) } as u64;
            for _ in 0..1 + draw.below(6) {
                let at = draw.below(reach) as usize;
                damaged[at] = if draw.below(3) == 0 { 0xFF } else { draw.bits() as u8 };
            }
            let began = Instant::now();
            let seen = videos.open(&damaged).and_then(|video| {
                let (last, region) = (video.facts.frames - 1, [0, 0, video.facts.width, video.facts.height]);
                let least = [region[2], region[3]];
                video.frames(&Vec::from_iter((0..=last).take(30)), region, least).map(|_| ())
            });
            if let Err(fault) = seen {
                assert_eq!(fault.code, Code::Corrupt, "{fault}");
                refused += 1;
            }
            assert!(began.elapsed() < Duration::from_secs(10), "{codec:?}, round {round}");
        }
        assert_eq!(numbers(&mut videos, &file, &[0, 29])?, [0, 29], "{codec:?} after them");
    }
    assert!(refused > 60, "{refused} of 240 were noticed");
    Ok(())
}

fn process(id: u32) -> Pid {
    Pid::from_raw(id as i32).expect("a process id")
}

fn a_killed_child_costs_one_video() -> Outcome {
    let mut videos = videos();
    let file = made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 20)?;
    let first = videos.process().expect("it runs");
    let open = videos.open(&file)?;
    kill_process(process(first), Signal::KILL)?;
    let fault = open.frames(&[1], [0, 0, 96, 64], SIZE).err().expect("nobody is left to answer");
    assert_eq!(fault.code, Code::Corrupt);
    assert!(fault.message.contains("its decoder ended on it (signal: 9"), "{fault}");
    assert_eq!(numbers(&mut videos, &file, &[1, 2])?, [1, 2]);
    assert_ne!(videos.process(), Some(first));
    Ok(())
}

fn a_hanging_child_is_given_up() -> Outcome {
    let mut videos = Videos::new(Limits { deadline: Duration::from_secs(3), ..Limits::default() });
    let file = made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 20)?;
    let first = videos.process().expect("it runs");
    kill_process(process(first), Signal::STOP)?;
    let began = Instant::now();
    let fault = videos.open(&file).err().expect("it does not move");
    assert_eq!(fault.code, Code::Corrupt);
    assert!(fault.message.contains("gave no answer in 3s"), "{fault}");
    assert!((3.0..10.0).contains(&began.elapsed().as_secs_f64()), "{:?}", began.elapsed());
    assert!(!std::path::Path::new(&format!("/proc/{first}")).exists(), "it was ended");
    assert_eq!(numbers(&mut videos, &file, &[19])?, [19]);
    Ok(())
}

fn what_costs_too_much_is_refused() -> Outcome {
    let mut plain = videos();
    let file = made(&mut plain, &recipe(Codec::H264, Container::Mp4, 10, 0), 20)?;
    let usual = Limits::default();
    for (limits, word) in [
        (Limits { max_bytes: file.len() - 1, ..usual }, "bytes, the limit is"),
        (Limits { max_side: 95, ..usual }, "a side may have 95"),
        (Limits { max_pixels: 96 * 64 - 1, ..usual }, "the limit is 6143"),
        (Limits { max_frames: 19, ..usual }, "more than 19 frames"),
        (Limits { max_seconds: 0.79, ..usual }, "s long, the limit is 0.79"),
    ] {
        let fault = Videos::new(limits).open(&file).err().expect(word);
        assert!(fault.code == Code::Corrupt && fault.message.contains(word), "{fault}");
    }
    let exact =
        Limits { max_bytes: file.len(), max_side: 96, max_pixels: 96 * 64, max_frames: 20, max_seconds: 0.81, ..usual };
    Videos::new(exact).open(&file)?;
    // 96 × 64 on the outside, 16,000 × 16,000 in each picture.
    let mut bomb = made(&mut plain, &recipe(Codec::Mjpeg, Container::Avi, 1, 0), 3)?;
    let pictures: Vec<usize> = (0..bomb.len() - 9).filter(|&at| bomb[at..at + 2] == [0xFF, 0xC0]).collect();
    assert_eq!(pictures.len(), 3);
    for at in pictures {
        bomb[at + 5..at + 9].copy_from_slice(&[0x3E, 0x80, 0x3E, 0x80]);
    }
    let began = Instant::now();
    let fault = numbers(&mut plain, &bomb, &[0]).expect_err("a bomb");
    assert_eq!(fault.code, Code::Corrupt);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}: {fault}", began.elapsed());
    assert_eq!(numbers(&mut plain, &file, &[0])?, [0]);
    Ok(())
}

fn what_shows_nothing_is_refused() -> Outcome {
    let mut videos = videos();
    let mut silent = made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 5)?;
    let header = silent.windows(4).position(|four| four == b"hdlr").expect("a track's kind");
    assert_eq!(&silent[header + 12..header + 16], b"vide");
    silent[header + 12..header + 16].copy_from_slice(b"soun");
    let playlist = b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n".to_vec();
    let list = b"ffconcat version 1.0\nfile /etc/passwd\n".to_vec();
    for (file, word) in [
        (silent, "there are no pictures in it"),
        (playlist, "it is none of MP4"),
        (list, "it is none of MP4"),
        (Vec::new(), "none of MP4"),
        (vec![0; 5000], "none of MP4"),
    ] {
        let fault = videos.open(&file).err().expect(word);
        assert!(fault.code == Code::Corrupt && fault.message.contains(word), "{word}: {fault}");
    }
    Ok(())
}

fn the_child_can_open_nothing() -> Outcome {
    let mut videos = videos();
    made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 2)?;
    let id = videos.process().expect("it runs");
    let limits = std::fs::read_to_string(format!("/proc/{id}/limits"))?;
    let limit = |name: &str| -> Vec<String> {
        let line = limits.lines().find(|line| line.starts_with(name)).expect(name);
        line[name.len()..].split_whitespace().take(2).map(str::to_owned).collect()
    };
    assert_eq!(limit("Max open files"), ["5", "5"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert!(limit("Max address space").iter().all(|most| most.parse::<u64>().is_ok_and(|most| most <= 4 << 30)));
    let open = std::fs::read_dir(format!("/proc/{id}/fd"))?.count();
    assert_eq!(open, 5, "descriptors that are open: none is left");
    let environment = std::fs::read_to_string(format!("/proc/{id}/environ"))?;
    let names = environment.split('\0').filter_map(|pair| pair.split_once('=')).map(|(name, _)| name);
    assert!(names.into_iter().all(|name| ["PATH", "LD_LIBRARY_PATH"].contains(&name)), "{environment}");
    Ok(())
}

fn a_child_dies_with_its_thread() -> Outcome {
    let thread = std::thread::spawn(|| {
        let mut videos = videos();
        made(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 2).expect("a video");
        let id = videos.process().expect("it runs");
        // Nobody ends it.
        std::mem::forget(videos);
        id
    });
    let id = thread.join().expect("no panic");
    let began = Instant::now();
    // Dead and not waited for is a Z.
    let dead = || std::fs::read_to_string(format!("/proc/{id}/stat")).map_or(true, |stat| stat.contains(") Z "));
    while !dead() {
        assert!(began.elapsed() < Duration::from_secs(10), "it lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn a_child_that_cannot_start_says_what_is_missing() -> Outcome {
    let folder = tempfile::tempdir()?;
    let file = made(&mut videos(), &recipe(Codec::H264, Container::Mp4, 10, 0), 2)?;
    let (video, set) = (folder.path().join("in/one.mp4"), folder.path().join("out"));
    std::fs::create_dir_all(folder.path().join("in"))?;
    std::fs::write(&video, &file)?;
    for (program, word) in
        [("/nowhere/occlude-decode", "No such file"), ("/bin/true", "it does not start (exit status: 0)")]
    {
        let mut pack = Command::new(env!("CARGO_BIN_EXE_occlude"));
        let told = pack.arg("pack").arg(video.parent().expect("a folder")).arg(&set).env("OCCLUDE_DECODE", program);
        let told = told.output()?;
        let text = String::from_utf8_lossy(&told.stderr).into_owned();
        assert_eq!(told.status.code(), Some(2), "{text}");
        assert!(text.contains(word) && text.contains("FFmpeg's libraries"), "{text}");
    }
    Ok(())
}

fn encoding_twice_gives_the_same_bytes() -> Outcome {
    for (codec, container, b_frames) in [(Codec::H264, Container::Mp4, 2), (Codec::Mjpeg, Container::Mkv, 0)] {
        let one = made(&mut videos(), &recipe(codec, container, 12, b_frames), 40)?;
        assert!(made(&mut videos(), &recipe(codec, container, 12, b_frames), 40)? == one, "{codec:?}");
    }
    Ok(())
}
