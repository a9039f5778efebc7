//! Tests of the report: one page about made-up runs, alone and side by side.

use crate::log::run_output::made_up_line;
use crate::support::Outcome;
use occlude::error::ExitCode;
use occlude::log::image_grid;
use occlude::log::image_grid::Tile;
use occlude::log::{MetricsLine, RunLog};
use occlude::report;
use serde_json::json;
use std::path::{Path, PathBuf};

crate::trials![
    one_run_is_reported_in_one_file,
    several_runs_are_compared,
    accuracy_is_shown_over_the_one_key_that_differs,
    html_in_a_run_is_escaped,
    missing_or_damaged_parts_become_notes,
    a_long_run_is_thinned_and_keeps_its_spikes,
];

/// Writes a made-up run of `steps` steps at this mask ratio, with two images and probe results.
fn write_made_up_run(dir: &Path, name: &str, ratio: f64, steps: u64) -> Result<PathBuf, libtest_mimic::Failed> {
    let run = dir.join(name);
    std::fs::create_dir_all(&run)?;
    let config = json!({
        "about": {"title": "ViT-Tiny on handwritten digits", "measured": "never"},
        "method": {"mae": {"mask": {"ratio": ratio}, "encoder": {"depth": 12}}},
        "train": {"steps": steps, "global_batch": 32, "seed": 0},
    });
    std::fs::write(run.join("config.json"), config.to_string())?;
    let mut log = RunLog::create(&run, steps, 60.0)?.with_output(std::io::sink(), 60.0);
    for step in 1..=steps {
        let noise = ((step * 2_654_435_761) % 1000) as f64 / 1000.0 - 0.5;
        let progress = step as f64 / steps as f64;
        let loss = 0.2 + ratio * (-4.0 * progress).exp() + 0.08 * noise;
        let lr = 1.5e-3 * if progress < 0.1 { progress * 10.0 } else { (1.0 - progress) / 0.9 };
        let grad_norm = 1.0 + 0.4 * noise;
        let samples_per_s = 410.0 + 30.0 * noise;
        log.record_step(&MetricsLine { loss, lr, grad_norm, samples_per_s, ..made_up_line(step) })?;
    }
    let digit: Vec<u8> = (0..784u32).map(|at| if (at % 28).abs_diff(14) < 3 { 230 } else { 20 }).collect();
    let hidden: Vec<u8> =
        digit.iter().enumerate().map(|(at, &pixel)| if at / 4 % 2 == 0 { 128 } else { pixel }).collect();
    let row = vec![Tile::from_gray(28, 28, &hidden), Tile::from_gray(28, 28, &digit), Tile::from_gray(28, 28, &digit)];
    let sheet = image_grid::compose(&["masked", "reconstructed", "original"], &[row.clone(), row]);
    log.save_image(steps / 2, "reconstruction", &sheet)?;
    log.save_image(steps, "reconstruction", &sheet)?;
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

/// Returns the report of these runs as text. `OCCLUDE_TEST_KEEP` names a folder in which it is kept.
fn report_text(runs: &[PathBuf], name: &str) -> Result<String, libtest_mimic::Failed> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("report.html");
    report::write(runs, &out)?;
    if let Some(keep) = std::env::var_os("OCCLUDE_TEST_KEEP") {
        std::fs::copy(&out, Path::new(&keep).join(name))?;
    }
    Ok(std::fs::read_to_string(out)?)
}

fn one_run_is_reported_in_one_file() -> Outcome {
    let dir = tempfile::tempdir()?;
    let page = report_text(&[write_made_up_run(dir.path(), "digits", 0.75, 400)?], "one.html")?;
    for expected in [
        "<h1>digits</h1>",
        "ViT-Tiny on handwritten digits.",
        "<td class=\"figure\">400 of 400</td>",
        "<td class=\"figure\">12,800</td>",
        "<td class=\"figure\">1.0 %</td>",
        "knn",
        "<details>",
        "&quot;ratio&quot;: 0.75",
    ] {
        assert!(page.contains(expected), "no {expected}");
    }
    assert_eq!(page.matches("<svg ").count(), 4, "loss, learning rate, gradient norm, throughput");
    assert_eq!(page.matches("src=\"data:image/png;base64,iVBOR").count(), 2);
    let late = page.find("alt=\"step-00000400-");
    let early = page.find("alt=\"step-00000200-");
    assert!(late < early && late.is_some(), "the latest picture comes first");
    // One file, no network, no script: the only address is the SVG namespace.
    let plain = page.replace("http://www.w3.org/2000/svg", "");
    for banned in ["http:", "https:", "<script", "<link", "url(", "@import"] {
        assert!(!plain.contains(banned), "{banned} in the page");
    }
    Ok(())
}

fn several_runs_are_compared() -> Outcome {
    let dir = tempfile::tempdir()?;
    let first = write_made_up_run(&dir.path().join("a"), "digits", 0.75, 400)?;
    let second = write_made_up_run(&dir.path().join("b"), "digits", 0.5, 300)?;
    let page = report_text(&[first, second], "two.html")?;
    assert!(page.contains("<h1>2 runs compared</h1>"));
    assert!(page.contains("a/digits") && page.contains("b/digits"), "folders of the same name are distinguished");
    assert!(page.contains("400 of 400") && page.contains("300 of 300"));
    let row = "<tr><td>method.mae.mask.ratio</td><td class=\"figure\">0.75</td><td class=\"figure\">0.5</td></tr>";
    assert!(page.contains(row), "differing keys, by dotted path");
    assert!(page.contains("<td>train.steps</td>"));
    assert!(!page.contains("<td>method.mae.encoder.depth</td>"), "equal keys are not listed");
    assert!(!page.contains("Accuracy against"), "two keys differ");
    assert_eq!(page.matches("<ul class=\"legend\">").count(), 4);
    Ok(())
}

fn accuracy_is_shown_over_the_one_key_that_differs() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ratios = [0.9, 0.75, 0.5];
    let runs: Vec<_> = ratios
        .iter()
        .map(|ratio| write_made_up_run(dir.path(), &format!("ratio-{ratio}"), *ratio, 60))
        .collect::<Result<_, _>>()?;
    let page = report_text(&runs, "three.html")?;
    assert!(page.contains("<h2>Accuracy against method.mae.mask.ratio</h2>"));
    let plot =
        page.split("Accuracy against").nth(1).and_then(|rest| rest.split("</section>").next()).expect("the plot");
    assert_eq!(plot.matches("<circle ").count(), 3 * 4, "a dot for every run, protocol and weights");
    assert!(plot.contains("knn, pretrained weights") && plot.contains("linear, random weights"));
    Ok(())
}

fn html_in_a_run_is_escaped() -> Outcome {
    const HOSTILE: &str = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>&amp;";
    let dir = tempfile::tempdir()?;
    let folder = "<b onclick='x'>&\"";
    let run = write_made_up_run(dir.path(), folder, 0.75, 30)?;
    let config = |ratio: f64| json!({"about": HOSTILE, HOSTILE: ratio});
    std::fs::write(run.join("config.json"), config(0.5).to_string())?;
    let probe = json!([{"checkpoint": HOSTILE, "protocol": HOSTILE, "top1": 0.5, "n_train": 1, "n_test": 1}]);
    std::fs::write(run.join("probe.json"), probe.to_string())?;
    let image = std::fs::read(run.join("pictures/step-00000030-reconstruction.png"))?;
    std::fs::write(run.join("pictures/<i onload=x>\".png"), image)?;
    std::fs::write(run.join("pictures/fake-<s>.png"), "<script>")?;
    let other = write_made_up_run(dir.path(), "other", 0.5, 30)?;
    std::fs::write(other.join("config.json"), config(0.6).to_string())?;
    for runs in [vec![run.clone()], vec![run, other]] {
        let page = report_text(&runs, "hostile.html")?;
        for banned in ["<script", "<img src=x", "<b onclick", "<i onload", "<s>", "alert(2)'", "\"&\""] {
            assert!(!page.contains(banned), "{banned} is not escaped");
        }
        assert!(page.contains(
            "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&gt;&lt;img src=x onerror=&#39;alert(2)&#39;&gt;&amp;amp;"
        ));
    }
    Ok(())
}

fn missing_or_damaged_parts_become_notes() -> Outcome {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("report.html");
    let error = report::write(&[dir.path().to_path_buf()], &out).expect_err("an empty folder is not a run");
    assert_eq!(error.code, ExitCode::Usage);
    assert!(error.message.contains("is no run") && !out.exists(), "{error}");
    assert_eq!(report::write(&[], &out).expect_err("no run").code, ExitCode::Usage);
    assert_eq!(report::write(&[dir.path().join("none")], &out).expect_err("no folder").code, ExitCode::Usage);

    std::fs::write(dir.path().join("config.json"), "{\"about\": \"Just begun.\"}")?;
    let page = report_text(&[dir.path().to_path_buf()], "bare.html")?;
    assert!(page.contains("Just begun.") && page.contains("There are no metrics yet") && !page.contains("<svg"));

    // Damage: half a config, a partial line, a step logged twice by a resumed run, a non-finite step.
    let run = write_made_up_run(dir.path(), "hurt", 0.75, 30)?;
    std::fs::write(run.join("config.json"), "{\"about\": ")?;
    std::fs::write(run.join("probe.json"), "[{}]")?;
    let mut text = std::fs::read_to_string(run.join("metrics.jsonl"))?;
    let second = [MetricsLine { loss: f64::NAN, ..made_up_line(29) }, MetricsLine { loss: 0.125, ..made_up_line(30) }];
    second.iter().for_each(|line| text += &(serde_json::to_string(line).unwrap() + "\n"));
    std::fs::write(run.join("metrics.jsonl"), text + "{\"step\": 31, \"lo")?;
    let page = report_text(&[run], "hurt.html")?;
    for expected in [
        "config.json is damaged",
        "probe.json is damaged",
        "1 lines of the metrics are damaged",
        "The loss was not finite at 1 steps, first at step 29.",
        "<td>Final loss</td><td class=\"figure\">0.1250</td>",
        "<td>Steps</td><td class=\"figure\">30</td>",
        "<td>Global batch</td><td class=\"figure\">32</td>",
    ] {
        assert!(page.contains(expected), "no {expected}");
    }
    Ok(())
}

fn a_long_run_is_thinned_and_keeps_its_spikes() -> Outcome {
    let dir = tempfile::tempdir()?;
    let lines =
        (1..=50_000).map(|step| MetricsLine { lr: if step == 33_333 { 0.5 } else { 1e-3 }, ..made_up_line(step) });
    let text: String = lines.map(|line| serde_json::to_string(&line).unwrap() + "\n").collect();
    std::fs::write(dir.path().join("metrics.jsonl"), text)?;
    let page = report_text(&[dir.path().to_path_buf()], "long.html")?;
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
    let top = heights.iter().min().unwrap();
    let bottom = heights.iter().max().unwrap();
    assert!(bottom - top >= 1, "the spike at one step of 50,000 is drawn: {top} to {bottom}");
    Ok(())
}
