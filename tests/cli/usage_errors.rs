//! Tests of frequent mistakes: each ends with exit code 2 and one clear message, before any work.

use crate::support::training_job::{Run, occlude_command, reference_run, shared_data, tiny_config};
use crate::support::{Outcome, path_text};
use occlude::data::set::DataSet;
use serde_json::json;
use std::path::Path;

crate::trials![
    a_missing_config_is_rejected,
    missing_data_are_rejected,
    a_folder_without_shards_is_rejected,
    an_unknown_key_is_rejected,
    an_unknown_command_line_word_is_rejected,
    a_mask_ratio_above_one_is_rejected,
    a_patch_size_that_does_not_divide_is_rejected,
    a_batch_smaller_than_the_world_is_rejected,
    a_run_below_a_file_is_rejected,
    a_run_without_a_checkpoint_is_rejected,
    a_data_set_without_labels_is_rejected,
    a_method_that_learns_from_labels_needs_them_and_a_whole_batch,
    a_file_that_is_not_an_image_is_rejected,
    a_source_without_images_is_rejected,
];

/// Asserts that the program exited with `code` and one message with these words, without a panic.
pub fn assert_rejected(code: i32, output: &str, words: &[&str]) {
    assert_eq!(code, 2, "{output}");
    for word in words {
        assert!(output.contains(word), "no `{word}` in: {output}");
    }
    for bad in ["panicked", "RUST_BACKTRACE", "stack backtrace", "src/"] {
        assert!(!output.contains(bad), "`{bad}` in: {output}");
    }
    let lines = output.lines().filter(|line| !line.trim().is_empty()).count();
    assert!((1..=4).contains(&lines), "{lines} lines: {output}");
    assert_eq!(output.matches(words[0]).count(), 1, "reported more than once: {output}");
}

/// Asserts that a training is rejected and its run folder at most created.
pub fn assert_training_rejected(run: &Run, ranks: usize, words: &[&str]) {
    let end = run.start(ranks, &[]).end(60);
    assert_rejected(end.code, &end.stderr, words);
    let left: Vec<_> = run.folder().read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "work was started: {left:?}");
}

/// Asserts that another command is rejected.
fn assert_command_rejected(words: &[&str], text: &[&str]) {
    let output = occlude_command(words).output().expect("occlude starts");
    assert_rejected(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), text);
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn a_missing_config_is_rejected() -> Outcome {
    let run = Run::tiny();
    std::fs::remove_file(run.config())?;
    assert_training_rejected(&run, 0, &["config.json: No such file", "configs/tiny/mae.json"]);
    assert_training_rejected(&run, 2, &["config.json: No such file", "configs/tiny/mae.json"]);
    Ok(())
}

fn missing_data_are_rejected() -> Outcome {
    assert_training_rejected(
        &Run::with_overrides(&["data.train=nowhere/at/all"]),
        0,
        &["nowhere/at/all", "check the path", "occlude pack"],
    );
    Ok(())
}

fn a_folder_without_shards_is_rejected() -> Outcome {
    let empty = tempfile::tempdir()?;
    assert_training_rejected(
        &Run::with_overrides(&[&format!("data.train={}", path_text(empty.path()))]),
        0,
        &["holds no *.tar", "occlude pack SOURCE"],
    );
    Ok(())
}

fn an_unknown_key_is_rejected() -> Outcome {
    assert_training_rejected(
        &Run::with_overrides(&["optim.weigth_decay=0.1"]),
        0,
        &["unknown key `weigth_decay`", "did you mean `weight_decay`?"],
    );
    Ok(())
}

fn an_unknown_command_line_word_is_rejected() -> Outcome {
    assert_command_rejected(&["train", "--confg", "a"], &["unexpected argument", "--config", "--help"]);
    Ok(())
}

fn a_mask_ratio_above_one_is_rejected() -> Outcome {
    assert_training_rejected(
        &Run::with_overrides(&["method.mae.mask.ratio=1.2"]),
        0,
        &["method.mae.mask.ratio is 1.2", "must lie in (0, 1)"],
    );
    Ok(())
}

fn a_patch_size_that_does_not_divide_is_rejected() -> Outcome {
    assert_training_rejected(&Run::with_overrides(&["input.patch=5"]), 0, &["input.patch", "5", "16"]);
    Ok(())
}

fn a_batch_smaller_than_the_world_is_rejected() -> Outcome {
    let words = ["train.global_batch is 1", "2 ranks cannot share", "give at least 2"];
    assert_training_rejected(&Run::with_overrides(&["train.global_batch=1"]), 2, &words);
    Ok(())
}

fn a_run_below_a_file_is_rejected() -> Outcome {
    let run = Run::tiny();
    let below = run.config().join("run");
    assert_training_rejected(&run.at(below), 0, &["config.json/run: Not a directory", "give --run a folder"]);
    Ok(())
}

fn a_run_without_a_checkpoint_is_rejected() -> Outcome {
    let run = Run::tiny();
    let data = shared_data();
    let [train, test] = ["train", "test"].map(|part| path_text(data.join(part)));
    let output = ["no checkpoint there", "Give a run's URL"];
    let run = path_text(run.folder());
    assert_command_rejected(
        &["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol", "knn"],
        &output,
    );
    assert_command_rejected(
        &["reconstruct", "--checkpoint", &run, "--input", "a.png", "--out", &format!("{run}/out")],
        &output,
    );
    Ok(())
}

fn a_data_set_without_labels_is_rejected() -> Outcome {
    let run = path_text(reference_run(0).folder());
    let data = shared_data();
    let [train, plain] = ["train", "plain"].map(|part| path_text(data.join(part)));
    for (train, test) in [(&train, &plain), (&plain, &train)] {
        let words = ["evaluate", "--checkpoint", &run, "--train", train, "--test", test, "--protocol", "linear"];
        assert_command_rejected(&words, &["plain has no labels (.cls members)", "labeled set"]);
    }
    Ok(())
}

fn a_method_that_learns_from_labels_needs_them_and_a_whole_batch() -> Outcome {
    let supmae = |classes: i64| {
        let shape = json!({"width": 16, "depth": 1, "heads": 2});
        let method = json!({
            "encoder": shape, "decoder": shape, "mask": {"ratio": 0.75}, "target": {"normalize": false}, "classes": classes,
        });
        let mut config = tiny_config();
        config["method"] = json!({"supmae": method});
        config
    };
    let mut unlabeled = supmae(10);
    unlabeled["data"]["train"] = json!(shared_data().join("plain"));
    assert_training_rejected(&Run::new(&unlabeled), 0, &["plain has no labels (.cls members)", "learns from some"]);
    let named = DataSet::open(&path_text(shared_data().join("train")))?.classes.len();
    assert!(named > 2);
    let few = supmae(named as i64 - 1);
    assert_training_rejected(&Run::new(&few), 2, &[&format!("has {named} classes"), &format!("classes to {named}")]);
    let mut alone = supmae(10);
    alone["train"]["global_batch"] = json!(1);
    assert_training_rejected(&Run::new(&alone), 0, &["train.global_batch is 1", "give at least 2"]);
    let mut cut = supmae(10);
    cut["train"]["micro_batch"] = json!(2);
    assert_training_rejected(&Run::new(&cut), 0, &["train.micro_batch is given", "leave it out"]);
    assert_training_rejected(&Run::new(&supmae(10)), 3, &["3 ranks cannot divide equally", "another number of ranks"]);
    Ok(())
}

fn a_file_that_is_not_an_image_is_rejected() -> Outcome {
    let run = reference_run(0);
    let out = tempfile::tempdir()?;
    let out = path_text(out.path().join("out"));
    let checkpoint = path_text(run.folder());
    let config = path_text(run.config());
    assert_command_rejected(
        &["reconstruct", "--checkpoint", &checkpoint, "--input", &config, "--out", &out],
        &["config.json: "],
    );
    assert_command_rejected(
        &["reconstruct", "--checkpoint", &checkpoint, "--input", "no.png", "--out", &out],
        &["no.png: No such file"],
    );
    assert!(!Path::new(&out).exists(), "work was started");
    Ok(())
}

fn a_source_without_images_is_rejected() -> Outcome {
    let empty = tempfile::tempdir()?;
    let out = path_text(empty.path().join("out"));
    assert_command_rejected(&["pack", &path_text(empty.path()), &out], &["holds no image"]);
    assert_command_rejected(
        &["pack", &path_text(empty.path().join("nowhere")), &out],
        &["nowhere is not a folder", "give a folder"],
    );
    assert!(!Path::new(&out).exists(), "work was started");
    Ok(())
}
