//! Tests of video from sampling to batches: frame sampling, views, the loader, `pack` and `inspect`.

use crate::data::video::{SIZE, draw_frame, encode_video, read_index, recipe, videos};
use crate::support::training_job::occlude_command;
use crate::support::{Outcome, path_text, root};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::decode::{DecodedImage, ImageLimits, LazyImage, Region, VisualDecoder};
use occlude::data::mixture::Mixture;
use occlude::data::modality::Modality;
use occlude::data::order::SampleOrder;
use occlude::data::pack::{PackOptions, VideoCodec, VideoOptions as Recode, pack};
use occlude::data::set::DataSet;
use occlude::data::video::{Codec, Container, Sampling};
use occlude::error::{Error, ExitCode};
use occlude::grid::Grid;
use occlude::loader::{DataLoader, Labels, LoadedRows, LoaderOptions};
use occlude::rng::{Philox, Purpose};
use occlude::view::clip::ClipConfig;
use occlude::view::{View, ViewKey};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

crate::trials![
    strided_clips_match_the_official_loader,
    segment_sampling_takes_one_frame_per_segment,
    multi_scale_crops_match_the_official_code,
    all_frames_of_a_clip_share_one_crop_and_flip,
    evaluation_uses_the_center,
    each_repeat_samples_another_clip,
    a_video_that_does_not_fit_the_model_is_rejected,
    the_config_selects_the_frames,
    video_batches_are_the_same_on_any_number_of_ranks,
    videos_are_packed_unchanged,
    videos_can_be_packed_smaller_and_at_a_lower_frame_rate,
    inspect_describes_a_video_data_set,
];

fn draw(id: u64) -> Philox {
    Philox::new(9, id, 0, Purpose::Clip, 0)
}

fn strided_clips_match_the_official_loader() -> Outcome {
    // By hand from VideoMAE's `_sample_train_indices` and `_video_TSN_decord_batch_loader`; the first counts from 1,
    // and the second advances while `offset + step < duration`.
    let short = |frames: u64, count: usize, stride: u32| Sampling::Stride(stride).sample(frames, count, &mut draw(1));
    assert_eq!(short(10, 4, 4), [0, 4, 8, 8]);
    assert_eq!(short(9, 4, 4), [0, 4, 4, 4]);
    assert_eq!(short(5, 4, 4), [0, 0, 0, 0]);
    assert_eq!(short(6, 4, 4), [0, 4, 4, 4]);
    assert_eq!(short(1, 3, 2), [0, 0, 0]);
    assert_eq!(short(64, 16, 4), (0..16).map(|at| at * 4).collect::<Vec<u64>>());
    let mut start: BTreeMap<u64, u32> = BTreeMap::new();
    for id in 0..4000 {
        let indices = Sampling::Stride(4).sample(73, 16, &mut draw(id));
        assert!(indices.windows(2).all(|two| two[1] - two[0] == 4), "{indices:?}");
        *start.entry(indices[0]).or_default() += 1;
    }
    assert_eq!(start.keys().copied().collect::<Vec<_>>(), Vec::from_iter(0..10), "73 - 64 + 1 positions");
    assert!(start.values().all(|&count| (320..480).contains(&count)), "{start:?}");
    assert_eq!(Sampling::Stride(4).sample_center(73, 16)[0], 4);
    assert_eq!(Sampling::Stride(4).sample_center(10, 4), [0, 4, 8, 8]);
    Ok(())
}

fn segment_sampling_takes_one_frame_per_segment() -> Outcome {
    let mut visible = BTreeSet::new();
    for id in 0..2000 {
        let indices = Sampling::Segments.sample(35, 8, &mut draw(id));
        assert!(indices.iter().enumerate().all(|(at, &index)| index / 4 == at as u64), "{indices:?}");
        visible.extend(indices);
        let few = Sampling::Segments.sample(5, 8, &mut draw(id));
        assert!(few.len() == 8 && few.is_sorted() && few.iter().all(|&index| index < 5), "{few:?}");
    }
    assert_eq!(visible, (0..32).collect(), "the official loader truncates as well");
    // int(tick / 2 + tick · x), tick = 35 / 8.
    assert_eq!(Sampling::Segments.sample_center(35, 8), [2, 6, 10, 15, 19, 24, 28, 32]);
    assert_eq!(Sampling::Segments.sample_center(3, 4), [0, 1, 1, 2]);
    Ok(())
}

fn multi_scale_crops_match_the_official_code() -> Outcome {
    let clip = ClipConfig { sampling: Sampling::Segments, multi_scale: Some(vec![1.0, 0.875, 0.75, 0.66]), repeats: 1 };
    for (width, height, sides) in
        [(340, 256, [256, 224, 192, 168]), (320, 240, [240, 210, 180, 158]), (226, 400, [224, 197, 169, 149])]
    {
        let mut sizes = BTreeSet::new();
        let mut positions: BTreeMap<(u32, u32), BTreeSet<(u32, u32)>> = BTreeMap::new();
        for id in 0..6000 {
            let found = clip.sample_region([width, height], [224, 224], &mut Philox::new(2, id, 0, Purpose::Crop, 0));
            let Region { left: first, top, width: w, height: h } = found.expect("a box");
            assert!(first + w <= width && top + h <= height);
            sizes.insert((w, h));
            positions.entry((w, h)).or_default().insert((first, top));
        }
        let near = |a: usize, b: usize| a.abs_diff(b) <= 1;
        let pairs = (0..4).flat_map(|a| (0..4).map(move |b| (a, b))).filter(|&(a, b)| near(a, b));
        assert_eq!(sizes, pairs.map(|(a, b)| (sides[a], sides[b])).collect(), "of {width}x{height}");
        for ((w, h), positions) in positions {
            let x = (width - w) / 4;
            let y = (height - h) / 4;
            let all: BTreeSet<(u32, u32)> = (0..=4)
                .flat_map(|a| (0..=4).map(move |b| (a, b)))
                .filter(|(a, b)| a % 2 == b % 2)
                .map(|(a, b)| (a * x, b * y))
                .collect();
            assert_eq!(positions, all, "{w}x{h} of {width}x{height}");
        }
    }
    Ok(())
}

fn grid(frames: i64, channels: i64) -> Grid {
    Grid { frames, rows: 4, cols: 6, channels, patch_frames: 1, patch: 8 }
}

fn stride(stride: u32) -> Option<ClipConfig> {
    Some(ClipConfig { sampling: Sampling::Stride(stride), multi_scale: None, repeats: 1 })
}

fn bytes(grid: &Grid) -> Vec<u8> {
    vec![0; grid.pixel_shape().iter().product::<i64>() as usize]
}

/// Returns a frame of [C, T, Y, X] as planes [C, Y, X].
fn frame(planes: &[u8], grid: &Grid, at: usize) -> Vec<u8> {
    let [channels, frames, height, width] = grid.pixel_shape().map(|side| side as usize);
    (0..channels).flat_map(|c| planes[(c * frames + at) * height * width..][..height * width].to_vec()).collect()
}

fn all_frames_of_a_clip_share_one_crop_and_flip() -> Outcome {
    let file = encode_video(&mut videos(), &recipe(Codec::H264, Container::Mp4, 30, 2), 50)?;
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    for channels in [3, 1] {
        let mut stills = Vec::new();
        let all = Region { left: 0, top: 0, width: SIZE[0], height: SIZE[1] };
        let indices = Vec::from_iter(0..50);
        decoder.open(&file, channels)?.decode_frames(&indices, all, SIZE, |_, part| stills.push(part.image.clone()))?;
        let clips = grid(5, channels.into());
        let images = grid(1, channels.into());
        let augment = serde_json::from_str(r#"{"jitter": {"brightness": 0.4, "contrast": 0.4}}"#)?;
        let view = View { clip: stride(3), augment, ..View::default() };
        for id in 0..30 {
            let mut out = bytes(&clips);
            view.train_view(&clips, decoder.open(&file, channels)?, ViewKey { seed: 4, id, epoch: 2 }, 0, &mut out)?;
            let visible = Sampling::Stride(3).sample(50, 5, &mut Philox::new(4, id, 2, Purpose::Clip, 0));
            for (at, &index) in visible.iter().enumerate() {
                let mut expected = bytes(&images);
                let is_image: &DecodedImage = &stills[index as usize];
                view.train_view(
                    &images,
                    LazyImage::from(is_image),
                    ViewKey { seed: 4, id, epoch: 2 },
                    0,
                    &mut expected,
                )?;
                assert!(frame(&out, &clips, at) == expected, "sample {id}, frame {at}, {channels} channels");
            }
        }
    }
    Ok(())
}

/// Returns the indices shown by the frames of a view; the frames must have the size in which they were drawn.
fn shown_indices(planes: &[u8], grid: &Grid) -> Vec<u64> {
    let read = |at: usize| {
        let planes = frame(planes, grid, at);
        let each = planes.len() / 3;
        read_index(&(0..3 * each).map(|at| planes[at % 3 * each + at / 3]).collect::<Vec<u8>>(), SIZE[0])
    };
    (0..grid.pixel_shape()[1] as usize).map(read).collect()
}

fn evaluation_uses_the_center() -> Outcome {
    let file = encode_video(&mut videos(), &recipe(Codec::H264, Container::Mp4, 250, 3), 90)?;
    let grid = Grid { frames: 8, rows: 8, cols: 12, channels: 3, patch_frames: 2, patch: 8 };
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let mut visible = |sampling| -> Result<Vec<u64>, Error> {
        let view = View {
            clip: Some(ClipConfig { sampling, multi_scale: None, repeats: 1 }),
            center_crop: 1.0,
            ..View::default()
        };
        let mut out = bytes(&grid);
        view.eval_view(&grid, decoder.open(&file, 3)?, &mut out)?;
        Ok(shown_indices(&out, &grid))
    };
    assert_eq!(visible(Sampling::Stride(4))?, (0..16).map(|at| 13 + 4 * at).collect::<Vec<u64>>());
    assert_eq!(visible(Sampling::Segments)?, Sampling::Segments.sample_center(90, 16));
    assert_eq!(visible(Sampling::Stride(10))?, [0, 10, 20, 30, 40, 50, 60, 70, 80, 80, 80, 80, 80, 80, 80, 80]);
    Ok(())
}

fn each_repeat_samples_another_clip() -> Outcome {
    let file = encode_video(&mut videos(), &recipe(Codec::H264, Container::Mp4, 250, 3), 200)?;
    let grid = Grid { frames: 4, rows: 8, cols: 12, channels: 3, patch_frames: 1, patch: 8 };
    let full = serde_json::from_str(r#"{"scale": [1, 1], "ratio": [1.5, 1.5]}"#)?;
    let view = View { clip: stride(2), hflip: 0.0, crop: full, ..View::default() };
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let mut visible = |repeat| -> Result<Vec<u64>, Error> {
        let mut out = bytes(&grid);
        view.train_view(&grid, decoder.open(&file, 3)?, ViewKey { seed: 1, id: 2, epoch: 3 }, repeat, &mut out)?;
        Ok(shown_indices(&out, &grid))
    };
    let first = visible(0)?;
    assert_eq!(first, visible(0)?);
    assert_eq!(first, Sampling::Stride(2).sample(200, 4, &mut Philox::new(1, 2, 3, Purpose::Clip, 0)));
    let others: BTreeSet<Vec<u64>> = (0..4).map(&mut visible).collect::<Result<_, _>>()?;
    assert_eq!(others.len(), 4, "four repeats");
    Ok(())
}

fn a_video_that_does_not_fit_the_model_is_rejected() -> Outcome {
    let file = encode_video(&mut videos(), &recipe(Codec::H264, Container::Mp4, 30, 0), 5)?;
    let mut decoder = VisualDecoder::new(ImageLimits::default());
    let view = View::default();
    let error = view.train_view(
        &grid(4, 3),
        decoder.open(&file, 3)?,
        ViewKey { seed: 1, id: 2, epoch: 3 },
        0,
        &mut bytes(&grid(4, 3)),
    );
    let error = error.expect_err("the config has no clip settings");
    assert!(error.code == ExitCode::Usage && error.message.contains("view.clip"), "{error}");
    let is_image = DecodedImage { width: 96, height: 64, channels: 3, pixels: draw_frame(1) };
    let view = View { clip: stride(2), ..view };
    for output in [
        view.train_view(
            &grid(4, 3),
            LazyImage::from(&is_image),
            ViewKey { seed: 1, id: 2, epoch: 3 },
            0,
            &mut bytes(&grid(4, 3)),
        ),
        view.eval_view(&grid(4, 3), LazyImage::from(&is_image), &mut bytes(&grid(4, 3))),
    ] {
        let error = output.expect_err("one picture");
        assert!(error.code == ExitCode::Corrupt && error.message.contains("clips of 4 frames"), "{error}");
    }
    let error = decoder.open(&file, 3)?.decode_full().expect_err("a video");
    assert!(error.message.contains("a video where an image is expected"), "{error}");
    Ok(())
}

fn the_config_selects_the_frames() -> Outcome {
    let text = fs::read_to_string(root().join("configs/tiny/mae.json"))?;
    let with = |set: &str| Config::parse(&text, &[set.to_owned()]);
    assert_eq!(with("train.seed=1")?.view.clip, None);
    assert!(!with("train.seed=1")?.to_json()["view"].as_object().expect("a section").contains_key("clip"));
    assert_eq!(with(r#"view.clip={"sampling": {"stride": 4}}"#)?.view.clip, stride(4));
    let official = r#"view.clip={"sampling": "segments", "multi_scale": [1, 0.875]}"#;
    let read = with(official)?;
    assert_eq!(
        read.view.clip,
        Some(ClipConfig { sampling: Sampling::Segments, multi_scale: Some(vec![1.0, 0.875]), repeats: 1 })
    );
    assert_eq!(Config::parse(&read.to_json().to_string(), &[])?, read);
    for (wrong, word) in [
        (r#"view.clip={"sampling": {"stride": 0}}"#, "view.clip.sampling.stride is 0"),
        (r#"view.clip={"sampling": {"stride": 1025}}"#, "must lie in 1..=1024"),
        (r#"view.clip={"sampling": {"strides": 4}}"#, "did you mean `stride`"),
        (r#"view.clip={"sampling": "segment"}"#, "did you mean `segments`"),
        (r#"view.clip={"stride": 4}"#, "unknown key `stride`"),
        (r#"view.clip={"sampling": "segments", "multi_scale": []}"#, "view.clip.multi_scale is []"),
        (r#"view.clip={"sampling": "segments", "multi_scale": [1.1]}"#, "0 < fraction <= 1"),
        (r#"view.clip={}"#, "missing field `sampling`"),
    ] {
        let error = with(wrong).expect_err(wrong);
        assert!(error.code == ExitCode::Usage && error.message.contains(word), "{wrong}: {error}");
    }
    Ok(())
}

/// Writes two classes of 6 videos each, of 20 to 31 frames, and the list for pack.
pub fn write_videos(folder: &Path) -> Result<(), Failed> {
    let mut videos = videos();
    for number in 0..12 {
        let path = folder.join(format!("class{}", number % 2));
        fs::create_dir_all(&path)?;
        let (codec, container, name) = match number % 3 {
            0 => (Codec::H264, Container::Mp4, "mp4"),
            1 => (Codec::Vp9, Container::Webm, "webm"),
            _ => (Codec::Mpeg4, Container::Avi, "AVI"),
        };
        let file = encode_video(&mut videos, &recipe(codec, container, 12, 0), 20 + number)?;
        fs::write(path.join(format!("v{number:02}.{name}")), file)?;
    }
    Ok(())
}

fn options(video: Recode) -> PackOptions {
    PackOptions { name: Some("footage".into()), samples_per_shard: 5, video, ..PackOptions::default() }
}

fn video_batches_are_the_same_on_any_number_of_ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_videos(&folder.path().join("in"))?;
    let out = path_text(folder.path().join("out"));
    pack(&path_text(folder.path().join("in")), &out, &options(Recode::default()))?;
    let set = Arc::new(Mixture::from_set(DataSet::open(&out)?));
    let grid = Grid { frames: 4, rows: 8, cols: 12, channels: 3, patch_frames: 1, patch: 8 };
    let view = View { clip: stride(2), ..View::default() };
    let source = || LoaderOptions {
        labels: Labels::Required,
        mixture: set.clone(),
        cache: None,
        view: Arc::new({
            let view = view.clone();
            move |image, id, epoch, _, out| view.train_view(&grid, image, ViewKey { seed: 11, id, epoch }, 0, out)
        }),
        tokenizer: None,
        modality: Modality::Image,
        shape: grid.pixel_shape(),
        single_frame_sets: Vec::new(),
        limits: ImageLimits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_corrupt_fraction: 0.1,
    };
    let order = || SampleOrder::with_sources(&set.weighted_sizes(), 11, 2);
    let read = |loader: DataLoader| -> Result<Vec<LoadedRows>, Error> {
        loader.map(|rows| rows.map(|rows| LoadedRows { wait_time: Duration::ZERO, ..rows })).collect()
    };
    let rank = |rank, world| read(DataLoader::for_training(source(), order(), 4, rank, world, 0..6)?);
    let full = rank(0, 1)?;
    assert!(full.iter().all(|rows| rows.ids.len() == 4 && rows.pixels.numel() == 4 * 3 * 4 * 64 * 96));
    let first = rank(0, 2)?;
    let second = rank(1, 2)?;
    for (full, (first, second)) in full.iter().zip(first.iter().zip(&second)) {
        assert!(full.ids == [&first.ids[..], &second.ids[..]].concat());
        assert!(full.pixels == tch::Tensor::cat(&[&first.pixels, &second.pixels], 0));
    }
    // A video that was truncated before it was packed is soon replaced.
    let lost = set.id(0)?;
    let (shard, row) = set.find_sample(0)?;
    let member = shard.member(row, &["mp4", "webm", "avi"]).expect("a video");
    let mut tar = fs::read(shard.name())?;
    tar[member.offset as usize..member.end() as usize].fill(7);
    fs::write(shard.name(), tar)?;
    let after = rank(0, 1)?;
    assert!(after.iter().all(|rows| rows.ids.len() == 4 && !rows.ids.contains(&lost)));
    assert!(full.iter().any(|rows| rows.ids.contains(&lost)));
    Ok(())
}

/// Returns the videos of a packed set by key: extension and bytes.
fn packed_videos(out: &str) -> Result<BTreeMap<String, (String, Vec<u8>)>, Failed> {
    let set = DataSet::open(out)?;
    let full = |index| {
        let (shard, row) = set.find_sample(index)?;
        let member = shard.require_member(row, &["mp4", "webm", "avi", "mkv"])?;
        let extension = member.split_name().1.to_owned();
        Ok((shard.key(row).to_owned(), (extension.clone(), shard.read(row, &[&extension])?)))
    };
    (0..set.len()).map(full).collect()
}

fn videos_are_packed_unchanged() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_videos(&folder.path().join("in"))?;
    // Not a video, whatever its name says.
    fs::write(folder.path().join("in/class0/none.mp4"), b"\0\0\0\x18ftypisom and nothing more")?;
    let out = path_text(folder.path().join("out"));
    let some = PackOptions { max_corrupt_fraction: 0.1, ..options(Recode::default()) };
    let done = pack(&path_text(folder.path().join("in")), &out, &some)?;
    assert_eq!((done.skipped.len(), done.data_sets[0].1.samples), (1, 12), "{:?}", done.skipped);
    assert!(done.skipped[0].1.contains("not a video that can be decoded"), "{:?}", done.skipped);
    let packed = packed_videos(&out)?;
    for (key, name) in [("class0_v00", "mp4"), ("class1_v01", "webm"), ("class0_v02", "avi")] {
        let (extension, bytes) = &packed[key];
        let (class, stem) = key.split_once('_').expect("two parts");
        let file = if name == "avi" { format!("{stem}.AVI") } else { format!("{stem}.{name}") };
        assert_eq!(extension, name);
        assert!(*bytes == fs::read(folder.path().join("in").join(class).join(file))?, "{key}");
    }
    Ok(())
}

fn videos_can_be_packed_smaller_and_at_a_lower_frame_rate() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_videos(&folder.path().join("in"))?;
    let mut reader = videos();
    for (name, video, resize, codec, container) in [
        ("mjpeg", Recode { encode: Some(VideoCodec::Mjpeg), ..Recode::default() }, None, "mjpeg", "matroska"),
        ("gop", Recode { gop: Some(4), ..Recode::default() }, None, "h264", "mov"),
        ("slow", Recode { fps: Some(10.0), ..Recode::default() }, None, "h264", "mov"),
        ("small", Recode::default(), Some(48), "h264", "mov"),
    ] {
        let out = path_text(folder.path().join(name));
        let done = pack(&path_text(folder.path().join("in")), &out, &PackOptions { resize, ..options(video) })?;
        assert_eq!((done.skipped.len(), done.data_sets[0].1.samples), (0, 12), "{name}: {:?}", done.skipped);
        for (key, (_, bytes)) in packed_videos(&out)? {
            let frames = 20 + key[key.len() - 2..].parse::<u64>()?;
            let video = reader.open(&bytes)?;
            let facts = video.info.clone();
            assert_eq!((&facts.codec[..], &facts.container[..]), (codec, container), "{key}");
            let slow = name == "slow";
            let count = if slow { (frames as f64 / 2.5).round() as u64 } else { frames };
            let size = if name == "small" { [72, 48] } else { SIZE };
            assert_eq!((facts.frames, [facts.width, facts.height]), (count, size), "{name}: {key}: {facts:?}");
            assert!((facts.fps - if slow { 10.0 } else { 25.0 }).abs() < 0.2, "{facts:?}");
            let visible = video.frames(&[0, 3, count - 1], [0, 0, size[0], size[1]], size)?;
            let mut pixels = vec![0; visible.bytes()];
            for (at, frame) in [0, 3, count - 1].into_iter().enumerate() {
                visible.read(at, &mut pixels)?;
                // The frame that is shown at that time.
                let expected = if slow { (frame as f64 * 2.5 + 1e-3) as u64 } else { frame };
                assert_eq!(read_index(&pixels, size[0]), expected, "{name}: {key}, frame {frame}");
            }
        }
        let second = pack(&path_text(folder.path().join("in")), &out, &PackOptions { resize, ..options(video) })?;
        assert!(second.up_to_date);
    }
    for (video, word) in [
        (Recode { fps: Some(0.0), ..Recode::default() }, "more than 0, at most 1000"),
        (Recode { gop: Some(0), ..Recode::default() }, "it is 1 to 10000"),
        (Recode { gop: Some(5), encode: Some(VideoCodec::Mjpeg), ..Recode::default() }, "every frame is a keyframe"),
    ] {
        let error = pack(&path_text(folder.path().join("in")), "nowhere", &options(video)).expect_err(word);
        assert!(error.code == ExitCode::Usage && error.message.contains(word), "{error}");
    }
    Ok(())
}

fn inspect_describes_a_video_data_set() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_videos(&folder.path().join("in"))?;
    let out = path_text(folder.path().join("out"));
    let pack = occlude_command(&["pack", &path_text(folder.path().join("in")), &out, "--name", "footage"]).output()?;
    assert!(pack.status.success(), "{}", String::from_utf8_lossy(&pack.stderr));
    let output = occlude_command(&["inspect", &out]).current_dir(folder.path()).output()?;
    let printed = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(0), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    let text: serde_json::Value = serde_json::from_str(printed.lines().last().expect("a line"))?;
    let videos = &text["videos"];
    assert_eq!(videos["count"], 12);
    assert_eq!(videos["frames"], (20..32).sum::<u64>());
    assert_eq!(videos["codecs"], serde_json::json!({"h264 in mov": 4, "mpeg4 in avi": 4, "vp9 in matroska": 4}));
    assert_eq!(videos["frame_rates"], serde_json::json!({"25": 12}));
    assert_eq!(videos["sizes"], serde_json::json!({"96x64": 12}));
    let seconds = |key: &str| videos[key].as_f64().expect("a number");
    assert!((seconds("shortest") - 0.8).abs() < 0.01 && (seconds("longest") - 1.24).abs() < 0.01, "{videos}");
    assert!(printed.contains("12 videos, 306 frames: 0.8 to 1.2 s"), "{printed}");
    let sheet = image::open(folder.path().join("footage-sheet.png"))?.to_rgb8();
    assert!(sheet.width() > 8 * 96 && sheet.height() > 6 * 64, "four frames of each of 12: {:?}", sheet.dimensions());
    Ok(())
}
