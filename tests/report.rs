//! The report: one page about made-up runs, alone and side by side.

use crate::support::Outcome;
use crate::watch::line;
use occlude::fault::Code;
use occlude::run::log::{Line, Log};
use occlude::run::picture::{self, Tile};
use occlude::run::report;
use serde_json::json;
use std::path::{Path, PathBuf};

crate::trials![
    one_run_is_shown_in_one_file,
    several_runs_are_compared,
    accuracy_is_shown_over_the_one_key_that_differs,
    no_html_comes_in_with_a_run,
    what_is_missing_or_damaged_becomes_a_note,
    a_long_run_is_thinned_and_keeps_its_spikes,
];

/// A made-up run of `steps` steps that hid this share, with two pictures and probe results.
fn made_up(dir: &Path, name: &str, ratio: f64, steps: u64) -> Result<PathBuf, libtest_mimic::Failed> {
    let run = dir.join(name);
    std::fs::create_dir_all(&run)?;
    let config = json!({
        "about": {"title": "ViT-Tiny on handwritten digits", "measured": "never"},
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

fn one_run_is_shown_in_one_file() -> Outcome {
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

fn several_runs_are_compared() -> Outcome {
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

fn accuracy_is_shown_over_the_one_key_that_differs() -> Outcome {
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

fn no_html_comes_in_with_a_run() -> Outcome {
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

fn what_is_missing_or_damaged_becomes_a_note() -> Outcome {
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

fn a_long_run_is_thinned_and_keeps_its_spikes() -> Outcome {
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
