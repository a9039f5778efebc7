//! Kills: whatever dies, and whenever, the same command goes on as if nothing had happened, to the bit.

use crate::job::{EVERY, End, Job, Run, STEPS, program, signal, undisturbed, within};
use crate::support::Outcome;
use occlude::rng::{Draw, Purpose};
use rustix::process::Signal;
use std::path::PathBuf;
use std::time::Duration;

crate::trials![
    a_killed_rank_costs_no_step_and_no_bit,
    a_job_killed_whole_costs_no_step_and_no_bit,
    the_launcher_carries_a_job_over_killed_ranks,
    a_damaged_newest_checkpoint_costs_time_and_no_bit,
    a_run_without_a_whole_checkpoint_is_not_begun_anew,
    a_finished_run_is_left_as_it_is,
];

/// A moment drawn from a seed: a rank, a step, a part of a step. Told where a test fails.
struct Moment {
    seed: u64,
    rank: usize,
    step: u64,
    pause: Duration,
}

impl Moment {
    fn draw(seed: u64) -> Moment {
        let mut draw = Draw::new(seed, 0, 0, Purpose::Order, 0);
        let (rank, step) = (draw.below(2) as usize, 2 + draw.below(STEPS / 2));
        Moment { seed, rank, step, pause: Duration::from_micros(draw.below(8000)) }
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

/// A training on two ranks that `strike` ended at the seed's moment. A busy machine may let a training finish before
/// the blow falls, which shows nothing; it is tried again then.
fn struck(seed: u64, strike: impl Fn(&Job, &Moment)) -> (Run, End) {
    let moment = Moment::draw(seed);
    for _ in 0..5 {
        let run = Run::tiny();
        let mut job = run.start(2, &[]);
        job.reach(moment.step);
        std::thread::sleep(moment.pause);
        strike(&job, &moment);
        let end = job.end(30);
        if run.saved().last() < Some(&STEPS) {
            return (run, end);
        }
    }
    panic!("killed too late to show anything, five times");
}

fn a_killed_rank_costs_no_step_and_no_bit() -> Outcome {
    for seed in [1, 2, 3] {
        let (run, end) = struck(seed, |job, moment| signal(job.rank(moment.rank), Signal::KILL));
        assert_eq!(end.code, 70, "{}", end.told);
        run.finish(2, &[]);
        run.same_as(undisturbed(2))?;
    }
    Ok(())
}

fn a_job_killed_whole_costs_no_step_and_no_bit() -> Outcome {
    for seed in [4, 5, 6] {
        let (run, _) = struck(seed, |job, _| job.processes().into_iter().for_each(|pid| signal(pid, Signal::KILL)));
        run.finish(2, &[]);
        run.same_as(undisturbed(2))?;
    }
    Ok(())
}

/// A rank is killed three times while one command runs.
fn the_launcher_carries_a_job_over_killed_ranks() -> Outcome {
    let run = Run::tiny();
    let mut job = run.launch(&["-n", "2", "--restarts", "3"], &[program()], &[]);
    for (seed, from) in [(7, 0), (8, 60), (9, 120)] {
        let moment = Moment::draw(seed);
        job.reach(from + moment.step / 4 + 1);
        std::thread::sleep(moment.pause);
        let ranks = [job.rank(0), job.rank(1)];
        signal(ranks[moment.rank], Signal::KILL);
        within(20, "the other rank is gone", || !job.processes().iter().any(|pid| ranks.contains(pid)));
    }
    let end = job.end(60);
    assert_eq!(end.code, 0, "{}", end.told);
    for restart in 1..=3 {
        assert!(end.told.contains(&format!("restart {restart} of 3")), "{}", end.told);
    }
    run.same_as(undisturbed(2))
}

/// Where the newest checkpoint's files are: the manifest, and the one part.
fn files(run: &Run) -> (PathBuf, PathBuf) {
    let step = *run.saved().last().expect("a checkpoint");
    let folder = run.folder().join(format!("checkpoints/step-{step:08}"));
    let files = folder.read_dir().expect("a checkpoint").flatten().map(|entry| entry.path());
    let part = files.into_iter().find(|path| path.extension().is_some_and(|end| end == "safetensors"));
    (folder.join("manifest.json"), part.expect("a part"))
}

/// A plain training stopped after some checkpoints.
fn stopped() -> Run {
    let run = Run::tiny();
    let mut job = run.start(0, &[]);
    job.reach(3 * EVERY + 5);
    signal(job.pid(), Signal::USR1);
    let end = job.end(30);
    assert_eq!(end.code, 75, "{}", end.told);
    run
}

fn a_damaged_newest_checkpoint_costs_time_and_no_bit() -> Outcome {
    let before = stopped();
    let newest = before.newest()?.manifest.step;
    type Damage = (&'static str, fn(&Run) -> std::io::Result<()>);
    let damages: [Damage; 3] = [
        ("digest", |run| {
            let (_, part) = files(run);
            let mut bytes = std::fs::read(&part)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(part, bytes)
        }),
        ("is missing", |run| std::fs::remove_file(files(run).1)),
        ("manifest is damaged", |run| {
            let (manifest, _) = files(run);
            let bytes = std::fs::read(&manifest)?;
            std::fs::write(manifest, &bytes[..bytes.len() / 2])
        }),
    ];
    for (why, damage) in damages {
        let run = before.copy();
        damage(&run)?;
        let told = run.finish(0, &[]);
        assert!(told.contains(&format!("passing over the checkpoint at step {newest}")), "{told}");
        assert!(told.contains(why), "no `{why}` in: {told}");
        run.same_as(undisturbed(0)).map_err(|failed| format!("{why}: {failed:?}"))?;
    }
    Ok(())
}

fn a_run_without_a_whole_checkpoint_is_not_begun_anew() -> Outcome {
    let run = stopped();
    for step in run.saved() {
        std::fs::write(run.folder().join(format!("checkpoints/step-{step:08}/manifest.json")), "{")?;
    }
    let lines = run.lines();
    let end = run.start(0, &[]).end(60);
    assert!(end.code == 78 && end.told.contains("no checkpoint there can be used"), "{}: {}", end.code, end.told);
    assert_eq!(run.lines(), lines);
    Ok(())
}

fn a_finished_run_is_left_as_it_is() -> Outcome {
    let run = undisturbed(0).copy();
    let told = run.finish(0, &[]);
    assert!(told.contains(&format!("has done its {STEPS} steps already")), "{told}");
    run.same_as(undisturbed(0))
}
