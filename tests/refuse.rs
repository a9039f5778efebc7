//! The mistakes of the first day: each ends with exit code 2 and one clear message, before any work.

use crate::job::{Run, data, occlude, undisturbed};
use crate::support::Outcome;
use std::path::Path;

crate::trials![
    a_config_that_is_not_there,
    data_that_are_not_there,
    a_folder_without_shards,
    an_unknown_key,
    an_unknown_word,
    a_ratio_of_more_than_one,
    a_patch_that_does_not_divide,
    a_batch_that_ranks_cannot_share,
    a_run_below_a_file,
    no_checkpoint_to_evaluate,
    a_set_without_labels,
    a_picture_that_is_none,
    a_source_without_pictures,
];

/// The program was refused: one message with these words, no panic, nothing done.
pub fn refused(code: i32, told: &str, words: &[&str]) {
    assert_eq!(code, 2, "{told}");
    for word in words {
        assert!(told.contains(word), "no `{word}` in: {told}");
    }
    for bad in ["panicked", "RUST_BACKTRACE", "stack backtrace", "src/"] {
        assert!(!told.contains(bad), "`{bad}` in: {told}");
    }
    let lines = told.lines().filter(|line| !line.trim().is_empty()).count();
    assert!((1..=4).contains(&lines), "{lines} lines: {told}");
    assert_eq!(told.matches(words[0]).count(), 1, "told more than once: {told}");
}

/// A training is refused, and its run folder at most made.
pub fn train(run: &Run, ranks: usize, words: &[&str]) {
    let end = run.start(ranks, &[]).end(60);
    refused(end.code, &end.told, words);
    let left: Vec<_> = run.folder().read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "work was begun: {left:?}");
}

/// Another verb is refused.
fn verb(words: &[&str], told: &[&str]) {
    let output = occlude(words).output().expect("occlude starts");
    refused(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), told);
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
}

pub fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().expect("UTF-8").to_owned()
}

fn a_config_that_is_not_there() -> Outcome {
    let run = Run::tiny();
    std::fs::remove_file(run.config())?;
    train(&run, 0, &["config.json: No such file", "configs/tiny/mae.json"]);
    train(&run, 2, &["config.json: No such file", "configs/tiny/mae.json"]);
    Ok(())
}

fn data_that_are_not_there() -> Outcome {
    train(&Run::with(&["data.train=nowhere/at/all"]), 0, &["nowhere/at/all", "check the path", "occlude pack"]);
    Ok(())
}

fn a_folder_without_shards() -> Outcome {
    let empty = tempfile::tempdir()?;
    train(&Run::with(&[&format!("data.train={}", text(empty.path()))]), 0, &["holds no *.tar", "occlude pack SOURCE"]);
    Ok(())
}

fn an_unknown_key() -> Outcome {
    train(&Run::with(&["optim.weigth_decay=0.1"]), 0, &["unknown key `weigth_decay`", "did you mean `weight_decay`?"]);
    Ok(())
}

fn an_unknown_word() -> Outcome {
    verb(&["train", "--confg", "a"], &["unexpected argument", "--config", "--help"]);
    Ok(())
}

fn a_ratio_of_more_than_one() -> Outcome {
    train(&Run::with(&["method.mae.mask.ratio=1.2"]), 0, &["method.mae.mask.ratio is 1.2", "must lie in (0, 1)"]);
    Ok(())
}

fn a_patch_that_does_not_divide() -> Outcome {
    train(&Run::with(&["input.patch=5"]), 0, &["input.patch", "5", "16"]);
    Ok(())
}

fn a_batch_that_ranks_cannot_share() -> Outcome {
    let words = ["train.global_batch is 1", "2 ranks cannot share", "give at least 2"];
    train(&Run::with(&["train.global_batch=1"]), 2, &words);
    Ok(())
}

fn a_run_below_a_file() -> Outcome {
    let run = Run::tiny();
    let below = run.config().join("run");
    train(&run.at(below), 0, &["config.json/run: Not a directory", "give --run a folder"]);
    Ok(())
}

fn no_checkpoint_to_evaluate() -> Outcome {
    let run = Run::tiny();
    let data = data();
    let [train, test] = ["train", "test"].map(|part| text(data.join(part)));
    let told = ["no checkpoint there", "Give a run's URL"];
    let run = text(run.folder());
    verb(&["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol", "knn"], &told);
    verb(&["reconstruct", "--checkpoint", &run, "--input", "a.png", "--out", &format!("{run}/out")], &told);
    Ok(())
}

fn a_set_without_labels() -> Outcome {
    let run = text(undisturbed(0).folder());
    let data = data();
    let [train, plain] = ["train", "plain"].map(|part| text(data.join(part)));
    for (train, test) in [(&train, &plain), (&plain, &train)] {
        let words = ["evaluate", "--checkpoint", &run, "--train", train, "--test", test, "--protocol", "linear"];
        verb(&words, &["plain has no labels (.cls members)", "labelled set"]);
    }
    Ok(())
}

fn a_picture_that_is_none() -> Outcome {
    let run = undisturbed(0);
    let out = tempfile::tempdir()?;
    let out = text(out.path().join("out"));
    let (checkpoint, config) = (text(run.folder()), text(run.config()));
    verb(&["reconstruct", "--checkpoint", &checkpoint, "--input", &config, "--out", &out], &["config.json: "]);
    verb(&["reconstruct", "--checkpoint", &checkpoint, "--input", "no.png", "--out", &out], &["no.png: No such file"]);
    assert!(!Path::new(&out).exists(), "work was begun");
    Ok(())
}

fn a_source_without_pictures() -> Outcome {
    let empty = tempfile::tempdir()?;
    let out = text(empty.path().join("out"));
    verb(&["pack", &text(empty.path()), &out], &["holds no picture"]);
    verb(&["pack", &text(empty.path().join("nowhere")), &out], &["nowhere is not a folder", "give a folder"]);
    assert!(!Path::new(&out).exists(), "work was begun");
    Ok(())
}
