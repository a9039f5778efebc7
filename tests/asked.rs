//! Requests: a job that is asked to stop saves the step that it is at, and the same command goes on from there.

use crate::job::{Job, Run, STEPS, signal, undisturbed};
use crate::support::Outcome;
use rustix::process::Signal;
use std::time::Instant;

crate::trials![
    sigterm_to_the_launcher_saves_and_ends_with_75,
    sigterm_and_sigusr1_to_a_plain_process_save_and_end_with_75,
    sigusr1_to_one_rank_stops_all_after_the_same_step,
    sigusr2_saves_and_goes_on,
    no_thread_that_computes_is_interrupted,
    a_run_begun_from_another_goes_on_from_its_own,
];

/// The job has stopped on request: in time, saved where it stood, with one sentence.
fn stopped(run: &Run, job: Job, since: Instant) -> u64 {
    let end = job.end(30);
    assert!(since.elapsed().as_secs() < 25, "{:?}", since.elapsed());
    assert_eq!(end.code, 75, "{}", end.told);
    let last = run.lines().last().expect("a line").step;
    assert!(last < STEPS, "stopped too late to show anything");
    assert_eq!(run.saved().last(), Some(&last), "the last step is not the saved one");
    // Before that, a job that went on has said from where.
    let told: Vec<&str> = end.told.lines().filter(|line| !line.contains("goes on after step")).collect();
    assert_eq!(told, [format!("occlude: saved after step {last} and stopped, as requested")]);
    last
}

fn sigterm_to_the_launcher_saves_and_ends_with_75() -> Outcome {
    let run = Run::tiny();
    let mut job = run.start(2, &[]);
    job.reach(33);
    let asked = Instant::now();
    signal(job.pid(), Signal::TERM);
    assert!(stopped(&run, job, asked) >= 33);
    run.finish(2, &[]);
    run.same_as(undisturbed(2))
}

fn sigterm_and_sigusr1_to_a_plain_process_save_and_end_with_75() -> Outcome {
    let run = Run::tiny();
    for (request, step) in [(Signal::TERM, 25), (Signal::USR1, 101)] {
        let mut job = run.start(0, &[]);
        job.reach(step);
        let asked = Instant::now();
        signal(job.pid(), request);
        assert!(stopped(&run, job, asked) >= step);
    }
    run.finish(0, &[]);
    run.same_as(undisturbed(0))
}

fn sigusr1_to_one_rank_stops_all_after_the_same_step() -> Outcome {
    let run = Run::tiny();
    let mut job = run.start(2, &[]);
    job.reach(41);
    let asked = Instant::now();
    signal(job.rank(1), Signal::USR1);
    stopped(&run, job, asked);
    run.finish(2, &[]);
    run.same_as(undisturbed(2))
}

fn sigusr2_saves_and_goes_on() -> Outcome {
    let run = Run::with(&["checkpoint.every_steps=100000", "checkpoint.keep_last=9"]);
    let mut job = run.start(2, &[]);
    job.reach(20);
    signal(job.pid(), Signal::USR2);
    let end = job.end(60);
    assert_eq!((end.code, end.told.as_str()), (0, ""));
    let saved = run.saved();
    // The signal may reach one rank a step later than the other, and is then a second request.
    let (last, asked) = saved.split_last().expect("a checkpoint");
    let spread = asked.iter().max().zip(asked.iter().min()).map(|(most, least)| most - least);
    assert!(*last == STEPS && asked[0] >= 20 && spread.is_some_and(|spread| spread <= 1), "{saved:?}");
    run.same_as(undisturbed(2))
}

/// A signal amid a library's matrix product has been seen to damage the heap: one thread hears them all.
fn no_thread_that_computes_is_interrupted() -> Outcome {
    let run = Run::with(&["train.steps=50000"]);
    let mut job = run.start(2, &[]);
    job.reach(10);
    let signals = [Signal::TERM, Signal::INT, Signal::USR1, Signal::USR2];
    let all = signals.iter().fold(0u64, |mask, signal| mask | 1 << (signal.as_raw() - 1));
    for thread in std::fs::read_dir(format!("/proc/{}/task", job.rank(0)))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a status has it");
            line.trim().to_owned()
        };
        let (name, masked) = (field("Name:"), u64::from_str_radix(&field("SigBlk:"), 16)?);
        let wanted = if name == "signals" { 0 } else { all };
        assert_eq!(masked & all, wanted, "thread {name}");
    }
    signal(job.pid(), Signal::TERM);
    assert_eq!(job.end(30).code, 75);
    Ok(())
}

/// `--resume URL` begins there, and leaves it as it is; the same command after a stop goes on from the run's own
/// checkpoint; one of its own takes the run back.
fn a_run_begun_from_another_goes_on_from_its_own() -> Outcome {
    let first = Run::with(&["checkpoint.keep_last=9"]);
    let mut job = first.start(0, &[]);
    job.reach(50);
    signal(job.pid(), Signal::USR1);
    let at = stopped(&first, job, Instant::now());
    let url = first.folder();
    let url = url.to_str().expect("UTF-8");

    let run = Run::tiny();
    let mut job = run.start(0, &["--resume", url]);
    job.reach(at + 30);
    signal(job.pid(), Signal::USR1);
    let own = stopped(&run, job, Instant::now());
    assert_eq!(run.lines()[0].step, at + 1, "did not begin where the other run stood");
    assert_eq!(first.saved().last(), Some(&at), "the other run was touched");

    let told = run.finish(0, &["--resume", url]);
    assert!(told.contains(&format!("its own checkpoint of step {own}")), "{told}");
    let steps: Vec<u64> = run.lines().iter().map(|line| line.step).collect();
    assert_eq!(steps, (at + 1..=STEPS).collect::<Vec<_>>());
    assert_eq!(run.newest()?.tensors, undisturbed(0).newest()?.tensors);

    let back = first.folder().join("checkpoints/step-00000040");
    first.finish(0, &["--resume", back.to_str().expect("UTF-8")]);
    first.same_as(undisturbed(0))
}
