//! Tests of `occlude doctor`: every check has a line, and no secret is shown.

use crate::support::Outcome;
use crate::support::training_job::occlude_command;
use libtest_mimic::Failed;
use occlude::doctor;
use occlude::doctor::{Check, CheckStatus};
use std::path::Path;

crate::trials![
    doctor_lists_every_check,
    waiting_threads_sleep_unless_the_user_decides_otherwise,
    doctor_names_credentials_without_their_values,
];

/// Set in the child that prints the table of the doctor for the test below.
const CHILD: &str = "OCCLUDE_TEST_DOCTOR_CHILD";

fn doctor_lists_every_check() -> Outcome {
    let checks = doctor::run_checks();
    if std::env::var_os(CHILD).is_some() {
        println!("{}", doctor::format_table(&checks));
        return Ok(());
    }
    let line_of =
        |label: &str| checks.iter().find(|check| check.name == label).unwrap_or_else(|| panic!("no line for {label}"));
    assert!(line_of("libtorch").detail.starts_with("2.11.0"), "{:?}", line_of("libtorch"));
    assert!(line_of("MPI library").detail.contains("Open MPI v5"), "{:?}", line_of("MPI library"));
    assert_eq!(line_of("mpirun").status, CheckStatus::Ok);
    assert!(line_of("NVRTC").detail.contains("libnvrtc.so"), "{:?}", line_of("NVRTC"));
    assert!(line_of("NCCL").detail.contains("libnccl.so"), "{:?}", line_of("NCCL"));
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    assert_eq!(line_of("NVIDIA driver").status == CheckStatus::NotNeeded, !driver);
    for label in [
        "libtorch, CUDA half",
        "bridge, CUDA half",
        "FFmpeg",
        "store credentials",
        "cores",
        "waiting threads",
        "open files",
        "other limits",
        "memory",
    ] {
        assert!(!line_of(label).detail.is_empty(), "{label}");
    }
    for label in ["shared memory", "disk, this folder", "disk, cache folder"] {
        assert!(line_of(label).detail.contains(" free of "), "{:?}", line_of(label));
    }
    for check in checks.iter().filter(|check| check.status == CheckStatus::Missing) {
        assert!(!check.remedy.is_empty(), "{} is missing without a remedy", check.name);
    }
    let lone = Check { name: "x", status: CheckStatus::Missing, detail: "not there".into(), remedy: "get it".into() };
    assert_eq!(doctor::format_table(&[lone]), "x  MISSING       not there  ->  get it\n");
    Ok(())
}

/// Returns what the doctor prints about waiting threads under this variable.
fn wait_policy_under(variable: Option<(&str, &str)>) -> Result<String, Failed> {
    let mut command = occlude_command(&["doctor"]);
    command.env_remove("OMP_WAIT_POLICY").env_remove("GOMP_SPINCOUNT").envs(variable);
    let table = String::from_utf8(command.output()?.stdout)?;
    let line = table.lines().find(|line| line.starts_with("waiting threads"));
    Ok(line.unwrap_or_else(|| panic!("no line: {table}")).split_whitespace().last().expect("a word").to_owned())
}

fn waiting_threads_sleep_unless_the_user_decides_otherwise() -> Outcome {
    assert_eq!(wait_policy_under(None)?, "OMP_WAIT_POLICY=passive");
    for (name, value) in [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000")] {
        assert_eq!(wait_policy_under(Some((name, value)))?, format!("{name}={value}"));
    }
    Ok(())
}

fn doctor_names_credentials_without_their_values() -> Outcome {
    let home = tempfile::tempdir()?;
    std::fs::create_dir(home.path().join(".aws"))?;
    std::fs::write(home.path().join(".aws/credentials"), "canary-in-file")?;
    let child = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "doctor::doctor_lists_every_check"])
        .envs([(CHILD, "1"), ("AWS_SECRET_ACCESS_KEY", "canary-in-variable"), ("AWS_PROFILE", "")])
        .env("HOME", home.path())
        .output()?;
    let output = format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && output.contains("AWS_SECRET_ACCESS_KEY"), "{output}");
    assert!(output.contains("~/.aws/credentials"), "{output}");
    assert!(!output.contains("AWS_PROFILE"), "an empty variable does not count: {output}");
    assert!(!output.contains("canary"), "{output}");
    Ok(())
}
