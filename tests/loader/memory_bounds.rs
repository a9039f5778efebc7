//! Tests of long loading and packing: allocations per sample and peak memory. Every case runs in its own process, so
//! that only its memory counts.

use crate::support::allocations;
use crate::support::object_store::Server;
use crate::support::{Outcome, path_text};
use image::codecs::jpeg::JpegEncoder;
use libtest_mimic::Failed;
use occlude::data::decode::ImageLimits;
use occlude::data::mixture::Mixture;
use occlude::data::modality::{Modality, Sample};
use occlude::data::order::SampleOrder;
use occlude::data::pack::{PackOptions, pack};
use occlude::data::set::DataSet;
use occlude::error::{Error, Result};
use occlude::grid::Grid;
use occlude::loader::{DataLoader, Labels, LoaderOptions, ViewFn};
use occlude::view::{View, ViewKey};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

crate::trials![
    a_sample_needs_no_new_allocation,
    large_samples_from_a_store_stay_within_the_memory_limit,
    packing_holds_a_few_images_at_a_time,
];

const GRID: Grid = Grid { frames: 1, rows: 4, cols: 4, channels: 3, patch_frames: 1, patch: 16 };

/// Memory that two workers keep for images of 1,400 × 1,400 pixels (an image as stored and upright: 12 MiB), buffers of
/// 64 connections, stacks, and what the allocator does not return.
const OVERHEAD_BYTES: u64 = 96 << 20;

/// Runs a case in its own process; the result goes to standard output.
pub fn case(name: &str) -> i32 {
    let folder = std::env::var("OCCLUDE_PLACE").expect("a place");
    let result = match name {
        "steady-rows" => count_allocations(&folder),
        "steady-feed" => peak_memory(|| feed(&folder)),
        _ => peak_memory(|| pack(&folder, &format!("{folder}-packed"), &PackOptions::default()).map(drop)),
    };
    match result {
        Ok(found) => {
            println!("{found}");
            0
        }
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

fn run(case: &str, folder: &str) -> std::result::Result<String, Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    let output = command.env("OCCLUDE_CASE", case).env("OCCLUDE_PLACE", folder).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

/// Writes `count` images of noise, which JPEG cannot compress well, with `side` pixels a side, in two classes; four
/// files under many names.
fn write_noise(folder: &Path, count: usize, side: u32) -> Outcome {
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
        let image = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([0, 1, 2].map(|c| value(x, y, c))));
        image.write_with_encoder(JpegEncoder::new_with_quality(std::fs::File::create(&path)?, 90))?;
        files.push(path);
    }
    Ok(())
}

fn source(url: &str, view: ViewFn, prefetch_bytes: usize) -> Result<LoaderOptions> {
    let set = Arc::new(Mixture::from_set(DataSet::open(url)?));
    let shape = GRID.pixel_shape();
    let limits = ImageLimits::default();
    let medium = Modality::Image;
    Ok(LoaderOptions {
        labels: Labels::Required,
        mixture: set,
        cache: None,
        tokenizer: None,
        modality: medium,
        view,
        shape,
        single_frame_sets: Vec::new(),
        limits,
        seed: 3,
        threads: 2,
        prefetch_bytes,
        max_corrupt_fraction: 0.0,
    })
}

/// Prints allocations per sample of the whole process, in steps of 32 and of 256 samples, after a few warm-up steps.
fn count_allocations(url: &str) -> Result<String> {
    // A view of the test, so that allocations of views do not count.
    let view: ViewFn = Arc::new(|sample: Sample, _, _, _, out: &mut [u8]| {
        let Sample::Image(image) = sample else { panic!("a picture") };
        out.copy_from_slice(&image.decode_full()?.pixels[..out.len()]);
        Ok(64)
    });
    let each = |batch: u64| {
        let source = source(url, view.clone(), 2 << 20)?;
        let order = SampleOrder::with_sources(&source.mixture.weighted_sizes(), 3, 4);
        let mut feed = DataLoader::for_training(source, order, batch, 0, 1, 0..1000)?;
        let mut take = |samples: u64| (0..samples / batch).try_for_each(|_| feed.next().expect("a step").map(drop));
        take(2048)?;
        let before = allocations::allocation_count();
        take(8192)?;
        Ok::<_, Error>((allocations::allocation_count() - before) as f64 / (8192 / batch) as f64)
    };
    Ok(format!("{:.3} {:.3}", each(32)?, each(256)?))
}

fn a_sample_needs_no_new_allocation() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_noise(&folder.path().join("in"), 2048, 80)?;
    let out = path_text(folder.path().join("out"));
    pack(
        &path_text(folder.path().join("in")),
        &out,
        &PackOptions { samples_per_shard: 256, ..PackOptions::default() },
    )?;
    let output = run("steady-rows", &out)?;
    let steps: Vec<f64> = output.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?;
    let each = (steps[1] - steps[0]) / (256.0 - 32.0);
    println!("{:.1} requests for memory a step, and {each:.3} a sample", steps[0] - 32.0 * each);
    // A row passes two channels, which allocate a block every 31 rows, and the lists of a step double as they grow; one
    // allocation per row would be 1.
    assert!(each < 0.125, "{each} allocations per sample");
    assert!(steps[0] < 40.0, "{} allocations per step of 32", steps[0]);
    Ok(())
}

/// Prints the peak memory of `work` beyond what the process had before, in bytes.
fn peak_memory(work: impl FnOnce() -> Result<()>) -> Result<String> {
    // Writing 5 resets the peak; most of it are the pages of libtorch.
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak is reset");
    let before = status("VmRSS:");
    work()?;
    Ok(status("VmHWM:").saturating_sub(before).to_string())
}

/// Returns a value of /proc/self/status, in bytes.
fn status(label: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find(|line| line.starts_with(label)).expect("a line");
    line.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).expect("a number") * 1024
}

const ROOM: usize = 16 << 20;

fn feed(url: &str) -> Result<()> {
    let view: ViewFn = Arc::new(|image, id, epoch, _, out| {
        View::default().train_view(&GRID, image, ViewKey { seed: 3, id, epoch }, 0, out)
    });
    let source = source(url, view, ROOM)?;
    let order = SampleOrder::with_sources(&source.mixture.weighted_sizes(), 3, 4);
    DataLoader::for_training(source, order, 16, 0, 1, 0..24)?.try_for_each(|rows| rows.map(drop))
}

fn large_samples_from_a_store_stay_within_the_memory_limit() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_noise(&folder.path().join("in"), 48, 1400)?;
    let out = folder.path().join("out");
    pack(
        &path_text(folder.path().join("in")),
        &path_text(&out),
        &PackOptions { samples_per_shard: 12, ..PackOptions::default() },
    )?;
    let server = Server::start();
    server.upload(&out, "b/shards")?;
    let all: u64 =
        std::fs::read_dir(&out)?.map(|file| file.map_or(0, |file| file.metadata().map_or(0, |m| m.len()))).sum();
    let max = run("steady-feed", &server.http("b/shards"))?.trim().parse::<u64>()?;
    println!("{} MiB at most, {} MiB in the store, eight times read", max >> 20, all >> 20);
    let bound = 2 * ROOM as u64 + OVERHEAD_BYTES;
    assert!(8 * all > 4 * bound, "{all} bytes are too few for this test");
    assert!(max < bound, "peak of {max} bytes, {bound} are allowed");
    Ok(())
}

fn packing_holds_a_few_images_at_a_time() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("in");
    write_noise(&path, 2000, 224)?;
    let max = run("steady-pack", &path_text(&path))?.trim().parse::<u64>()?;
    let tar = std::fs::metadata(folder.path().join("in-packed/in-packed-000000.tar"))?.len();
    println!("{} MiB at most for a tar of {} MiB", max >> 20, tar >> 20);
    // Lists of 2,000 images, five images per thread, 1 MiB of the writer.
    let bound = 24 << 20;
    assert!(tar > 3 * bound, "{tar} bytes are too few for this test");
    assert!(max < bound, "peak of {max} bytes");
    Ok(())
}
