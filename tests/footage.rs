//! Videos on their way to a batch: which frames a clip shows, its view, the feed, `pack` and `inspect`.

use crate::clip::{SIZE, drawn, made, number, recipe, videos};
use crate::job::occlude;
use crate::shard::text;
use crate::support::{Outcome, root};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::clip::{Codec, Container, Sampling};
use occlude::data::decode::{Decoded, Decoder, Limits, Picture, Region};
use occlude::data::medium::Medium;
use occlude::data::mix::Mix;
use occlude::data::order::Order;
use occlude::data::pack::{EncodeVideo, Options, Videos as Recode, pack};
use occlude::data::set::DataSet;
use occlude::fault::{Code, Fault};
use occlude::feed::{Feed, Rows, Source};
use occlude::grid::Grid;
use occlude::part::view::View;
use occlude::part::view::clip::Clip;
use occlude::rng::{Draw, Purpose};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

crate::trials![
    a_strided_clip_is_the_official_loaders,
    segments_give_one_frame_each,
    multi_scale_boxes_are_the_official_ones,
    all_frames_of_a_clip_have_one_box_and_one_flip,
    evaluation_shows_the_middle,
    each_repeat_shows_another_clip,
    a_video_and_a_model_that_do_not_fit_are_refused,
    the_config_says_which_frames,
    a_feed_of_videos_is_the_same_on_any_number_of_ranks,
    videos_are_packed_as_they_are,
    videos_are_packed_smaller_and_slower,
    a_set_of_videos_is_looked_at,
];

fn draw(id: u64) -> Draw {
    Draw::new(9, id, 0, Purpose::Clip, 0)
}

fn a_strided_clip_is_the_official_loaders() -> Outcome {
    // By hand from VideoMAE's `_sample_train_indices` and `_video_TSN_decord_batch_loader`, of which the first counts
    // from 1 and the second advances while `offset + step < duration`.
    let short = |frames: u64, count: usize, stride: u32| Sampling::Stride(stride).draw(frames, count, &mut draw(1));
    assert_eq!(short(10, 4, 4), [0, 4, 8, 8]);
    assert_eq!(short(9, 4, 4), [0, 4, 4, 4]);
    assert_eq!(short(5, 4, 4), [0, 0, 0, 0]);
    assert_eq!(short(6, 4, 4), [0, 4, 4, 4]);
    assert_eq!(short(1, 3, 2), [0, 0, 0]);
    assert_eq!(short(64, 16, 4), (0..16).map(|at| at * 4).collect::<Vec<u64>>());
    let mut begun: BTreeMap<u64, u32> = BTreeMap::new();
    for id in 0..4000 {
        let indices = Sampling::Stride(4).draw(73, 16, &mut draw(id));
        assert!(indices.windows(2).all(|two| two[1] - two[0] == 4), "{indices:?}");
        *begun.entry(indices[0]).or_default() += 1;
    }
    assert_eq!(begun.keys().copied().collect::<Vec<_>>(), Vec::from_iter(0..10), "73 - 64 + 1 places");
    assert!(begun.values().all(|&count| (320..480).contains(&count)), "{begun:?}");
    assert_eq!(Sampling::Stride(4).centred(73, 16)[0], 4);
    assert_eq!(Sampling::Stride(4).centred(10, 4), [0, 4, 8, 8]);
    Ok(())
}

fn segments_give_one_frame_each() -> Outcome {
    let mut seen = BTreeSet::new();
    for id in 0..2000 {
        let indices = Sampling::Segments.draw(35, 8, &mut draw(id));
        assert!(indices.iter().enumerate().all(|(at, &index)| index / 4 == at as u64), "{indices:?}");
        seen.extend(indices);
        let few = Sampling::Segments.draw(5, 8, &mut draw(id));
        assert!(few.len() == 8 && few.is_sorted() && few.iter().all(|&index| index < 5), "{few:?}");
    }
    assert_eq!(seen, (0..32).collect(), "the official loader cuts the rest off as well");
    // int(tick / 2 + tick · x), tick = 35 / 8.
    assert_eq!(Sampling::Segments.centred(35, 8), [2, 6, 10, 15, 19, 24, 28, 32]);
    assert_eq!(Sampling::Segments.centred(3, 4), [0, 1, 1, 2]);
    Ok(())
}

fn multi_scale_boxes_are_the_official_ones() -> Outcome {
    let clip = Clip { sampling: Sampling::Segments, multi_scale: Some(vec![1.0, 0.875, 0.75, 0.66]), repeats: 1 };
    for (width, height, sides) in
        [(340, 256, [256, 224, 192, 168]), (320, 240, [240, 210, 180, 158]), (226, 400, [224, 197, 169, 149])]
    {
        let mut sizes = BTreeSet::new();
        let mut places: BTreeMap<(u32, u32), BTreeSet<(u32, u32)>> = BTreeMap::new();
        for id in 0..6000 {
            let found = clip.region([width, height], [224, 224], &mut Draw::new(2, id, 0, Purpose::Crop, 0));
            let Region { left, top, width: w, height: h } = found.expect("a box");
            assert!(left + w <= width && top + h <= height);
            sizes.insert((w, h));
            places.entry((w, h)).or_default().insert((left, top));
        }
        let near = |a: usize, b: usize| a.abs_diff(b) <= 1;
        let pairs = (0..4).flat_map(|a| (0..4).map(move |b| (a, b))).filter(|&(a, b)| near(a, b));
        assert_eq!(sizes, pairs.map(|(a, b)| (sides[a], sides[b])).collect(), "of {width}x{height}");
        for ((w, h), places) in places {
            let (x, y) = ((width - w) / 4, (height - h) / 4);
            let all: BTreeSet<(u32, u32)> = (0..=4)
                .flat_map(|a| (0..=4).map(move |b| (a, b)))
                .filter(|(a, b)| a % 2 == b % 2)
                .map(|(a, b)| (a * x, b * y))
                .collect();
            assert_eq!(places, all, "{w}x{h} of {width}x{height}");
        }
    }
    Ok(())
}

fn grid(frames: i64, channels: i64) -> Grid {
    Grid { frames, rows: 4, cols: 6, channels, patch_frames: 1, patch: 8 }
}

fn stride(stride: u32) -> Option<Clip> {
    Some(Clip { sampling: Sampling::Stride(stride), multi_scale: None, repeats: 1 })
}

fn bytes(grid: &Grid) -> Vec<u8> {
    vec![0; grid.pixels().iter().product::<i64>() as usize]
}

/// A frame of [C, T, Y, X] as planes [C, Y, X].
fn frame(planes: &[u8], grid: &Grid, at: usize) -> Vec<u8> {
    let [channels, frames, height, width] = grid.pixels().map(|side| side as usize);
    (0..channels).flat_map(|c| planes[(c * frames + at) * height * width..][..height * width].to_vec()).collect()
}

fn all_frames_of_a_clip_have_one_box_and_one_flip() -> Outcome {
    let file = made(&mut videos(), &recipe(Codec::H264, Container::Mp4, 30, 2), 50)?;
    let mut decoder = Decoder::new(Limits::default());
    for channels in [3, 1] {
        let mut stills = Vec::new();
        let all = Region { left: 0, top: 0, width: SIZE[0], height: SIZE[1] };
        let indices = Vec::from_iter(0..50);
        decoder.open(&file, channels)?.clip(&indices, all, SIZE, |_, part| stills.push(part.image.clone()))?;
        let (clips, images) = (grid(5, channels.into()), grid(1, channels.into()));
        let augment = serde_json::from_str(r#"{"jitter": {"brightness": 0.4, "contrast": 0.4}}"#)?;
        let view = View { clip: stride(3), augment, ..View::default() };
        for id in 0..30 {
            let mut out = bytes(&clips);
            view.train(&clips, decoder.open(&file, channels)?, 4, id, 2, 0, &mut out)?;
            let shown = Sampling::Stride(3).draw(50, 5, &mut Draw::new(4, id, 2, Purpose::Clip, 0));
            for (at, &index) in shown.iter().enumerate() {
                let mut wanted = bytes(&images);
                let still: &Decoded = &stills[index as usize];
                view.train(&images, Picture::from(still), 4, id, 2, 0, &mut wanted)?;
                assert!(frame(&out, &clips, at) == wanted, "sample {id}, frame {at}, {channels} channels");
            }
        }
    }
    Ok(())
}

/// Numbers that the frames of a view show, whose frames have the size that they were drawn in.
fn shown(planes: &[u8], grid: &Grid) -> Vec<u64> {
    let read = |at: usize| {
        let planes = frame(planes, grid, at);
        let each = planes.len() / 3;
        number(&(0..3 * each).map(|at| planes[at % 3 * each + at / 3]).collect::<Vec<u8>>(), SIZE[0])
    };
    (0..grid.pixels()[1] as usize).map(read).collect()
}

fn evaluation_shows_the_middle() -> Outcome {
    let file = made(&mut videos(), &recipe(Codec::H264, Container::Mp4, 250, 3), 90)?;
    let grid = Grid { frames: 8, rows: 8, cols: 12, channels: 3, patch_frames: 2, patch: 8 };
    let mut decoder = Decoder::new(Limits::default());
    let mut seen = |sampling| -> Result<Vec<u64>, Fault> {
        let view =
            View { clip: Some(Clip { sampling, multi_scale: None, repeats: 1 }), center: 1.0, ..View::default() };
        let mut out = bytes(&grid);
        view.eval(&grid, decoder.open(&file, 3)?, &mut out)?;
        Ok(shown(&out, &grid))
    };
    assert_eq!(seen(Sampling::Stride(4))?, (0..16).map(|at| 13 + 4 * at).collect::<Vec<u64>>());
    assert_eq!(seen(Sampling::Segments)?, Sampling::Segments.centred(90, 16));
    assert_eq!(seen(Sampling::Stride(10))?, [0, 10, 20, 30, 40, 50, 60, 70, 80, 80, 80, 80, 80, 80, 80, 80]);
    Ok(())
}

fn each_repeat_shows_another_clip() -> Outcome {
    let file = made(&mut videos(), &recipe(Codec::H264, Container::Mp4, 250, 3), 200)?;
    let grid = Grid { frames: 4, rows: 8, cols: 12, channels: 3, patch_frames: 1, patch: 8 };
    let whole = serde_json::from_str(r#"{"scale": [1, 1], "ratio": [1.5, 1.5]}"#)?;
    let view = View { clip: stride(2), flip: 0.0, crop: whole, ..View::default() };
    let mut decoder = Decoder::new(Limits::default());
    let mut seen = |repeat| -> Result<Vec<u64>, Fault> {
        let mut out = bytes(&grid);
        view.train(&grid, decoder.open(&file, 3)?, 1, 2, 3, repeat, &mut out)?;
        Ok(shown(&out, &grid))
    };
    let first = seen(0)?;
    assert_eq!(first, seen(0)?);
    assert_eq!(first, Sampling::Stride(2).draw(200, 4, &mut Draw::new(1, 2, 3, Purpose::Clip, 0)));
    let others: BTreeSet<Vec<u64>> = (0..4).map(&mut seen).collect::<Result<_, _>>()?;
    assert_eq!(others.len(), 4, "four repeats");
    Ok(())
}

fn a_video_and_a_model_that_do_not_fit_are_refused() -> Outcome {
    let file = made(&mut videos(), &recipe(Codec::H264, Container::Mp4, 30, 0), 5)?;
    let mut decoder = Decoder::new(Limits::default());
    let view = View::default();
    let fault = view.train(&grid(4, 3), decoder.open(&file, 3)?, 1, 2, 3, 0, &mut bytes(&grid(4, 3)));
    let fault = fault.expect_err("no word of clips in the config");
    assert!(fault.code == Code::Usage && fault.message.contains("view.clip"), "{fault}");
    let still = Decoded { width: 96, height: 64, channels: 3, pixels: drawn(1) };
    let view = View { clip: stride(2), ..view };
    for made in [
        view.train(&grid(4, 3), Picture::from(&still), 1, 2, 3, 0, &mut bytes(&grid(4, 3))),
        view.eval(&grid(4, 3), Picture::from(&still), &mut bytes(&grid(4, 3))),
    ] {
        let fault = made.expect_err("one picture");
        assert!(fault.code == Code::Corrupt && fault.message.contains("clips of 4 frames"), "{fault}");
    }
    let fault = decoder.open(&file, 3)?.whole().expect_err("a video");
    assert!(fault.message.contains("a video where a still picture is wanted"), "{fault}");
    Ok(())
}

fn the_config_says_which_frames() -> Outcome {
    let text = fs::read_to_string(root().join("configs/tiny/mae.json"))?;
    let with = |set: &str| Config::parse(&text, &[set.to_owned()]);
    assert_eq!(with("train.seed=1")?.view.clip, None);
    assert!(!with("train.seed=1")?.resolved()["view"].as_object().expect("a section").contains_key("clip"));
    assert_eq!(with(r#"view.clip={"sampling": {"stride": 4}}"#)?.view.clip, stride(4));
    let official = r#"view.clip={"sampling": "segments", "multi_scale": [1, 0.875]}"#;
    let read = with(official)?;
    assert_eq!(
        read.view.clip,
        Some(Clip { sampling: Sampling::Segments, multi_scale: Some(vec![1.0, 0.875]), repeats: 1 })
    );
    assert_eq!(Config::parse(&read.resolved().to_string(), &[])?, read);
    for (wrong, word) in [
        (r#"view.clip={"sampling": {"stride": 0}}"#, "view.clip.sampling.stride is 0"),
        (r#"view.clip={"sampling": {"stride": 1025}}"#, "must lie in 1..=1024"),
        (r#"view.clip={"sampling": {"strides": 4}}"#, "did you mean `stride`"),
        (r#"view.clip={"sampling": "segment"}"#, "did you mean `segments`"),
        (r#"view.clip={"stride": 4}"#, "unknown key `stride`"),
        (r#"view.clip={"sampling": "segments", "multi_scale": []}"#, "view.clip.multi_scale is []"),
        (r#"view.clip={"sampling": "segments", "multi_scale": [1.1]}"#, "0 < share <= 1"),
        (r#"view.clip={}"#, "missing field `sampling`"),
    ] {
        let fault = with(wrong).expect_err(wrong);
        assert!(fault.code == Code::Usage && fault.message.contains(word), "{wrong}: {fault}");
    }
    Ok(())
}

/// Two classes of 6 videos each, of 20 to 31 frames; with what a pack is told.
pub fn footage(folder: &Path) -> Result<(), Failed> {
    let mut videos = videos();
    for number in 0..12 {
        let place = folder.join(format!("class{}", number % 2));
        fs::create_dir_all(&place)?;
        let (codec, container, name) = match number % 3 {
            0 => (Codec::H264, Container::Mp4, "mp4"),
            1 => (Codec::Vp9, Container::Webm, "webm"),
            _ => (Codec::Mpeg4, Container::Avi, "AVI"),
        };
        let file = made(&mut videos, &recipe(codec, container, 12, 0), 20 + number)?;
        fs::write(place.join(format!("v{number:02}.{name}")), file)?;
    }
    Ok(())
}

fn options(video: Recode) -> Options {
    Options { name: Some("footage".into()), samples_per_shard: 5, video, ..Options::default() }
}

fn a_feed_of_videos_is_the_same_on_any_number_of_ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    footage(&folder.path().join("in"))?;
    let out = text(&folder.path().join("out"));
    pack(&text(&folder.path().join("in")), &out, &options(Recode::default()))?;
    let set = Arc::new(Mix::one(DataSet::open(&out)?));
    let grid = Grid { frames: 4, rows: 8, cols: 12, channels: 3, patch_frames: 1, patch: 8 };
    let view = View { clip: stride(2), ..View::default() };
    let source = || Source {
        set: set.clone(),
        cache: None,
        view: Arc::new({
            let view = view.clone();
            move |picture, id, epoch, _, out| view.train(&grid, picture, 11, id, epoch, 0, out)
        }),
        captions: None,
        medium: Medium::Picture,
        shape: grid.pixels(),
        stills: Vec::new(),
        limits: Limits::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_bad_share: 0.1,
    };
    let order = || Order::mixed(&set.sizes(), 11, 2);
    let read = |feed: Feed| -> Result<Vec<Rows>, Fault> {
        feed.map(|rows| rows.map(|rows| Rows { waited: Duration::ZERO, ..rows })).collect()
    };
    let rank = |rank, world| read(Feed::train(source(), order(), 4, rank, world, 0..6)?);
    let one = rank(0, 1)?;
    assert!(one.iter().all(|rows| rows.ids.len() == 4 && rows.pixels.numel() == 4 * 3 * 4 * 64 * 96));
    let (left, right) = (rank(0, 2)?, rank(1, 2)?);
    for (one, (left, right)) in one.iter().zip(left.iter().zip(&right)) {
        assert!(one.ids == [&left.ids[..], &right.ids[..]].concat());
        assert!(one.pixels == tch::Tensor::cat(&[&left.pixels, &right.pixels], 0));
    }
    // A video that was cut before it was packed is no sample for long.
    let lost = set.id(0)?;
    let (shard, row) = set.sample(0)?;
    let member = shard.member(row, &["mp4", "webm", "avi"]).expect("a video");
    let mut tar = fs::read(shard.name())?;
    tar[member.offset as usize..member.end() as usize].fill(7);
    fs::write(shard.name(), tar)?;
    let after = rank(0, 1)?;
    assert!(after.iter().all(|rows| rows.ids.len() == 4 && !rows.ids.contains(&lost)));
    assert!(one.iter().any(|rows| rows.ids.contains(&lost)));
    Ok(())
}

/// The videos of a packed set by key: extension and bytes.
fn packed(out: &str) -> Result<BTreeMap<String, (String, Vec<u8>)>, Failed> {
    let set = DataSet::open(out)?;
    let one = |index| {
        let (shard, row) = set.sample(index)?;
        let member = shard.wanted(row, &["mp4", "webm", "avi", "mkv"])?;
        let extension = member.split().1.to_owned();
        Ok((shard.key(row).to_owned(), (extension.clone(), shard.read(row, &[&extension])?)))
    };
    (0..set.len()).map(one).collect()
}

fn videos_are_packed_as_they_are() -> Outcome {
    let folder = tempfile::tempdir()?;
    footage(&folder.path().join("in"))?;
    // No video at all, whatever its name says.
    fs::write(folder.path().join("in/class0/none.mp4"), b"\0\0\0\x18ftypisom and nothing more")?;
    let out = text(&folder.path().join("out"));
    let some = Options { max_bad_share: 0.1, ..options(Recode::default()) };
    let done = pack(&text(&folder.path().join("in")), &out, &some)?;
    assert_eq!((done.bad.len(), done.sets[0].1.samples), (1, 12), "{:?}", done.bad);
    assert!(done.bad[0].1.contains("not a video that can be decoded"), "{:?}", done.bad);
    let there = packed(&out)?;
    for (key, name) in [("class0_v00", "mp4"), ("class1_v01", "webm"), ("class0_v02", "avi")] {
        let (extension, bytes) = &there[key];
        let (class, stem) = key.split_once('_').expect("two parts");
        let file = if name == "avi" { format!("{stem}.AVI") } else { format!("{stem}.{name}") };
        assert_eq!(extension, name);
        assert!(*bytes == fs::read(folder.path().join("in").join(class).join(file))?, "{key}");
    }
    Ok(())
}

fn videos_are_packed_smaller_and_slower() -> Outcome {
    let folder = tempfile::tempdir()?;
    footage(&folder.path().join("in"))?;
    let mut reader = videos();
    for (name, video, resize, codec, container) in [
        ("mjpeg", Recode { encode: Some(EncodeVideo::Mjpeg), ..Recode::default() }, None, "mjpeg", "matroska"),
        ("gop", Recode { gop: Some(4), ..Recode::default() }, None, "h264", "mov"),
        ("slow", Recode { fps: Some(10.0), ..Recode::default() }, None, "h264", "mov"),
        ("small", Recode::default(), Some(48), "h264", "mov"),
    ] {
        let out = text(&folder.path().join(name));
        let done = pack(&text(&folder.path().join("in")), &out, &Options { resize, ..options(video) })?;
        assert_eq!((done.bad.len(), done.sets[0].1.samples), (0, 12), "{name}: {:?}", done.bad);
        for (key, (_, bytes)) in packed(&out)? {
            let frames = 20 + key[key.len() - 2..].parse::<u64>()?;
            let video = reader.open(&bytes)?;
            let facts = video.facts.clone();
            assert_eq!((&facts.codec[..], &facts.container[..]), (codec, container), "{key}");
            let slow = name == "slow";
            let count = if slow { (frames as f64 / 2.5).round() as u64 } else { frames };
            let size = if name == "small" { [72, 48] } else { SIZE };
            assert_eq!((facts.frames, [facts.width, facts.height]), (count, size), "{name}: {key}: {facts:?}");
            assert!((facts.fps - if slow { 10.0 } else { 25.0 }).abs() < 0.2, "{facts:?}");
            let seen = video.frames(&[0, 3, count - 1], [0, 0, size[0], size[1]], size)?;
            let mut pixels = vec![0; seen.bytes()];
            for (at, frame) in [0, 3, count - 1].into_iter().enumerate() {
                seen.read(at, &mut pixels)?;
                // The frame that is shown at that time.
                let wanted = if slow { (frame as f64 * 2.5 + 1e-3) as u64 } else { frame };
                assert_eq!(number(&pixels, size[0]), wanted, "{name}: {key}, frame {frame}");
            }
        }
        let again = pack(&text(&folder.path().join("in")), &out, &Options { resize, ..options(video) })?;
        assert!(again.untouched);
    }
    for (video, word) in [
        (Recode { fps: Some(0.0), ..Recode::default() }, "more than 0, at most 1000"),
        (Recode { gop: Some(0), ..Recode::default() }, "it is 1 to 10000"),
        (Recode { gop: Some(5), encode: Some(EncodeVideo::Mjpeg), ..Recode::default() }, "every frame stands alone"),
    ] {
        let fault = pack(&text(&folder.path().join("in")), "nowhere", &options(video)).expect_err(word);
        assert!(fault.code == Code::Usage && fault.message.contains(word), "{fault}");
    }
    Ok(())
}

fn a_set_of_videos_is_looked_at() -> Outcome {
    let folder = tempfile::tempdir()?;
    footage(&folder.path().join("in"))?;
    let out = text(&folder.path().join("out"));
    let pack = occlude(&["pack", &text(&folder.path().join("in")), &out, "--name", "footage"]).output()?;
    assert!(pack.status.success(), "{}", String::from_utf8_lossy(&pack.stderr));
    let output = occlude(&["inspect", &out]).current_dir(folder.path()).output()?;
    let said = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let told: serde_json::Value = serde_json::from_str(said.lines().last().expect("a line"))?;
    let videos = &told["videos"];
    assert_eq!(videos["count"], 12);
    assert_eq!(videos["frames"], (20..32).sum::<u64>());
    assert_eq!(videos["codings"], serde_json::json!({"h264 in mov": 4, "mpeg4 in avi": 4, "vp9 in matroska": 4}));
    assert_eq!(videos["rates"], serde_json::json!({"25": 12}));
    assert_eq!(videos["sizes"], serde_json::json!({"96x64": 12}));
    let seconds = |key: &str| videos[key].as_f64().expect("a number");
    assert!((seconds("shortest") - 0.8).abs() < 0.01 && (seconds("longest") - 1.24).abs() < 0.01, "{videos}");
    assert!(said.contains("12 videos, 306 frames: 0.8 to 1.2 s"), "{said}");
    let sheet = image::open(folder.path().join("footage-sheet.png"))?.to_rgb8();
    assert!(sheet.width() > 8 * 96 && sheet.height() > 6 * 64, "four frames of each of 12: {:?}", sheet.dimensions());
    Ok(())
}
