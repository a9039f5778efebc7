//! What feeding and packing keep to when they run for long: requests for memory, and the most of it. Every case is a
//! process of its own, whose memory is nobody else's.

use crate::heap;
use crate::server::Server;
use crate::shard::text;
use crate::support::Outcome;
use image::codecs::jpeg::JpegEncoder;
use libtest_mimic::Failed;
use occlude::data::decode::Limits;
use occlude::data::medium::{Medium, Sample};
use occlude::data::mix::Mix;
use occlude::data::order::Order;
use occlude::data::pack::{Options, pack};
use occlude::data::set::DataSet;
use occlude::fault::{Fault, Result};
use occlude::feed::{Feed, Source, ViewFn};
use occlude::grid::Grid;
use occlude::part::view::View;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

crate::trials![
    a_sample_needs_no_new_memory,
    large_samples_from_a_store_keep_to_the_bytes_asked_for,
    packing_holds_a_few_pictures_at_a_time,
];

const GRID: Grid = Grid { frames: 1, rows: 4, cols: 4, channels: 3, patch_frames: 1, patch: 16 };

/// What two workers keep of pictures of 1,400 × 1,400 pixels (a picture as it is stored, and upright: 12 MiB), the
/// client's buffers of 64 connections, stacks, and what the allocator does not give back.
const BESIDE: u64 = 96 << 20;

/// In a process of its own: what it found goes to standard output.
pub fn case(name: &str) -> i32 {
    let place = std::env::var("OCCLUDE_PLACE").expect("a place");
    let done = match name {
        "steady-rows" => rows(&place),
        "steady-feed" => peak(|| feed(&place)),
        _ => peak(|| pack(&place, &format!("{place}-packed"), &Options::default()).map(drop)),
    };
    match done {
        Ok(found) => {
            println!("{found}");
            0
        }
        Err(fault) => {
            eprintln!("{fault}");
            1
        }
    }
}

fn run(case: &str, place: &str) -> std::result::Result<String, Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    let output = command.env("OCCLUDE_CASE", case).env("OCCLUDE_PLACE", place).output()?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(told)
}

/// `count` pictures of noise that no JPEG makes small, `side` pixels a side, in two classes; four files under many names.
fn noise(folder: &Path, count: usize, side: u32) -> Outcome {
    let mut files: Vec<PathBuf> = Vec::new();
    for number in 0..count {
        let class = folder.join(format!("{}", number % 2));
        std::fs::create_dir_all(&class)?;
        let path = class.join(format!("{number:05}.jpg"));
        if let Some(file) = files.get(number % 4) {
            std::fs::hard_link(file, &path)?;
            continue;
        }
        let value = |x: u32, y: u32, c: u32| {
            ((x * 7919 + y * 104_729 + c * 31 + number as u32).wrapping_mul(2_654_435_761) >> 24) as u8
        };
        let picture = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([0, 1, 2].map(|c| value(x, y, c))));
        picture.write_with_encoder(JpegEncoder::new_with_quality(std::fs::File::create(&path)?, 90))?;
        files.push(path);
    }
    Ok(())
}

fn source(url: &str, view: ViewFn, prefetch_bytes: usize) -> Result<Source> {
    let set = Arc::new(Mix::one(DataSet::open(url)?));
    let (shape, limits) = (GRID.pixels(), Limits::default());
    let medium = Medium::Picture;
    Ok(Source {
        set,
        cache: None,
        captions: None,
        medium,
        view,
        shape,
        stills: Vec::new(),
        limits,
        seed: 3,
        threads: 2,
        prefetch_bytes,
        max_bad_share: 0.0,
    })
}

/// Requests for memory a step, by the whole process, in steps of 32 samples and of 256, once a few have gone by.
fn rows(url: &str) -> Result<String> {
    // No view of ours: what a view needs of its own is not the feed's.
    let view: ViewFn = Arc::new(|sample: Sample, _, _, _, out: &mut [u8]| {
        let Sample::Picture(picture) = sample else { panic!("a picture") };
        out.copy_from_slice(&picture.whole()?.pixels[..out.len()]);
        Ok(64)
    });
    let each = |batch: u64| {
        let source = source(url, view.clone(), 2 << 20)?;
        let order = Order::mixed(&source.set.sizes(), 3, 4);
        let mut feed = Feed::train(source, order, batch, 0, 1, 0..1000)?;
        let mut take = |samples: u64| (0..samples / batch).try_for_each(|_| feed.next().expect("a step").map(drop));
        take(2048)?;
        let before = heap::calls();
        take(8192)?;
        Ok::<_, Fault>((heap::calls() - before) as f64 / (8192 / batch) as f64)
    };
    Ok(format!("{:.3} {:.3}", each(32)?, each(256)?))
}

fn a_sample_needs_no_new_memory() -> Outcome {
    let folder = tempfile::tempdir()?;
    noise(&folder.path().join("in"), 2048, 80)?;
    let out = text(&folder.path().join("out"));
    pack(&text(&folder.path().join("in")), &out, &Options { samples_per_shard: 256, ..Options::default() })?;
    let told = run("steady-rows", &out)?;
    let steps: Vec<f64> = told.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?;
    let each = (steps[1] - steps[0]) / (256.0 - 32.0);
    println!("{:.1} requests for memory a step, and {each:.3} a sample", steps[0] - 32.0 * each);
    // A row passes two channels, which ask for a block every 31 rows, and a step's lists double as they grow; one request
    // a row would be 1.
    assert!(each < 0.125, "{each} requests for memory a sample");
    assert!(steps[0] < 40.0, "{} requests for memory a step of 32", steps[0]);
    Ok(())
}

/// The most memory that `work` needed beyond what the process had, in bytes.
fn peak(work: impl FnOnce() -> Result<()>) -> Result<String> {
    // A 5 forgets the peak so far: libtorch's own pages are most of it.
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak forgotten");
    let before = status("VmRSS:");
    work()?;
    Ok(status("VmHWM:").saturating_sub(before).to_string())
}

/// A line of /proc/self/status, in bytes.
fn status(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find(|line| line.starts_with(what)).expect("a line");
    line.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).expect("a number") * 1024
}

const ROOM: usize = 16 << 20;

fn feed(url: &str) -> Result<()> {
    let view: ViewFn =
        Arc::new(|picture, id, epoch, _, out| View::default().train(&GRID, picture, 3, id, epoch, 0, out));
    let source = source(url, view, ROOM)?;
    let order = Order::mixed(&source.set.sizes(), 3, 4);
    Feed::train(source, order, 16, 0, 1, 0..24)?.try_for_each(|rows| rows.map(drop))
}

fn large_samples_from_a_store_keep_to_the_bytes_asked_for() -> Outcome {
    let folder = tempfile::tempdir()?;
    noise(&folder.path().join("in"), 48, 1400)?;
    let out = folder.path().join("out");
    pack(&text(&folder.path().join("in")), &text(&out), &Options { samples_per_shard: 12, ..Options::default() })?;
    let server = Server::start();
    server.upload(&out, "b/shards")?;
    let all: u64 =
        std::fs::read_dir(&out)?.map(|file| file.map_or(0, |file| file.metadata().map_or(0, |m| m.len()))).sum();
    let most = run("steady-feed", &server.http("b/shards"))?.trim().parse::<u64>()?;
    println!("{} MiB at most, {} MiB in the store, eight times read", most >> 20, all >> 20);
    let bound = 2 * ROOM as u64 + BESIDE;
    assert!(8 * all > 4 * bound, "{all} bytes prove nothing");
    assert!(most < bound, "{most} bytes at most, {bound} are allowed");
    Ok(())
}

fn packing_holds_a_few_pictures_at_a_time() -> Outcome {
    let folder = tempfile::tempdir()?;
    let place = folder.path().join("in");
    noise(&place, 2000, 224)?;
    let most = run("steady-pack", &text(&place))?.trim().parse::<u64>()?;
    let tar = std::fs::metadata(folder.path().join("in-packed/in-packed-000000.tar"))?.len();
    println!("{} MiB at most for a tar of {} MiB", most >> 20, tar >> 20);
    // Lists of 2,000 pictures, five pictures for each thread, the writer's 1 MiB.
    let bound = 24 << 20;
    assert!(tar > 3 * bound, "{tar} bytes prove nothing");
    assert!(most < bound, "{most} bytes at most");
    Ok(())
}
