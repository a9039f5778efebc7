//! Tests of damaged and costly videos, and of failing decoder processes.

use super::video::{SIZE, encode_video, frame_indices, recipe, videos};
use crate::support::Outcome;
use occlude::data::video::{Codec, Container, VideoDecoder, VideoLimits};
use occlude::error::ExitCode;
use occlude::rng::{Philox, Purpose};
use rustix::process::{Pid, Signal, kill_process};
use std::process::Command;
use std::time::{Duration, Instant};

crate::trials![
    a_truncated_video_gives_its_frames_or_is_rejected,
    flipped_bits_cost_one_sample_at_most,
    a_killed_child_costs_one_video,
    a_hanging_child_times_out,
    costly_videos_are_rejected,
    files_without_frames_are_rejected,
    the_child_cannot_open_files,
    a_child_dies_with_its_thread,
    a_child_that_cannot_start_says_what_is_missing,
];

fn process(id: u32) -> Pid {
    Pid::from_raw(id as i32).expect("a process id")
}

fn a_truncated_video_gives_its_frames_or_is_rejected() -> Outcome {
    let mut videos = videos();
    for (codec, container) in
        [(Codec::H264, Container::Mp4), (Codec::Vp9, Container::Webm), (Codec::Mpeg4, Container::Avi)]
    {
        let file = encode_video(&mut videos, &recipe(codec, container, 10, 0), 50)?;
        let mut refused = 0;
        for fraction in 0..20 {
            let cut = &file[..file.len() * fraction / 20];
            let expected = [0, 10, 25, 49];
            match frame_indices(&mut videos, cut, &expected) {
                Ok(visible) => assert_eq!(visible, expected, "{container:?}, {fraction}/20"),
                Err(error) => {
                    assert_eq!(error.code, ExitCode::Corrupt);
                    refused += 1;
                }
            }
            // The remaining frames can still be decoded.
            if let Ok(visible) = frame_indices(&mut videos, cut, &[0, 1]) {
                assert_eq!(visible, [0, 1], "{container:?}, {fraction}/20");
            }
        }
        assert!(refused >= 19, "{container:?}: {refused} of 20 truncations were detected");
        assert_eq!(frame_indices(&mut videos, &file, &[3])?, [3]);
    }
    Ok(())
}

fn flipped_bits_cost_one_sample_at_most() -> Outcome {
    let mut videos = VideoDecoder::new(VideoLimits { deadline: Duration::from_secs(20), ..VideoLimits::default() });
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
        let file = encode_video(&mut videos, &recipe(codec, container, 15, 0), 30)?;
        let mut draw = Philox::new(5, kind as u64, 0, Purpose::Probe, 0);
        for round in 0..60 {
            let mut damaged = file.clone();
            // In the header more often than after it.
            let reach = if round % 2 == 0 { damaged.len() } else { damaged.len().min(900) } as u64;
            for _ in 0..1 + draw.uniform_int(6) {
                let at = draw.uniform_int(reach) as usize;
                damaged[at] = if draw.uniform_int(3) == 0 { 0xFF } else { draw.next_u32() as u8 };
            }
            let start = Instant::now();
            let visible = videos.open(&damaged).and_then(|video| {
                let last = video.info.frames - 1;
                let region = [0, 0, video.info.width, video.info.height];
                let min = [region[2], region[3]];
                video.frames(&Vec::from_iter((0..=last).take(30)), region, min).map(|_| ())
            });
            if let Err(error) = visible {
                assert_eq!(error.code, ExitCode::Corrupt, "{error}");
                refused += 1;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "{codec:?}, round {round}");
        }
        assert_eq!(frame_indices(&mut videos, &file, &[0, 29])?, [0, 29], "{codec:?} after them");
    }
    assert!(refused > 60, "{refused} of 240 were detected");
    Ok(())
}

fn a_killed_child_costs_one_video() -> Outcome {
    let mut videos = videos();
    let file = encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 20)?;
    let first = videos.process_id().expect("it runs");
    let open = videos.open(&file)?;
    kill_process(process(first), Signal::KILL)?;
    let error = open.frames(&[1], [0, 0, 96, 64], SIZE).err().expect("no child is left to respond");
    assert_eq!(error.code, ExitCode::Corrupt);
    assert!(error.message.contains("its decoder ended on it (signal: 9"), "{error}");
    assert_eq!(frame_indices(&mut videos, &file, &[1, 2])?, [1, 2]);
    assert_ne!(videos.process_id(), Some(first));
    Ok(())
}

fn a_hanging_child_times_out() -> Outcome {
    let mut videos = VideoDecoder::new(VideoLimits { deadline: Duration::from_secs(3), ..VideoLimits::default() });
    let file = encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 20)?;
    let first = videos.process_id().expect("it runs");
    kill_process(process(first), Signal::STOP)?;
    let start = Instant::now();
    let error = videos.open(&file).err().expect("it makes no progress");
    assert_eq!(error.code, ExitCode::Corrupt);
    assert!(error.message.contains("gave no answer in 3s"), "{error}");
    assert!((3.0..10.0).contains(&start.elapsed().as_secs_f64()), "{:?}", start.elapsed());
    assert!(!std::path::Path::new(&format!("/proc/{first}")).exists(), "it was ended");
    assert_eq!(frame_indices(&mut videos, &file, &[19])?, [19]);
    Ok(())
}

fn costly_videos_are_rejected() -> Outcome {
    let mut plain = videos();
    let file = encode_video(&mut plain, &recipe(Codec::H264, Container::Mp4, 10, 0), 20)?;
    let usual = VideoLimits::default();
    for (limits, word) in [
        (VideoLimits { max_bytes: file.len() - 1, ..usual }, "bytes, the limit is"),
        (VideoLimits { max_side: 95, ..usual }, "a side may have 95"),
        (VideoLimits { max_pixels: 96 * 64 - 1, ..usual }, "the limit is 6143"),
        (VideoLimits { max_frames: 19, ..usual }, "more than 19 frames"),
        (VideoLimits { max_seconds: 0.79, ..usual }, "s long, the limit is 0.79"),
    ] {
        let error = VideoDecoder::new(limits).open(&file).err().expect(word);
        assert!(error.code == ExitCode::Corrupt && error.message.contains(word), "{error}");
    }
    let exact = VideoLimits {
        max_bytes: file.len(),
        max_side: 96,
        max_pixels: 96 * 64,
        max_frames: 20,
        max_seconds: 0.81,
        ..usual
    };
    VideoDecoder::new(exact).open(&file)?;
    // 96 × 64 in the container, 16,000 × 16,000 in each image.
    let mut bomb = encode_video(&mut plain, &recipe(Codec::Mjpeg, Container::Avi, 1, 0), 3)?;
    let images: Vec<usize> = (0..bomb.len() - 9).filter(|&at| bomb[at..at + 2] == [0xFF, 0xC0]).collect();
    assert_eq!(images.len(), 3);
    for at in images {
        bomb[at + 5..at + 9].copy_from_slice(&[0x3E, 0x80, 0x3E, 0x80]);
    }
    let start = Instant::now();
    let error = frame_indices(&mut plain, &bomb, &[0]).expect_err("a bomb");
    assert_eq!(error.code, ExitCode::Corrupt);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}: {error}", start.elapsed());
    assert_eq!(frame_indices(&mut plain, &file, &[0])?, [0]);
    Ok(())
}

fn files_without_frames_are_rejected() -> Outcome {
    let mut videos = videos();
    let mut silent = encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 5)?;
    let header = silent.windows(4).position(|four| four == b"hdlr").expect("the kind of a track");
    assert_eq!(&silent[header + 12..header + 16], b"vide");
    silent[header + 12..header + 16].copy_from_slice(b"soun");
    let playlist = b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n".to_vec();
    let list = b"ffconcat version 1.0\nfile /etc/passwd\n".to_vec();
    for (file, word) in [
        (silent, "it has no video stream"),
        (playlist, "it is none of MP4"),
        (list, "it is none of MP4"),
        (Vec::new(), "none of MP4"),
        (vec![0; 5000], "none of MP4"),
    ] {
        let error = videos.open(&file).err().expect(word);
        assert!(error.code == ExitCode::Corrupt && error.message.contains(word), "{word}: {error}");
    }
    Ok(())
}

fn the_child_cannot_open_files() -> Outcome {
    let mut videos = videos();
    encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 2)?;
    let id = videos.process_id().expect("it runs");
    let limits = std::fs::read_to_string(format!("/proc/{id}/limits"))?;
    let limit = |name: &str| -> Vec<String> {
        let line = limits.lines().find(|line| line.starts_with(name)).expect(name);
        line[name.len()..].split_whitespace().take(2).map(str::to_owned).collect()
    };
    assert_eq!(limit("Max open files"), ["5", "5"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert!(limit("Max address space").iter().all(|max| max.parse::<u64>().is_ok_and(|max| max <= 4 << 30)));
    let open = std::fs::read_dir(format!("/proc/{id}/fd"))?.count();
    assert_eq!(open, 5, "no file descriptor is left for another file");
    let environment = std::fs::read_to_string(format!("/proc/{id}/environ"))?;
    let names = environment.split('\0').filter_map(|pair| pair.split_once('=')).map(|(name, _)| name);
    assert!(names.into_iter().all(|name| ["PATH", "LD_LIBRARY_PATH"].contains(&name)), "{environment}");
    Ok(())
}

fn a_child_dies_with_its_thread() -> Outcome {
    let thread = std::thread::spawn(|| {
        let mut videos = videos();
        encode_video(&mut videos, &recipe(Codec::H264, Container::Mp4, 10, 0), 2).expect("a video");
        let id = videos.process_id().expect("it runs");
        // The child is not killed by a destructor.
        std::mem::forget(videos);
        id
    });
    let id = thread.join().expect("no panic");
    let start = Instant::now();
    // A dead process that is not waited for has state Z.
    let dead = || std::fs::read_to_string(format!("/proc/{id}/stat")).map_or(true, |stat| stat.contains(") Z "));
    while !dead() {
        assert!(start.elapsed() < Duration::from_secs(10), "it is still alive");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn a_child_that_cannot_start_says_what_is_missing() -> Outcome {
    let folder = tempfile::tempdir()?;
    let file = encode_video(&mut videos(), &recipe(Codec::H264, Container::Mp4, 10, 0), 2)?;
    let video = folder.path().join("in/one.mp4");
    let set = folder.path().join("out");
    std::fs::create_dir_all(folder.path().join("in"))?;
    std::fs::write(&video, &file)?;
    for (program, word) in
        [("/nowhere/occlude-decode", "No such file"), ("/bin/true", "it does not start (exit status: 0)")]
    {
        let mut pack = Command::new(env!("CARGO_BIN_EXE_occlude"));
        let output = pack.arg("pack").arg(video.parent().expect("a folder")).arg(&set).env("OCCLUDE_DECODE", program);
        let output = output.output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(word) && text.contains("FFmpeg's libraries"), "{text}");
    }
    Ok(())
}
