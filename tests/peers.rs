//! The scripts that measure: our step beside PyTorch's, by turns, and what a GPU is asked in one command.

use crate::job::program;
use crate::support::{Outcome, root};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

crate::trials![
    peers_of_the_same_size_take_turns_in_one_table,
    a_peer_that_cannot_run_is_told_and_the_others_go_on,
    steps_of_every_modality_take_turns_with_others,
    what_a_gpu_is_asked_in_parts_comes_together,
];

fn script(name: &str, words: &[&str]) -> Command {
    let mut command = Command::new(root().join("launch").join(name));
    command.args(words).env("OCCLUDE_PROGRAM", program()).env("CUDA_VISIBLE_DEVICES", "").env("OMP_NUM_THREADS", "1");
    command
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// `launch/peers` at the smallest size: what it printed, and its rows.
fn peers(more: &[&str], prepare: impl FnOnce(&mut Command)) -> (String, Vec<Value>) {
    let place = tempfile::tempdir().expect("a folder");
    let out = place.path().join("peers.json");
    let mut words = vec!["--size", "tiny", "--batch", "3", "--pairs", "3", "--threads", "1", "--out"];
    words.push(out.to_str().expect("UTF-8"));
    words.extend(more);
    let mut command = script("peers", &words);
    prepare(&mut command);
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{}", told(&output));
    let found: Value = serde_json::from_slice(&std::fs::read(out).expect("a table")).expect("JSON");
    assert_eq!((&found["about"]["batch"], &found["about"]["dtype"]), (&3.into(), &"fp32".into()));
    (told(&output), found["rows"].as_array().expect("rows").clone())
}

fn peers_of_the_same_size_take_turns_in_one_table() -> Outcome {
    let (told, rows) = peers(&["--mode", "eager"], |_| ());
    assert_eq!(rows.len(), 2, "{told}");
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
        assert_eq!(told.lines().filter(|line| line.starts_with(who)).count(), 1, "{who} in {told}");
    }
    Ok(())
}

fn a_peer_that_cannot_run_is_told_and_the_others_go_on() -> Outcome {
    let place = tempfile::tempdir()?;
    for package in ["transformers", "timm"] {
        std::fs::write(place.path().join(format!("{package}.py")), "raise ImportError('not installed here')\n")?;
    }
    let (told, rows) = peers(&["--mode", "eager"], |command| {
        command.env("PYTHONPATH", place.path());
    });
    assert!(told.contains("not run: ImportError: not installed here"), "{told}");
    assert!(rows[0]["fault"].is_string() && rows[1]["ratio"].is_number(), "{told}");
    assert!(told.contains("blocks of PyTorch's modules"), "{told}");
    Ok(())
}

fn steps_of_every_modality_take_turns_with_others() -> Outcome {
    let output = script("bench", &["--size", "tiny", "--batch", "3", "--pairs", "2", "--threads", "1"]).output()?;
    let told = told(&output);
    assert!(output.status.success(), "{told}");
    for what in [
        "MAE, 32 px, patch 8: ours / transformers",
        "MAE: mask tokens in the encoder / only in the decoder",
        "VideoMAE: ours / transformers",
        "VideoMAE: 0.9 hidden / one place hidden",
        "FLIP, 0.5 hidden: ours / open_clip",
        "FLIP: 0.75 hidden / none hidden",
        "Audio-MAE: decoder in windows / over all",
    ] {
        let line = told.lines().find(|line| line.starts_with(what)).unwrap_or_else(|| panic!("{what} in {told}"));
        let ratio = line.split_once("ratio ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<f64>().ok());
        assert!(ratio.is_some_and(|ratio| ratio > 0.0), "{line}");
    }
    Ok(())
}

fn what_a_gpu_is_asked_in_parts_comes_together() -> Outcome {
    let place = tempfile::tempdir()?;
    let tool = |name: &str, lines: &str| {
        let path = place.path().join(name);
        std::fs::write(&path, lines).expect("a script");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("to be run");
    };
    tool("nvidia-smi", "#!/bin/sh\necho a make-believe card\n");
    tool("compute-sanitizer", "#!/bin/sh\necho ========= ERROR SUMMARY: 1 error\nexit 9\n");
    let out = place.path().join("out");
    let ask = |parts: &str, out: &Path| {
        let path = format!("{}:{}", place.path().display(), std::env::var("PATH").expect("a path"));
        script("gpu-check", &["--only", parts, out.to_str().expect("UTF-8")])
            .env("PATH", path)
            .output()
            .expect("it starts")
    };
    let output = ask("resume", &out);
    assert!(output.status.success() && told(&output).contains("3 of 3 are well"), "{}", told(&output));
    let output = ask("memcheck", &out);
    assert_eq!(output.status.code(), Some(1), "a sanitizer that finds something fails: {}", told(&output));
    let summary: Value = serde_json::from_slice(&std::fs::read(out.join("summary.json"))?)?;
    assert_eq!(summary["device"], "a make-believe card");
    let state = |part: &str| {
        let rows = summary["parts"].as_array().expect("rows");
        rows.iter().find(|row| row["part"] == part).unwrap_or_else(|| panic!("no {part}"))["state"].clone()
    };
    assert_eq!([state("resume"), state("memcheck step")], ["ok", "exit 9"], "{summary}");
    let output = ask("kernels", &out);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(told(&output).contains("there is no part kernels; there are tests, resume"), "{}", told(&output));
    Ok(())
}
