//! What a run shows: event files, the log, picture grids, the report, the doctor.

use crate::support::{Outcome, oracle};
use occlude::fault::Code;
use occlude::run::doctor::{self, Check, State};
use occlude::run::events::Events;
use occlude::run::log::{Line, Log, Window, progress_text};
use occlude::run::picture::{self, Tile};
use occlude::run::report;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
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
    a_report_shows_one_run_in_one_file,
    a_report_compares_runs,
    a_report_shows_accuracy_over_the_one_key_that_differs,
    a_report_lets_no_html_in,
    a_report_tolerates_what_is_missing,
    a_report_of_a_long_run_is_thinned_and_keeps_its_spikes,
];

/// Step `step` of a made-up run: 32 samples a step of half a second, 320 samples in the set.
fn line(step: u64) -> Line {
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
    for what in ["libtorch, CUDA half", "FFmpeg", "store credentials", "cores", "open files", "other limits", "memory"]
    {
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

/// A made-up run of `steps` steps that hid this share, with two pictures and probe results.
fn made_up(dir: &Path, name: &str, ratio: f64, steps: u64) -> Result<PathBuf, libtest_mimic::Failed> {
    let run = dir.join(name);
    std::fs::create_dir_all(&run)?;
    let config = json!({
        "about": "ViT-Tiny on handwritten digits.",
        "method": {"mae": {"mask": {"ratio": ratio}, "encoder": {"depth": 12}}},
        "train": {"steps": steps, "global_batch": 32, "seed": 0},
    });
    std::fs::write(run.join("config.json"), config.to_string())?;
    let mut log = Log::create(&run, steps, 60.0)?.tell(std::io::sink(), 60.0);
    for step in 1..=steps {
        let noise = ((step * 2_654_435_761) % 1000) as f64 / 1000.0 - 0.5;
        let progress = step as f64 / steps as f64;
        let loss = 0.2 + ratio * (-4.0 * progress).exp() + 0.08 * noise;
        let lr = 1.5e-3 * if progress < 0.1 { progress * 10.0 } else { (1.0 - progress) / 0.9 };
        let (grad_norm, samples_per_s) = (1.0 + 0.4 * noise, 410.0 + 30.0 * noise);
        log.step(&Line { loss, lr, grad_norm, samples_per_s, ..line(step) })?;
    }
    let digit: Vec<u8> = (0..784u32).map(|at| if (at % 28).abs_diff(14) < 3 { 230 } else { 20 }).collect();
    let hidden: Vec<u8> =
        digit.iter().enumerate().map(|(at, &pixel)| if at / 4 % 2 == 0 { 128 } else { pixel }).collect();
    let row = vec![Tile::grey(28, 28, &hidden), Tile::grey(28, 28, &digit), Tile::grey(28, 28, &digit)];
    let sheet = picture::grid(&["masked", "reconstructed", "original"], &[row.clone(), row]);
    log.picture(steps / 2, "reconstruction", &sheet)?;
    log.picture(steps, "reconstruction", &sheet)?;
    let probe = |checkpoint, protocol, top1: f64| json!({"checkpoint": checkpoint, "protocol": protocol, "top1": top1, "n_train": 8000, "n_test": 2000});
    let good = 0.95 - (ratio - 0.75).abs() * 0.3;
    let probes = json!([
        probe("pretrained", "knn", good),
        probe("random", "knn", 0.81),
        probe("pretrained", "linear", good + 0.02),
        probe("random", "linear", 0.85),
    ]);
    std::fs::write(run.join("probe.json"), probes.to_string())?;
    Ok(run)
}

/// The report about these runs, as text. `OCCLUDE_TEST_KEEP` names a folder that keeps it for a look.
fn reported(runs: &[PathBuf], name: &str) -> Result<String, libtest_mimic::Failed> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("report.html");
    report::write(runs, &out)?;
    if let Some(keep) = std::env::var_os("OCCLUDE_TEST_KEEP") {
        std::fs::copy(&out, Path::new(&keep).join(name))?;
    }
    Ok(std::fs::read_to_string(out)?)
}

fn a_report_shows_one_run_in_one_file() -> Outcome {
    let dir = tempfile::tempdir()?;
    let page = reported(&[made_up(dir.path(), "digits", 0.75, 400)?], "one.html")?;
    for wanted in [
        "<h1>digits</h1>",
        "ViT-Tiny on handwritten digits.",
        "<td class=\"figure\">400 of 400</td>",
        "<td class=\"figure\">12,800</td>",
        "<td class=\"figure\">1.0 %</td>",
        "knn",
        "<details>",
        "&quot;ratio&quot;: 0.75",
    ] {
        assert!(page.contains(wanted), "no {wanted}");
    }
    assert_eq!(page.matches("<svg ").count(), 4, "loss, learning rate, gradient norm, throughput");
    assert_eq!(page.matches("src=\"data:image/png;base64,iVBOR").count(), 2);
    let (late, early) = (page.find("alt=\"step-00000400-"), page.find("alt=\"step-00000200-"));
    assert!(late < early && late.is_some(), "the latest picture comes first");
    // One file, nothing from the net, no script: the only address is the name of the SVG dialect.
    let plain = page.replace("http://www.w3.org/2000/svg", "");
    for banned in ["http:", "https:", "<script", "<link", "url(", "@import"] {
        assert!(!plain.contains(banned), "{banned} in the page");
    }
    Ok(())
}

fn a_report_compares_runs() -> Outcome {
    let dir = tempfile::tempdir()?;
    let first = made_up(&dir.path().join("a"), "digits", 0.75, 400)?;
    let second = made_up(&dir.path().join("b"), "digits", 0.5, 300)?;
    let page = reported(&[first, second], "two.html")?;
    assert!(page.contains("<h1>2 runs compared</h1>"));
    assert!(page.contains("a/digits") && page.contains("b/digits"), "folders called alike are told apart");
    assert!(page.contains("400 of 400") && page.contains("300 of 300"));
    let row = "<tr><td>method.mae.mask.ratio</td><td class=\"figure\">0.75</td><td class=\"figure\">0.5</td></tr>";
    assert!(page.contains(row), "what differs, by dotted path");
    assert!(page.contains("<td>train.steps</td>"));
    assert!(!page.contains("<td>method.mae.encoder.depth</td>"), "what does not differ is not listed");
    assert!(!page.contains("Accuracy against"), "two keys differ");
    assert_eq!(page.matches("<ul class=\"legend\">").count(), 4);
    Ok(())
}

fn a_report_shows_accuracy_over_the_one_key_that_differs() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ratios = [0.9, 0.75, 0.5];
    let runs: Vec<_> = ratios
        .iter()
        .map(|ratio| made_up(dir.path(), &format!("ratio-{ratio}"), *ratio, 60))
        .collect::<Result<_, _>>()?;
    let page = reported(&runs, "three.html")?;
    assert!(page.contains("<h2>Accuracy against method.mae.mask.ratio</h2>"));
    let plot =
        page.split("Accuracy against").nth(1).and_then(|rest| rest.split("</section>").next()).expect("the plot");
    assert_eq!(plot.matches("<circle ").count(), 3 * 4, "a dot for every run, protocol and weights");
    assert!(plot.contains("knn, pretrained weights") && plot.contains("linear, random weights"));
    Ok(())
}

fn a_report_lets_no_html_in() -> Outcome {
    const HOSTILE: &str = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>&amp;";
    let dir = tempfile::tempdir()?;
    let folder = "<b onclick='x'>&\"";
    let run = made_up(dir.path(), folder, 0.75, 30)?;
    let config = |ratio: f64| json!({"about": HOSTILE, HOSTILE: ratio});
    std::fs::write(run.join("config.json"), config(0.5).to_string())?;
    let probe = json!([{"checkpoint": HOSTILE, "protocol": HOSTILE, "top1": 0.5, "n_train": 1, "n_test": 1}]);
    std::fs::write(run.join("probe.json"), probe.to_string())?;
    let picture = std::fs::read(run.join("pictures/step-00000030-reconstruction.png"))?;
    std::fs::write(run.join("pictures/<i onload=x>\".png"), picture)?;
    std::fs::write(run.join("pictures/fake-<s>.png"), "<script>")?;
    let other = made_up(dir.path(), "other", 0.5, 30)?;
    std::fs::write(other.join("config.json"), config(0.6).to_string())?;
    for runs in [vec![run.clone()], vec![run, other]] {
        let page = reported(&runs, "hostile.html")?;
        for banned in ["<script", "<img src=x", "<b onclick", "<i onload", "<s>", "alert(2)'", "\"&\""] {
            assert!(!page.contains(banned), "{banned} came through");
        }
        assert!(page.contains(
            "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&gt;&lt;img src=x onerror=&#39;alert(2)&#39;&gt;&amp;amp;"
        ));
    }
    Ok(())
}

fn a_report_tolerates_what_is_missing() -> Outcome {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("report.html");
    let fault = report::write(&[dir.path().to_path_buf()], &out).expect_err("an empty folder is no run");
    assert_eq!(fault.code, Code::Usage);
    assert!(fault.message.contains("is no run") && !out.exists(), "{fault}");
    assert_eq!(report::write(&[], &out).expect_err("no run").code, Code::Usage);
    assert_eq!(report::write(&[dir.path().join("none")], &out).expect_err("no folder").code, Code::Usage);

    std::fs::write(dir.path().join("config.json"), "{\"about\": \"Just begun.\"}")?;
    let page = reported(&[dir.path().to_path_buf()], "bare.html")?;
    assert!(page.contains("Just begun.") && page.contains("There are no metrics yet") && !page.contains("<svg"));

    // Damage: half a config, a torn line, a resumed run's step told twice, a step that was not finite.
    let run = made_up(dir.path(), "hurt", 0.75, 30)?;
    std::fs::write(run.join("config.json"), "{\"about\": ")?;
    std::fs::write(run.join("probe.json"), "[{}]")?;
    let mut text = std::fs::read_to_string(run.join("metrics.jsonl"))?;
    let again = [Line { loss: f64::NAN, ..line(29) }, Line { loss: 0.125, ..line(30) }];
    again.iter().for_each(|line| text += &(serde_json::to_string(line).unwrap() + "\n"));
    std::fs::write(run.join("metrics.jsonl"), text + "{\"step\": 31, \"lo")?;
    let page = reported(&[run], "hurt.html")?;
    for wanted in [
        "config.json is damaged",
        "probe.json is damaged",
        "1 lines of the metrics are damaged",
        "The loss was not finite at 1 steps, first at step 29.",
        "<td>Final loss</td><td class=\"figure\">0.1250</td>",
        "<td>Steps</td><td class=\"figure\">30</td>",
        "<td>Global batch</td><td class=\"figure\">32</td>",
    ] {
        assert!(page.contains(wanted), "no {wanted}");
    }
    Ok(())
}

fn a_report_of_a_long_run_is_thinned_and_keeps_its_spikes() -> Outcome {
    let dir = tempfile::tempdir()?;
    let lines = (1..=50_000).map(|step| Line { lr: if step == 33_333 { 0.5 } else { 1e-3 }, ..line(step) });
    let text: String = lines.map(|line| serde_json::to_string(&line).unwrap() + "\n").collect();
    std::fs::write(dir.path().join("metrics.jsonl"), text)?;
    let page = reported(&[dir.path().to_path_buf()], "long.html")?;
    let curves = page.split("points=\"").skip(1).map(|rest| rest.split('"').next().unwrap().split_whitespace().count());
    let longest = curves.max().expect("curves");
    assert!((1000..=2000).contains(&longest), "{longest} points in one curve");
    let page = page.split("<h2>Learning rate</h2>").nth(1).and_then(|rest| rest.split("</section>").next());
    let line = page.and_then(|chart| chart.rsplit("points=\"").next()).expect("the curve");
    let heights: Vec<i32> = line
        .split('"')
        .next()
        .unwrap()
        .split_whitespace()
        .map(|point| point.split_once(',').unwrap().1.parse().unwrap())
        .collect();
    let (top, bottom) = (heights.iter().min().unwrap(), heights.iter().max().unwrap());
    assert!(bottom - top >= 1, "the spike at one step of 50,000 is drawn: {top} to {bottom}");
    Ok(())
}
