//! Tests of the output of a run: event files, the log, image grids.

use crate::support::{Outcome, oracle};
use occlude::error::ExitCode;
use occlude::log::image_grid;
use occlude::log::image_grid::Tile;
use occlude::log::tensorboard::EventWriter;
use occlude::log::{MetricsLine, RunLog, SpeedWindow, format_progress};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

crate::trials![
    tensorboard_reads_our_events,
    tensorboard_drops_points_after_the_resumed_step,
    a_later_event_file_sorts_after_an_earlier_one,
    a_line_keeps_its_key_order_and_accepts_nan,
    resuming_drops_later_and_partial_lines,
    a_run_with_metrics_is_not_overwritten,
    a_full_disk_is_a_disk_error,
    plain_progress_prints_only_the_first_and_last_line,
    the_window_gives_speed_and_eta,
    a_grid_scales_small_tiles_by_whole_factors,
    a_heading_is_legible_and_widens_its_column,
    an_image_is_written_to_disk_and_tensorboard,
];

/// Step `step` of a made-up run: 32 samples per step of half a second, 320 samples in the set.
pub fn made_up_line(step: u64) -> MetricsLine {
    MetricsLine {
        step,
        epoch: step as f64 * 0.1,
        samples: step * 32,
        loss: 1.0 / step as f64,
        terms: vec![("pixel".into(), 0.75 / step as f64), ("latent".into(), 0.25 / step as f64)],
        lr: 1e-3,
        weight_decay: Some(0.05),
        grad_norm: 2.0,
        samples_per_s: 64.0,
        data_wait: 0.01,
        comm_wait: 0.02,
        mfu: None,
        seconds: 0.5,
    }
}

fn read_events(dir: &Path) -> Result<Value, libtest_mimic::Failed> {
    Ok(serde_json::from_str(&oracle("events.py", &[&dir.display().to_string()])?)?)
}

fn tensorboard_reads_our_events() -> Outcome {
    let dir = tempfile::tempdir()?;
    let image = image_grid::compose(&["original"], &[vec![Tile::from_gray(28, 28, &[200; 784])]]);
    let mut events = EventWriter::create(dir.path())?;
    events.write_scalar(1, "train/loss", 0.5)?;
    // More than 127 and more than 2^32: varints of several bytes.
    events.write_scalar(300, "train/loss", -0.25)?;
    events.write_scalar(5_000_000_000, "train/loss", f32::NAN)?;
    events.write_image(300, "reconstruction", &image_grid::encode_png(&image), image.width(), image.height(), 3)?;
    events.flush()?;
    let visible = read_events(dir.path())?;
    assert_eq!(visible["file_version"], 2.0);
    let loss = visible["scalars"]["train/loss"].as_array().expect("the curve");
    assert_eq!(loss[..2], [json!([1, 0.5]), json!([300, -0.25])]);
    assert_eq!(loss[2], json!([5_000_000_000u64, null]), "NaN stays a point");
    let (width, height) = image.dimensions();
    let image = json!([[300, width, height, [width, height], "RGB"]]);
    assert_eq!(visible["images"]["reconstruction"], image);
    assert_eq!(visible["modern"], json!({"train/loss": "scalars", "reconstruction": "images"}));
    Ok(())
}

fn tensorboard_drops_points_after_the_resumed_step() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mut log = RunLog::create(dir.path(), 10, 60.0)?.with_output(std::io::sink(), 60.0);
    (1..=6).try_for_each(|step| log.record_step(&made_up_line(step)))?;
    drop(log);
    let mut log = RunLog::resume(dir.path(), 4, 10, 60.0)?.with_output(std::io::sink(), 60.0);
    log.record_step(&MetricsLine { loss: 9.0, ..made_up_line(5) })?;
    drop(log);
    let visible = read_events(&dir.path().join("tensorboard"))?;
    let points = visible["scalars"]["train/loss"].as_array().expect("the curve");
    let points: Vec<_> = points.iter().map(|point| (point[0].as_u64().unwrap(), point[1].as_f64().unwrap())).collect();
    assert_eq!(points.len(), 5, "{points:?}");
    assert_eq!(points[3], (4, 0.25));
    assert_eq!(points[4], (5, 9.0), "the old points 5 and 6 are gone");
    Ok(())
}

fn a_later_event_file_sorts_after_an_earlier_one() -> Outcome {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("events.out.tfevents.9000000000.zebra.9.0"), "")?;
    let names: Vec<_> = (0..3)
        .map(|_| EventWriter::create(dir.path()).map(|events| events.path().file_name().unwrap().to_owned()))
        .collect::<Result<_, _>>()?;
    assert!(names.is_sorted(), "{names:?}");
    assert!(names[0].to_string_lossy().starts_with("events.out.tfevents.9000000001."), "{names:?}");
    Ok(())
}

fn a_line_keeps_its_key_order_and_accepts_nan() -> Outcome {
    let bad = MetricsLine { loss: f64::NAN, grad_norm: f64::INFINITY, mfu: Some(f64::NAN), ..made_up_line(3) };
    let text = serde_json::to_string(&bad)?;
    let value: Value = serde_json::from_str(&text)?;
    let keys: Vec<_> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    let expected =
        "step epoch samples loss terms lr weight_decay grad_norm samples_per_s data_wait comm_wait mfu seconds";
    assert_eq!(keys.join(" "), expected);
    assert_eq!(value["terms"].as_object().expect("terms").keys().collect::<Vec<_>>(), ["pixel", "latent"]);
    assert!(value["loss"].is_null() && value["grad_norm"].is_null() && value["mfu"].is_null());
    let back: MetricsLine = serde_json::from_str(&text)?;
    assert!(back.loss.is_nan() && back.mfu.is_none());
    let bare = serde_json::to_string(&MetricsLine { weight_decay: None, ..made_up_line(3) })?;
    assert!(!bare.contains("weight_decay") && bare.contains("\"mfu\":null"), "{bare}");
    assert_eq!(serde_json::from_str::<MetricsLine>(&serde_json::to_string(&made_up_line(7))?)?, made_up_line(7));
    Ok(())
}

fn resuming_drops_later_and_partial_lines() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("metrics.jsonl");
    let mut log = RunLog::create(dir.path(), 10, 60.0)?.with_output(std::io::sink(), 60.0);
    (1..=3).try_for_each(|step| log.record_step(&made_up_line(step)))?;
    drop(log);
    let full = std::fs::read_to_string(&path)?;
    std::fs::OpenOptions::new().append(true).open(&path)?.write_all(b"{\"step\":4,\"epoch\":0.")?;
    drop(RunLog::resume(dir.path(), 3, 10, 60.0)?);
    assert_eq!(std::fs::read_to_string(&path)?, full, "only the partial line is dropped");
    let mut log = RunLog::resume(dir.path(), 2, 10, 60.0)?.with_output(std::io::sink(), 60.0);
    log.record_step(&made_up_line(3))?;
    drop(log);
    assert_eq!(std::fs::read_to_string(&path)?, full, "step 3 dropped and written again");
    drop(RunLog::resume(dir.path(), 0, 10, 60.0)?);
    assert_eq!(std::fs::read_to_string(&path)?, "");
    let files: Vec<_> = std::fs::read_dir(dir.path())?.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 2, "metrics.jsonl and tensorboard, nothing half-written: {files:?}");
    Ok(())
}

fn a_run_with_metrics_is_not_overwritten() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mut log = RunLog::create(dir.path(), 10, 60.0)?.with_output(std::io::sink(), 60.0);
    log.record_step(&made_up_line(1))?;
    let error = RunLog::create(dir.path(), 10, 60.0).err().expect("a refusal");
    assert_eq!(error.code, ExitCode::Usage);
    Ok(())
}

fn a_full_disk_is_a_disk_error() -> Outcome {
    let dir = tempfile::tempdir()?;
    std::os::unix::fs::symlink("/dev/full", dir.path().join("metrics.jsonl"))?;
    let mut log = RunLog::create(dir.path(), 10, 60.0)?.with_output(std::io::sink(), 60.0);
    let error = log.record_step(&made_up_line(1)).expect_err("no space is left");
    assert_eq!(error.code, ExitCode::Disk, "{error}");
    assert!(error.message.contains("metrics.jsonl"), "{error}");
    std::fs::write(dir.path().join("file"), "")?;
    assert_eq!(
        RunLog::create(&dir.path().join("file"), 10, 60.0).err().expect("a file is not a folder").code,
        ExitCode::Disk
    );
    Ok(())
}

/// A writer that keeps its bytes for the test.
#[derive(Clone, Default)]
struct SharedBuffer(Arc<Mutex<Vec<u8>>>);

impl Write for SharedBuffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn plain_progress_prints_only_the_first_and_last_line() -> Outcome {
    let dir = tempfile::tempdir()?;
    let kept = SharedBuffer::default();
    let mut log = RunLog::create(dir.path(), 400, 3600.0)?.with_output(kept.clone(), 3600.0);
    (1..=400).try_for_each(|step| log.record_step(&made_up_line(step)))?;
    let text = String::from_utf8(kept.0.lock().unwrap().clone())?;
    let visible: Vec<_> = text.lines().collect();
    assert_eq!(visible.len(), 2, "the first and the last: {text}");
    assert_eq!(
        visible[0], "step 1/400  epoch 0.10  loss 1.0000  lr 1.0e-3  64 samples/s  data wait 1 %  eta 3:20",
        "speed from the step itself while there is no window"
    );
    assert!(visible[1].starts_with("step 400/400  "), "{text}");
    Ok(())
}

fn the_window_gives_speed_and_eta() -> Outcome {
    let start = Instant::now();
    let mut window = SpeedWindow::default();
    // A slow start must leave the window: 100 steps of 10 s, then 70 of 2 s.
    let mut at = start;
    for step in 1..=170 {
        at += Duration::from_secs(if step <= 100 { 10 } else { 2 });
        window.push(at, &made_up_line(step));
    }
    assert!((window.samples_per_s() - 16.0).abs() < 1e-9, "{}", window.samples_per_s());
    assert!((window.remaining_seconds(200) - 60.0).abs() < 1e-9, "{}", window.remaining_seconds(200));
    let text = format_progress(&made_up_line(120), 400, 9.25, 200_000.0);
    assert!(text.ends_with("9.2 samples/s  data wait 1 %  eta 2 d 7:33"), "{text}");
    assert!(format_progress(&made_up_line(1), 4, f64::NAN, f64::NAN).ends_with("eta unknown"));
    Ok(())
}

fn a_grid_scales_small_tiles_by_whole_factors() -> Outcome {
    let digit: Vec<u8> = (0..784u32).map(|pixel| (pixel % 251) as u8).collect();
    let rows = vec![vec![Tile::from_gray(28, 28, &digit); 3]; 2];
    let sheet = image_grid::compose(&["masked", "rebuilt", "original"], &rows);
    // 28 -> 112 at factor 4, gaps of 6, a heading of 7 + 12.
    assert_eq!(sheet.dimensions(), (6 + 3 * 118, 19 + 2 * 118));
    for (x, y) in [(0, 0), (3, 3), (5, 9), (111, 111)] {
        let value = digit[(y / 4 * 28 + x / 4) as usize];
        assert_eq!(sheet.get_pixel(6 + 118 + x, 19 + 118 + y).0, [value; 3], "pixel {x}, {y} of row 2, column 2");
    }
    let large = image_grid::compose(&[], &[vec![Tile::from_rgb(224, 224, vec![9; 224 * 224 * 3])]]);
    assert_eq!(large.dimensions(), (236, 236), "a large tile is unchanged, and an empty heading takes no space");
    assert_eq!(image_grid::compose(&[], &[]).dimensions(), (6, 6));
    Ok(())
}

fn a_heading_is_legible_and_widens_its_column() -> Outcome {
    let tile = vec![vec![Tile::from_gray(96, 96, &[255; 96 * 96])]];
    let dark = |text: &str| image_grid::compose(&[text], &tile).pixels().filter(|pixel| pixel.0 != [255; 3]).count();
    assert_eq!(dark("I"), 11, "a stem of five and two bars of three");
    assert_eq!(dark("\u{3b1}"), 20, "an unknown letter is a box");
    assert_eq!(dark(" "), 0);
    let letters: Vec<String> = (33u8..127).map(|code| (code as char).to_string()).collect();
    let known = letters.iter().filter(|letter| letter.chars().all(|letter| letter.is_ascii_alphanumeric()));
    let shapes: Vec<_> = known.map(|letter| image_grid::compose(&[letter], &tile).into_raw()).collect();
    for (at, shape) in shapes.iter().enumerate() {
        assert!(!shapes[..at].contains(shape), "two letters look alike");
    }
    let wide = image_grid::compose(&["reconstructed in thirty letters"], &tile);
    assert_eq!(wide.width(), 6 + (31 * 6 - 1) + 6);
    Ok(())
}

fn an_image_is_written_to_disk_and_tensorboard() -> Outcome {
    let dir = tempfile::tempdir()?;
    let sheet = image_grid::compose(&["masked"], &[vec![Tile::from_gray(28, 28, &[7; 784])]]);
    let mut log = RunLog::create(dir.path(), 10, 60.0)?;
    log.save_image(40, "reconstruction", &sheet)?;
    drop(log);
    let back = image::open(dir.path().join("pictures/step-00000040-reconstruction.png"))?.to_rgb8();
    assert!(back == sheet);
    let visible = read_events(&dir.path().join("tensorboard"))?;
    assert_eq!(visible["images"]["reconstruction"][0][0], 40);
    image_grid::save_png(&sheet, &dir.path().join("alone.png"))?;
    assert_eq!(image_grid::save_png(&sheet, &dir.path().join("no/such/folder.png")).unwrap_err().code, ExitCode::Disk);
    Ok(())
}
