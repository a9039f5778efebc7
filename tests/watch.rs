//! What a run shows: event files, the log, picture grids, the doctor.

use crate::support::{Outcome, oracle};
use occlude::fault::Code;
use occlude::run::doctor::{self, Check, State};
use occlude::run::events::Events;
use occlude::run::log::{Line, Log, Window, progress_text};
use occlude::run::picture::{self, Tile};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

crate::trials![
    tensorboard_reads_our_events,
    tensorboard_forgets_the_points_after_a_resume,
    a_later_event_file_sorts_after_an_earlier_one,
    a_line_has_its_keys_in_order_and_survives_nan,
    resume_drops_later_lines_and_a_torn_one,
    a_run_with_metrics_is_not_overwritten,
    a_full_disk_is_a_disk_fault,
    plain_progress_shows_the_first_line_then_keeps_quiet,
    the_window_tells_speed_and_eta,
    a_grid_scales_small_tiles_by_whole_factors,
    a_heading_is_legible_and_widens_its_column,
    a_picture_reaches_disk_and_tensorboard,
    the_doctor_looks_at_everything,
    the_doctor_names_credentials_and_keeps_their_values,
];

/// Step `step` of a made-up run: 32 samples a step of half a second, 320 samples in the set.
pub fn line(step: u64) -> Line {
    Line {
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
    let picture = picture::grid(&["original"], &[vec![Tile::grey(28, 28, &[200; 784])]]);
    let mut events = Events::create(dir.path())?;
    events.scalar(1, "train/loss", 0.5)?;
    // More than 127 and more than 2^32: varints of several bytes.
    events.scalar(300, "train/loss", -0.25)?;
    events.scalar(5_000_000_000, "train/loss", f32::NAN)?;
    events.image(300, "reconstruction", &picture::png(&picture), picture.width(), picture.height(), 3)?;
    events.flush()?;
    let seen = read_events(dir.path())?;
    assert_eq!(seen["file_version"], 2.0);
    let loss = seen["scalars"]["train/loss"].as_array().expect("the curve");
    assert_eq!(loss[..2], [json!([1, 0.5]), json!([300, -0.25])]);
    assert_eq!(loss[2], json!([5_000_000_000u64, null]), "NaN stays a point");
    let (width, height) = picture.dimensions();
    let picture = json!([[300, width, height, [width, height], "RGB"]]);
    assert_eq!(seen["images"]["reconstruction"], picture);
    assert_eq!(seen["modern"], json!({"train/loss": "scalars", "reconstruction": "images"}));
    Ok(())
}

fn tensorboard_forgets_the_points_after_a_resume() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mut log = Log::create(dir.path(), 10, 60.0)?.tell(std::io::sink(), 60.0);
    (1..=6).try_for_each(|step| log.step(&line(step)))?;
    drop(log);
    let mut log = Log::resume(dir.path(), 4, 10, 60.0)?.tell(std::io::sink(), 60.0);
    log.step(&Line { loss: 9.0, ..line(5) })?;
    drop(log);
    let seen = read_events(&dir.path().join("tensorboard"))?;
    let points = seen["scalars"]["train/loss"].as_array().expect("the curve");
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
        .map(|_| Events::create(dir.path()).map(|events| events.path().file_name().unwrap().to_owned()))
        .collect::<Result<_, _>>()?;
    assert!(names.is_sorted(), "{names:?}");
    assert!(names[0].to_string_lossy().starts_with("events.out.tfevents.9000000001."), "{names:?}");
    Ok(())
}

fn a_line_has_its_keys_in_order_and_survives_nan() -> Outcome {
    let bad = Line { loss: f64::NAN, grad_norm: f64::INFINITY, mfu: Some(f64::NAN), ..line(3) };
    let text = serde_json::to_string(&bad)?;
    let value: Value = serde_json::from_str(&text)?;
    let keys: Vec<_> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    let wanted =
        "step epoch samples loss terms lr weight_decay grad_norm samples_per_s data_wait comm_wait mfu seconds";
    assert_eq!(keys.join(" "), wanted);
    assert_eq!(value["terms"].as_object().expect("terms").keys().collect::<Vec<_>>(), ["pixel", "latent"]);
    assert!(value["loss"].is_null() && value["grad_norm"].is_null() && value["mfu"].is_null());
    let back: Line = serde_json::from_str(&text)?;
    assert!(back.loss.is_nan() && back.mfu.is_none());
    let bare = serde_json::to_string(&Line { weight_decay: None, ..line(3) })?;
    assert!(!bare.contains("weight_decay") && bare.contains("\"mfu\":null"), "{bare}");
    assert_eq!(serde_json::from_str::<Line>(&serde_json::to_string(&line(7))?)?, line(7));
    Ok(())
}

fn resume_drops_later_lines_and_a_torn_one() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("metrics.jsonl");
    let mut log = Log::create(dir.path(), 10, 60.0)?.tell(std::io::sink(), 60.0);
    (1..=3).try_for_each(|step| log.step(&line(step)))?;
    drop(log);
    let whole = std::fs::read_to_string(&path)?;
    std::fs::OpenOptions::new().append(true).open(&path)?.write_all(b"{\"step\":4,\"epoch\":0.")?;
    drop(Log::resume(dir.path(), 3, 10, 60.0)?);
    assert_eq!(std::fs::read_to_string(&path)?, whole, "a torn line alone is dropped");
    let mut log = Log::resume(dir.path(), 2, 10, 60.0)?.tell(std::io::sink(), 60.0);
    log.step(&line(3))?;
    drop(log);
    assert_eq!(std::fs::read_to_string(&path)?, whole, "step 3 dropped and written again");
    drop(Log::resume(dir.path(), 0, 10, 60.0)?);
    assert_eq!(std::fs::read_to_string(&path)?, "");
    let files: Vec<_> = std::fs::read_dir(dir.path())?.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 2, "metrics.jsonl and tensorboard, nothing half-written: {files:?}");
    Ok(())
}

fn a_run_with_metrics_is_not_overwritten() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mut log = Log::create(dir.path(), 10, 60.0)?.tell(std::io::sink(), 60.0);
    log.step(&line(1))?;
    let fault = Log::create(dir.path(), 10, 60.0).err().expect("a refusal");
    assert_eq!(fault.code, Code::Usage);
    Ok(())
}

fn a_full_disk_is_a_disk_fault() -> Outcome {
    let dir = tempfile::tempdir()?;
    std::os::unix::fs::symlink("/dev/full", dir.path().join("metrics.jsonl"))?;
    let mut log = Log::create(dir.path(), 10, 60.0)?.tell(std::io::sink(), 60.0);
    let fault = log.step(&line(1)).expect_err("no space is left");
    assert_eq!(fault.code, Code::Disk, "{fault}");
    assert!(fault.message.contains("metrics.jsonl"), "{fault}");
    std::fs::write(dir.path().join("file"), "")?;
    assert_eq!(Log::create(&dir.path().join("file"), 10, 60.0).err().expect("a file is no folder").code, Code::Disk);
    Ok(())
}

/// A writer whose bytes the test keeps.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn plain_progress_shows_the_first_line_then_keeps_quiet() -> Outcome {
    let dir = tempfile::tempdir()?;
    let kept = Kept::default();
    let mut log = Log::create(dir.path(), 400, 3600.0)?.tell(kept.clone(), 3600.0);
    (1..=400).try_for_each(|step| log.step(&line(step)))?;
    let text = String::from_utf8(kept.0.lock().unwrap().clone())?;
    let shown: Vec<_> = text.lines().collect();
    assert_eq!(shown.len(), 2, "the first and the last: {text}");
    assert_eq!(
        shown[0], "step 1/400  epoch 0.10  loss 1.0000  lr 1.0e-3  64 samples/s  data wait 1 %  eta 3:20",
        "speed from the step itself while there is no window"
    );
    assert!(shown[1].starts_with("step 400/400  "), "{text}");
    Ok(())
}

fn the_window_tells_speed_and_eta() -> Outcome {
    let start = Instant::now();
    let mut window = Window::default();
    // A slow start must leave the window: 100 steps of 10 s, then 70 of 2 s.
    let mut at = start;
    for step in 1..=170 {
        at += Duration::from_secs(if step <= 100 { 10 } else { 2 });
        window.push(at, &line(step));
    }
    assert!((window.samples_per_s() - 16.0).abs() < 1e-9, "{}", window.samples_per_s());
    assert!((window.eta(200) - 60.0).abs() < 1e-9, "{}", window.eta(200));
    let text = progress_text(&line(120), 400, 9.25, 200_000.0);
    assert!(text.ends_with("9.2 samples/s  data wait 1 %  eta 2 d 7:33"), "{text}");
    assert!(progress_text(&line(1), 4, f64::NAN, f64::NAN).ends_with("eta unknown"));
    Ok(())
}

fn a_grid_scales_small_tiles_by_whole_factors() -> Outcome {
    let digit: Vec<u8> = (0..784u32).map(|pixel| (pixel % 251) as u8).collect();
    let rows = vec![vec![Tile::grey(28, 28, &digit); 3]; 2];
    let sheet = picture::grid(&["masked", "rebuilt", "original"], &rows);
    // 28 -> 112 at factor 4, gaps of 6, a heading of 7 + 12.
    assert_eq!(sheet.dimensions(), (6 + 3 * 118, 19 + 2 * 118));
    for (x, y) in [(0, 0), (3, 3), (5, 9), (111, 111)] {
        let value = digit[(y / 4 * 28 + x / 4) as usize];
        assert_eq!(sheet.get_pixel(6 + 118 + x, 19 + 118 + y).0, [value; 3], "pixel {x}, {y} of row 2, column 2");
    }
    let large = picture::grid(&[], &[vec![Tile::rgb(224, 224, vec![9; 224 * 224 * 3])]]);
    assert_eq!(large.dimensions(), (236, 236), "a large tile stays as it is, and no heading takes no room");
    assert_eq!(picture::grid(&[], &[]).dimensions(), (6, 6));
    Ok(())
}

fn a_heading_is_legible_and_widens_its_column() -> Outcome {
    let tile = vec![vec![Tile::grey(96, 96, &[255; 96 * 96])]];
    let dark = |text: &str| picture::grid(&[text], &tile).pixels().filter(|pixel| pixel.0 != [255; 3]).count();
    assert_eq!(dark("I"), 11, "a stem of five and two bars of three");
    assert_eq!(dark("\u{3b1}"), 20, "an unknown letter is a box");
    assert_eq!(dark(" "), 0);
    let letters: Vec<String> = (33u8..127).map(|code| (code as char).to_string()).collect();
    let known = letters.iter().filter(|letter| letter.chars().all(|letter| letter.is_ascii_alphanumeric()));
    let shapes: Vec<_> = known.map(|letter| picture::grid(&[letter], &tile).into_raw()).collect();
    for (at, shape) in shapes.iter().enumerate() {
        assert!(!shapes[..at].contains(shape), "two letters look alike");
    }
    let wide = picture::grid(&["reconstructed in thirty letters"], &tile);
    assert_eq!(wide.width(), 6 + (31 * 6 - 1) + 6);
    Ok(())
}

fn a_picture_reaches_disk_and_tensorboard() -> Outcome {
    let dir = tempfile::tempdir()?;
    let sheet = picture::grid(&["masked"], &[vec![Tile::grey(28, 28, &[7; 784])]]);
    let mut log = Log::create(dir.path(), 10, 60.0)?;
    log.picture(40, "reconstruction", &sheet)?;
    drop(log);
    let back = image::open(dir.path().join("pictures/step-00000040-reconstruction.png"))?.to_rgb8();
    assert!(back == sheet);
    let seen = read_events(&dir.path().join("tensorboard"))?;
    assert_eq!(seen["images"]["reconstruction"][0][0], 40);
    picture::save_png(&sheet, &dir.path().join("alone.png"))?;
    assert_eq!(picture::save_png(&sheet, &dir.path().join("no/such/folder.png")).unwrap_err().code, Code::Disk);
    Ok(())
}

/// Set in the child that shows the doctor's table to the test below.
const CHILD: &str = "OCCLUDE_TEST_DOCTOR_CHILD";

fn the_doctor_looks_at_everything() -> Outcome {
    let checks = doctor::checks();
    if std::env::var_os(CHILD).is_some() {
        println!("{}", doctor::table(&checks));
        return Ok(());
    }
    let of =
        |what: &str| checks.iter().find(|check| check.what == what).unwrap_or_else(|| panic!("no line for {what}"));
    assert!(of("libtorch").detail.starts_with("2.11.0"), "{:?}", of("libtorch"));
    assert!(of("MPI library").detail.contains("Open MPI v5"), "{:?}", of("MPI library"));
    assert_eq!(of("mpirun").state, State::Ok);
    assert!(of("NVRTC").detail.contains("libnvrtc.so"), "{:?}", of("NVRTC"));
    assert!(of("NCCL").detail.contains("libnccl.so"), "{:?}", of("NCCL"));
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    assert_eq!(of("NVIDIA driver").state == State::Absent, !driver);
    for what in [
        "libtorch, CUDA half",
        "bridge, CUDA half",
        "FFmpeg",
        "store credentials",
        "cores",
        "open files",
        "other limits",
        "memory",
    ] {
        assert!(!of(what).detail.is_empty(), "{what}");
    }
    for what in ["shared memory", "disk, this folder", "disk, cache folder"] {
        assert!(of(what).detail.contains(" free of "), "{:?}", of(what));
    }
    for check in checks.iter().filter(|check| check.state == State::Missing) {
        assert!(!check.remedy.is_empty(), "{} is missing without a remedy", check.what);
    }
    let lone = Check { what: "x", state: State::Missing, detail: "not there".into(), remedy: "get it".into() };
    assert_eq!(doctor::table(&[lone]), "x  MISSING       not there  ->  get it\n");
    Ok(())
}

fn the_doctor_names_credentials_and_keeps_their_values() -> Outcome {
    let home = tempfile::tempdir()?;
    std::fs::create_dir(home.path().join(".aws"))?;
    std::fs::write(home.path().join(".aws/credentials"), "canary-in-file")?;
    let child = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "watch::the_doctor_looks_at_everything"])
        .envs([(CHILD, "1"), ("AWS_SECRET_ACCESS_KEY", "canary-in-variable"), ("AWS_PROFILE", "")])
        .env("HOME", home.path())
        .output()?;
    let told = format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && told.contains("AWS_SECRET_ACCESS_KEY"), "{told}");
    assert!(told.contains("~/.aws/credentials"), "{told}");
    assert!(!told.contains("AWS_PROFILE"), "an empty variable is none: {told}");
    assert!(!told.contains("canary"), "{told}");
    Ok(())
}
