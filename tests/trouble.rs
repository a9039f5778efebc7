//! Ranks that are lost, frozen or different, a lost launcher, a second job: each ends soon, told once.

use crate::job::{End, Job, Run, program, signal};
use crate::support::Outcome;
use rustix::process::Signal;
use std::time::{Duration, Instant};

crate::trials![
    a_killed_rank_ends_the_training_and_is_named,
    a_frozen_rank_ends_the_training_and_is_named,
    a_killed_launcher_leaves_no_process,
    ranks_with_different_configs_never_begin,
    a_second_job_on_a_run_is_refused,
];

/// A training that would run for minutes, under way on two ranks.
fn long() -> (Run, Job) {
    let run = Run::with(&["train.steps=100000", "checkpoint.every_steps=100000", "world.frozen_s=3"]);
    let mut job = run.start(2, &[]);
    job.reach(5);
    (run, job)
}

fn once(end: &End, words: &[&str]) {
    assert_eq!(end.told.lines().count(), 1, "more than one message: {}", end.told);
    for word in words {
        assert!(end.told.contains(word), "no `{word}` in: {}", end.told);
    }
}

fn a_killed_rank_ends_the_training_and_is_named() -> Outcome {
    for rank in [0, 1] {
        let (_run, job) = long();
        signal(job.rank(rank), Signal::KILL);
        let end = job.end(30);
        assert_eq!(end.code, 70, "{}", end.told);
        once(&end, &[&format!("rank {rank} on host"), "SIGKILL"]);
    }
    Ok(())
}

fn a_frozen_rank_ends_the_training_and_is_named() -> Outcome {
    for rank in [0, 1] {
        let (_run, job) = long();
        signal(job.rank(rank), Signal::STOP);
        let end = job.end(30);
        assert_eq!(end.code, 70, "{}", end.told);
        once(&end, &[&format!("Rank {rank} on host"), "no sign of life", "limit 3.0 s"]);
    }
    Ok(())
}

fn a_killed_launcher_leaves_no_process() -> Outcome {
    let (run, job) = long();
    assert!(job.processes().len() >= 4, "launcher, mpirun and two ranks");
    signal(job.pid(), Signal::KILL);
    // `end` wants every process of the job gone.
    job.end(30);
    // The run is free at once for the next job.
    std::fs::remove_file(run.folder().join("metrics.jsonl"))?;
    let begun = Instant::now();
    let mut next = run.start(2, &[]);
    next.reach(2);
    assert!(begun.elapsed() < Duration::from_secs(14), "waited for a dead holder: {:?}", begun.elapsed());
    Ok(())
}

fn ranks_with_different_configs_never_begin() -> Outcome {
    let run = Run::tiny();
    let odd = r#"if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then set -- "$@" --set optim.lr=0.125; fi; exec "$@""#;
    let end = run.launch(&["-n", "2"], &["sh", "-c", odd, "sh", program()], &[]).end(60);
    assert_eq!(end.code, 76, "{}", end.told);
    for words in ["Ranks disagree", "optim.lr: 0.002 on rank 0; 0.125 on rank 1"] {
        assert_eq!(end.told.matches(words).count(), 1, "`{words}` is not told once: {}", end.told);
    }
    assert!(!run.folder().exists(), "work had begun");
    Ok(())
}

fn a_second_job_on_a_run_is_refused() -> Outcome {
    let (run, mut job) = long();
    let end = run.start(0, &[]).end(60);
    assert_eq!(end.code, 73, "{}", end.told);
    let holder = format!("held by process {} on", job.rank(0));
    let last = end.told.lines().last().unwrap_or_default();
    assert!(last.contains(&holder) && last.contains("Wait for that job or stop it"), "{}", end.told);
    // The holder neither stopped nor lost a line.
    let seen = run.lines().last().expect("a line").step;
    job.reach(seen + 5);
    signal(job.pid(), Signal::TERM);
    let end = job.end(30);
    assert_eq!(end.code, 75, "{}", end.told);
    let steps: Vec<u64> = run.lines().iter().map(|line| line.step).collect();
    assert_eq!(steps, (1..=*run.saved().last().expect("a checkpoint")).collect::<Vec<_>>());
    Ok(())
}
