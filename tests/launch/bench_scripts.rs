//! Tests of the benchmark scripts: our step interleaved with that of PyTorch, and the parts of gpu-check.

use crate::support::training_job::program;
use crate::support::{Outcome, root};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

crate::trials![
    peer_models_of_one_size_are_interleaved_in_one_table,
    a_peer_that_cannot_run_is_reported_and_the_others_continue,
    steps_of_every_modality_are_interleaved_with_peers,
    gpu_check_merges_the_results_of_its_parts,
];

fn script(name: &str, words: &[&str]) -> Command {
    let mut command = Command::new(root().join("launch").join(name));
    command.args(words).env("OCCLUDE_PROGRAM", program()).env("CUDA_VISIBLE_DEVICES", "").env("OMP_NUM_THREADS", "1");
    command
}

fn stdout_text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs `launch/bench/peers` at the smallest size and returns its output and its rows.
fn run_peers(more: &[&str], prepare: impl FnOnce(&mut Command)) -> (String, Vec<Value>) {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("peers.json");
    let mut words = vec!["--size", "tiny", "--batch", "3", "--pairs", "3", "--threads", "1", "--out"];
    words.push(out.to_str().expect("UTF-8"));
    words.extend(more);
    let mut command = script("bench/peers", &words);
    prepare(&mut command);
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{}", stdout_text(&output));
    let found: Value = serde_json::from_slice(&std::fs::read(out).expect("a table")).expect("JSON");
    assert_eq!((&found["about"]["batch"], &found["about"]["dtype"]), (&3.into(), &"fp32".into()));
    (stdout_text(&output), found["rows"].as_array().expect("rows").clone())
}

fn peer_models_of_one_size_are_interleaved_in_one_table() -> Outcome {
    let (output, rows) = run_peers(&["--mode", "eager"], |_| ());
    assert_eq!(rows.len(), 2, "{output}");
    for row in &rows {
        let number = |side: &str, key: &str| row[side][key].as_f64().unwrap_or_else(|| panic!("{side} {key}: {row}"));
        // The same model on both sides.
        assert_eq!(number("ours", "parameters"), number("theirs", "parameters"), "{row}");
        for side in ["ours", "theirs"] {
            let rate = number(side, "images_per_s") * number(side, "ms") / 3e3;
            assert!((rate - 1.0).abs() < 1e-9 && number(side, "memory") > 1e7, "{row}");
        }
        assert!(row["ratio"].as_f64() > Some(0.0));
    }
    for who in ["ours", "transformers ", "timm's blocks"] {
        assert_eq!(output.lines().filter(|line| line.starts_with(who)).count(), 1, "{who} in {output}");
    }
    Ok(())
}

fn a_peer_that_cannot_run_is_reported_and_the_others_continue() -> Outcome {
    let folder = tempfile::tempdir()?;
    for package in ["transformers", "timm"] {
        std::fs::write(folder.path().join(format!("{package}.py")), "raise ImportError('not installed here')\n")?;
    }
    let (output, rows) = run_peers(&["--mode", "eager"], |command| {
        command.env("PYTHONPATH", folder.path());
    });
    assert!(output.contains("not run: ImportError: not installed here"), "{output}");
    assert!(rows[0]["fault"].is_string() && rows[1]["ratio"].is_number(), "{output}");
    assert!(output.contains("blocks of PyTorch's modules"), "{output}");
    Ok(())
}

fn steps_of_every_modality_are_interleaved_with_peers() -> Outcome {
    let output =
        script("bench/bench", &["--size", "tiny", "--batch", "3", "--pairs", "2", "--threads", "1"]).output()?;
    let text = stdout_text(&output);
    assert!(output.status.success(), "{text}");
    for label in [
        "MAE, 32 px, patch 8: ours / transformers",
        "MAE: mask tokens in the encoder / only in the decoder",
        "VideoMAE: ours / transformers",
        "VideoMAE: 0.9 hidden / one place hidden",
        "FLIP, 0.5 hidden: ours / open_clip",
        "FLIP: 0.75 hidden / none hidden",
        "Audio-MAE: decoder in windows / over all",
        "SupMAE: ours / eager PyTorch",
        "R-MAE: ours / eager PyTorch",
        "C-MAE: ours / eager PyTorch",
        "MaskFeat: ours / eager PyTorch",
        "MFM: ours / eager PyTorch",
        "iGPT: ours / eager PyTorch",
    ] {
        let line = text.lines().find(|line| line.starts_with(label)).unwrap_or_else(|| panic!("{label} in {text}"));
        let ratio = line.split_once("ratio ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<f64>().ok());
        assert!(ratio.is_some_and(|ratio| ratio > 0.0), "{line}");
    }
    Ok(())
}

fn gpu_check_merges_the_results_of_its_parts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tool = |name: &str, lines: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, lines).expect("a script");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("to be run");
    };
    tool("nvidia-smi", "#!/bin/sh\necho a make-believe card\n");
    tool("compute-sanitizer", "#!/bin/sh\necho ========= ERROR SUMMARY: 1 error\nexit 9\n");
    let out = folder.path().join("out");
    let ask = |parts: &str, out: &Path| {
        let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").expect("a path"));
        script("gpu-check", &["--only", parts, out.to_str().expect("UTF-8")])
            .env("PATH", path)
            .output()
            .expect("it starts")
    };
    let output = ask("resume", &out);
    assert!(output.status.success() && stdout_text(&output).contains("3 of 3 passed"), "{}", stdout_text(&output));
    let output = ask("memcheck", &out);
    assert_eq!(output.status.code(), Some(1), "a finding of the sanitizer fails the part: {}", stdout_text(&output));
    let summary: Value = serde_json::from_slice(&std::fs::read(out.join("summary.json"))?)?;
    assert_eq!(summary["device"], "a make-believe card");
    let state = |part: &str| {
        let rows = summary["parts"].as_array().expect("rows");
        rows.iter().find(|row| row["part"] == part).unwrap_or_else(|| panic!("no {part}"))["state"].clone()
    };
    assert_eq!([state("resume"), state("memcheck step")], ["ok", "exit 9"], "{summary}");
    let output = ask("kernels", &out);
    assert_eq!(output.status.code(), Some(2), "{}", stdout_text(&output));
    assert!(
        stdout_text(&output).contains("there is no part kernels; there are tests, resume"),
        "{}",
        stdout_text(&output)
    );
    Ok(())
}
