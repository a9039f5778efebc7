//! Tests of runs on a disk that is read-only, too small, or fills up.

use crate::checkpoint::full_disk::{Tmpfs, no_tmpfs};
use crate::cli::usage_errors::assert_training_rejected;
use crate::support::training_job::{EVERY, Run, occlude_command, shared_data};
use crate::support::{Outcome, path_text};

crate::trials![;
    no_tmpfs:
    a_read_only_run_folder_is_rejected,
    a_disk_too_small_for_one_checkpoint_is_rejected,
    a_disk_that_fills_up_keeps_the_last_checkpoint_intact,
];

fn disk(size: &str) -> Result<Tmpfs, libtest_mimic::Failed> {
    Ok(Tmpfs::mount(size).ok_or("no tmpfs, though one could be mounted before")?)
}

fn a_read_only_run_folder_is_rejected() -> Outcome {
    let disk = disk("1m")?;
    disk.read_only()?;
    for folder in [disk.path().to_owned(), disk.path().join("run")] {
        assert_training_rejected(&Run::tiny().at(folder), 0, &["Read-only file system", "give --run a"]);
    }
    Ok(())
}

fn a_disk_too_small_for_one_checkpoint_is_rejected() -> Outcome {
    let disk = disk("1m")?;
    let run = Run::with_overrides(&["method.mae.encoder.width=96"]).at(disk.path().join("run"));
    assert_training_rejected(&run, 2, &["MB free", "one checkpoint of this model takes", "another disk"]);
    Ok(())
}

fn a_disk_that_fills_up_keeps_the_last_checkpoint_intact() -> Outcome {
    let disk = disk("640k")?;
    let run = Run::with_overrides(&["checkpoint.keep_last=100"]).at(disk.path().join("run"));
    let end = run.start(2, &[]).end(30);
    assert_eq!(end.code, 74, "{}", end.stderr);
    assert!(end.stderr.contains("Free space there") && end.stderr.lines().count() == 1, "{}", end.stderr);
    let step = run.newest_checkpoint()?.manifest.step;
    assert!(step >= 2 * EVERY && step.is_multiple_of(EVERY), "step {step}");
    assert_eq!(run.folder().join("checkpoints").read_dir()?.count() as u64, step / EVERY, "half a checkpoint was left");

    let [train, test] = ["train", "test"].map(|part| path_text(shared_data().join(part)));
    let run = path_text(run.folder());
    let output =
        occlude_command(&["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol", "knn"])
            .output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let reply: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(reply["step"], step);
    Ok(())
}
