//! Tests of ranks that are lost, frozen or inconsistent, of a lost launcher and of a second job: each ends soon, with
//! one message.

use crate::support::Outcome;
use crate::support::training_job::{Job, JobResult, Run, program, send_signal};
use rustix::process::Signal;
use std::time::{Duration, Instant};

crate::trials![
    a_killed_rank_ends_the_training_and_is_named,
    a_frozen_rank_ends_the_training_and_is_named,
    a_killed_launcher_leaves_no_process,
    ranks_with_different_configs_do_not_start,
    a_second_job_on_a_run_is_rejected,
];

/// Starts a training on two ranks that would run for minutes.
fn start_long_training() -> (Run, Job) {
    let run =
        Run::with_overrides(&["train.steps=100000", "checkpoint.every_steps=100000", "world.heartbeat_timeout_s=3"]);
    let mut job = run.start(2, &[]);
    job.wait_for_step(5);
    (run, job)
}

fn once(end: &JobResult, words: &[&str]) {
    assert_eq!(end.stderr.lines().count(), 1, "more than one message: {}", end.stderr);
    for word in words {
        assert!(end.stderr.contains(word), "no `{word}` in: {}", end.stderr);
    }
}

fn a_killed_rank_ends_the_training_and_is_named() -> Outcome {
    for rank in [0, 1] {
        let (_run, job) = start_long_training();
        send_signal(job.rank(rank), Signal::KILL);
        let end = job.end(30);
        assert_eq!(end.code, 70, "{}", end.stderr);
        once(&end, &[&format!("rank {rank} on host"), "SIGKILL"]);
    }
    Ok(())
}

fn a_frozen_rank_ends_the_training_and_is_named() -> Outcome {
    for rank in [0, 1] {
        let (_run, job) = start_long_training();
        send_signal(job.rank(rank), Signal::STOP);
        let end = job.end(30);
        assert_eq!(end.code, 70, "{}", end.stderr);
        once(&end, &[&format!("Rank {rank} on host"), "no sign of life", "limit 3.0 s"]);
    }
    Ok(())
}

fn a_killed_launcher_leaves_no_process() -> Outcome {
    let (run, job) = start_long_training();
    assert!(job.processes().len() >= 4, "launcher, mpirun and two ranks");
    send_signal(job.pid(), Signal::KILL);
    // `end` asserts that every process of the job is gone.
    job.end(30);
    // The run is free at once for the next job.
    std::fs::remove_file(run.folder().join("metrics.jsonl"))?;
    let start = Instant::now();
    let mut next = run.start(2, &[]);
    next.wait_for_step(2);
    assert!(start.elapsed() < Duration::from_secs(14), "waited for a dead holder: {:?}", start.elapsed());
    Ok(())
}

fn ranks_with_different_configs_do_not_start() -> Outcome {
    let run = Run::tiny();
    let odd = r#"if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then set -- "$@" --set optim.lr=0.125; fi; exec "$@""#;
    let end = run.launch(&["-n", "2"], &["sh", "-c", odd, "sh", program()], &[]).end(60);
    assert_eq!(end.code, 76, "{}", end.stderr);
    for words in ["Ranks disagree", "optim.lr: 0.002 on rank 0; 0.125 on rank 1"] {
        assert_eq!(end.stderr.matches(words).count(), 1, "`{words}` is not reported exactly once: {}", end.stderr);
    }
    assert!(!run.folder().exists(), "work was started");
    Ok(())
}

fn a_second_job_on_a_run_is_rejected() -> Outcome {
    let (run, mut job) = start_long_training();
    let end = run.start(0, &[]).end(60);
    assert_eq!(end.code, 73, "{}", end.stderr);
    let holder = format!("held by process {} on", job.rank(0));
    let last = end.stderr.lines().last().unwrap_or_default();
    assert!(last.contains(&holder) && last.contains("Wait for that job or stop it"), "{}", end.stderr);
    // The holder neither stopped nor lost a line.
    let visible = run.lines().last().expect("a line").step;
    job.wait_for_step(visible + 5);
    send_signal(job.pid(), Signal::TERM);
    let end = job.end(30);
    assert_eq!(end.code, 75, "{}", end.stderr);
    let steps: Vec<u64> = run.lines().iter().map(|line| line.step).collect();
    assert_eq!(steps, (1..=*run.saved().last().expect("a checkpoint")).collect::<Vec<_>>());
    Ok(())
}
