//! Tests of kills: whatever is killed, and whenever, the same command resumes as if nothing had happened, bit for bit.

use crate::support::Outcome;
use crate::support::training_job::{EVERY, Job, JobResult, Run, STEPS, program, reference_run, send_signal, wait_for};
use occlude::rng::{Philox, Purpose};
use rustix::process::Signal;
use std::path::PathBuf;
use std::time::Duration;

crate::trials![
    a_killed_rank_loses_no_step_and_no_bit,
    a_killed_job_loses_no_step_and_no_bit,
    the_launcher_restarts_a_job_after_killed_ranks,
    a_damaged_newest_checkpoint_costs_time_but_no_bit,
    a_run_without_an_intact_checkpoint_is_not_restarted,
    a_finished_run_is_left_unchanged,
];

/// A moment sampled from a seed: a rank, a step, a fraction of a step. Printed when a test fails.
struct Moment {
    seed: u64,
    rank: usize,
    step: u64,
    pause: Duration,
}

impl Moment {
    fn draw(seed: u64) -> Moment {
        let mut draw = Philox::new(seed, 0, 0, Purpose::Order, 0);
        let rank = draw.uniform_int(2) as usize;
        let step = 2 + draw.uniform_int(STEPS / 2);
        Moment { seed, rank, step, pause: Duration::from_micros(draw.uniform_int(8000)) }
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Moment { seed, rank, step, pause } = self;
            eprintln!("moment of seed {seed}: rank {rank}, {pause:?} after step {step}");
        }
    }
}

/// Returns a training on two ranks that `strike` ended at the moment of the seed. On a busy machine a training may
/// finish before the kill, which shows nothing; it is tried again then.
fn kill_training(seed: u64, strike: impl Fn(&Job, &Moment)) -> (Run, JobResult) {
    let moment = Moment::draw(seed);
    for _ in 0..5 {
        let run = Run::tiny();
        let mut job = run.start(2, &[]);
        job.wait_for_step(moment.step);
        std::thread::sleep(moment.pause);
        strike(&job, &moment);
        let end = job.end(30);
        if run.saved().last() < Some(&STEPS) {
            return (run, end);
        }
    }
    panic!("killed too late for this test, five times");
}

fn a_killed_rank_loses_no_step_and_no_bit() -> Outcome {
    for seed in [1, 2, 3] {
        let (run, end) = kill_training(seed, |job, moment| send_signal(job.rank(moment.rank), Signal::KILL));
        assert_eq!(end.code, 70, "{}", end.stderr);
        run.finish(2, &[]);
        run.assert_same_as(reference_run(2))?;
    }
    Ok(())
}

fn a_killed_job_loses_no_step_and_no_bit() -> Outcome {
    for seed in [4, 5, 6] {
        let (run, _) =
            kill_training(seed, |job, _| job.processes().into_iter().for_each(|pid| send_signal(pid, Signal::KILL)));
        run.finish(2, &[]);
        run.assert_same_as(reference_run(2))?;
    }
    Ok(())
}

/// A rank is killed three times while one command runs.
fn the_launcher_restarts_a_job_after_killed_ranks() -> Outcome {
    let run = Run::tiny();
    let mut job = run.launch(&["-n", "2", "--restarts", "3"], &[program()], &[]);
    for (seed, from) in [(7, 0), (8, 60), (9, 120)] {
        let moment = Moment::draw(seed);
        job.wait_for_step(from + moment.step / 4 + 1);
        std::thread::sleep(moment.pause);
        let ranks = [job.rank(0), job.rank(1)];
        send_signal(ranks[moment.rank], Signal::KILL);
        wait_for(20, "the other rank is gone", || !job.processes().iter().any(|pid| ranks.contains(pid)));
    }
    let end = job.end(60);
    assert_eq!(end.code, 0, "{}", end.stderr);
    for restart in 1..=3 {
        assert!(end.stderr.contains(&format!("restart {restart} of 3")), "{}", end.stderr);
    }
    run.assert_same_as(reference_run(2))
}

/// Returns the files of the newest checkpoint: the manifest, and the one part.
fn newest_files(run: &Run) -> (PathBuf, PathBuf) {
    let step = *run.saved().last().expect("a checkpoint");
    let folder = run.folder().join(format!("checkpoints/step-{step:08}"));
    let files = folder.read_dir().expect("a checkpoint").flatten().map(|entry| entry.path());
    let part = files.into_iter().find(|path| path.extension().is_some_and(|end| end == "safetensors"));
    (folder.join("manifest.json"), part.expect("a part"))
}

/// Returns a training in a single process, stopped after some checkpoints.
fn stopped_run() -> Run {
    let run = Run::tiny();
    let mut job = run.start(0, &[]);
    job.wait_for_step(3 * EVERY + 5);
    send_signal(job.pid(), Signal::USR1);
    let end = job.end(30);
    assert_eq!(end.code, 75, "{}", end.stderr);
    run
}

fn a_damaged_newest_checkpoint_costs_time_but_no_bit() -> Outcome {
    let before = stopped_run();
    let newest = before.newest_checkpoint()?.manifest.step;
    type Damage = (&'static str, fn(&Run) -> std::io::Result<()>);
    let damages: [Damage; 3] = [
        ("digest", |run| {
            let (_, part) = newest_files(run);
            let mut bytes = std::fs::read(&part)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(part, bytes)
        }),
        ("is missing", |run| std::fs::remove_file(newest_files(run).1)),
        ("manifest is damaged", |run| {
            let (manifest, _) = newest_files(run);
            let bytes = std::fs::read(&manifest)?;
            std::fs::write(manifest, &bytes[..bytes.len() / 2])
        }),
    ];
    for (why, damage) in damages {
        let run = before.copy();
        damage(&run)?;
        let output = run.finish(0, &[]);
        assert!(output.contains(&format!("passing over the checkpoint at step {newest}")), "{output}");
        assert!(output.contains(why), "no `{why}` in: {output}");
        run.assert_same_as(reference_run(0)).map_err(|failed| format!("{why}: {failed:?}"))?;
    }
    Ok(())
}

fn a_run_without_an_intact_checkpoint_is_not_restarted() -> Outcome {
    let run = stopped_run();
    for step in run.saved() {
        std::fs::write(run.folder().join(format!("checkpoints/step-{step:08}/manifest.json")), "{")?;
    }
    let lines = run.lines();
    let end = run.start(0, &[]).end(60);
    assert!(end.code == 78 && end.stderr.contains("no checkpoint there can be used"), "{}: {}", end.code, end.stderr);
    assert_eq!(run.lines(), lines);
    Ok(())
}

fn a_finished_run_is_left_unchanged() -> Outcome {
    let run = reference_run(0).copy();
    let output = run.finish(0, &[]);
    assert!(output.contains(&format!("has done its {STEPS} steps already")), "{output}");
    run.assert_same_as(reference_run(0))
}
