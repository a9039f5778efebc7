//! Runs on a disk that cannot be written, is too small, or fills up.

use crate::full_disk::Tmpfs;
use crate::job::{EVERY, Run, data, occlude};
use crate::refuse::{text, train};
use crate::support::{Outcome, skipped, trial};
use libtest_mimic::Trial;

type Case = (&'static str, fn() -> Outcome);

const CASES: [Case; 3] = [
    ("a_run_folder_that_cannot_be_written_is_refused", a_run_folder_that_cannot_be_written_is_refused),
    ("a_disk_too_small_for_one_checkpoint_is_refused", a_disk_too_small_for_one_checkpoint_is_refused),
    ("a_disk_that_fills_up_keeps_the_last_checkpoint_whole", a_disk_that_fills_up_keeps_the_last_checkpoint_whole),
];

pub fn trials() -> Vec<Trial> {
    let allowed = Tmpfs::mount("1m").is_some();
    let of = |(name, case)| match allowed {
        true => trial(&format!("small_disk::{name}"), case),
        false => skipped(&format!("small_disk::{name}"), "mounting a tmpfs is not allowed here"),
    };
    CASES.into_iter().map(of).collect()
}

fn disk(size: &str) -> Result<Tmpfs, libtest_mimic::Failed> {
    Ok(Tmpfs::mount(size).ok_or("no tmpfs, though one could be mounted before")?)
}

fn a_run_folder_that_cannot_be_written_is_refused() -> Outcome {
    let disk = disk("1m")?;
    disk.read_only()?;
    for folder in [disk.path().to_owned(), disk.path().join("run")] {
        train(&Run::tiny().at(folder), 0, &["Read-only file system", "give --run a"]);
    }
    Ok(())
}

fn a_disk_too_small_for_one_checkpoint_is_refused() -> Outcome {
    let disk = disk("1m")?;
    let run = Run::with(&["method.mae.encoder.width=96"]).at(disk.path().join("run"));
    train(&run, 2, &["MB free", "one checkpoint of this model takes", "another disk"]);
    Ok(())
}

fn a_disk_that_fills_up_keeps_the_last_checkpoint_whole() -> Outcome {
    let disk = disk("640k")?;
    let run = Run::with(&["checkpoint.keep_last=100"]).at(disk.path().join("run"));
    let end = run.start(2, &[]).end(30);
    assert_eq!(end.code, 74, "{}", end.told);
    assert!(end.told.contains("Free space there") && end.told.lines().count() == 1, "{}", end.told);
    let step = run.newest()?.manifest.step;
    assert!(step >= 2 * EVERY && step.is_multiple_of(EVERY), "step {step}");
    assert_eq!(run.folder().join("checkpoints").read_dir()?.count() as u64, step / EVERY, "half a checkpoint stayed");

    let [train, test] = ["train", "test"].map(|part| text(data().join(part)));
    let run = text(run.folder());
    let output = occlude(&["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol", "knn"])
        .output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(answer["step"], step);
    Ok(())
}
