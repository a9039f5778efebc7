//! Tests of stop requests: a job that is asked to stop saves its current step, and the same command resumes there.

use crate::support::Outcome;
use crate::support::training_job::{Job, Run, STEPS, reference_run, send_signal};
use rustix::process::Signal;
use std::time::Instant;

crate::trials![
    sigterm_to_the_launcher_saves_and_exits_with_75,
    sigterm_and_sigusr1_to_a_single_process_save_and_exit_with_75,
    sigusr1_to_one_rank_stops_all_after_the_same_step,
    sigusr2_saves_and_continues,
    compute_threads_receive_no_signals,
    a_run_initialized_from_another_resumes_from_its_own_checkpoints,
];

/// Asserts that the job stopped on request: in time, saved at its step, with one message; returns the step.
fn assert_stopped(run: &Run, job: Job, since: Instant) -> u64 {
    let end = job.end(30);
    assert!(since.elapsed().as_secs() < 25, "{:?}", since.elapsed());
    assert_eq!(end.code, 75, "{}", end.stderr);
    let last = run.lines().last().expect("a line").step;
    assert!(last < STEPS, "stopped too late for this test");
    assert_eq!(run.saved().last(), Some(&last), "the last step is not the saved one");
    // Before that, a resumed job has reported from where.
    let output: Vec<&str> = end.stderr.lines().filter(|line| !line.contains("goes on after step")).collect();
    assert_eq!(output, [format!("occlude: saved after step {last} and stopped, as requested")]);
    last
}

fn sigterm_to_the_launcher_saves_and_exits_with_75() -> Outcome {
    let run = Run::tiny();
    let mut job = run.start(2, &[]);
    job.wait_for_step(33);
    let request = Instant::now();
    send_signal(job.pid(), Signal::TERM);
    assert!(assert_stopped(&run, job, request) >= 33);
    run.finish(2, &[]);
    run.assert_same_as(reference_run(2))
}

fn sigterm_and_sigusr1_to_a_single_process_save_and_exit_with_75() -> Outcome {
    let run = Run::tiny();
    for (request, step) in [(Signal::TERM, 25), (Signal::USR1, 101)] {
        let mut job = run.start(0, &[]);
        job.wait_for_step(step);
        let query = Instant::now();
        send_signal(job.pid(), request);
        assert!(assert_stopped(&run, job, query) >= step);
    }
    run.finish(0, &[]);
    run.assert_same_as(reference_run(0))
}

fn sigusr1_to_one_rank_stops_all_after_the_same_step() -> Outcome {
    let run = Run::tiny();
    let mut job = run.start(2, &[]);
    job.wait_for_step(41);
    let request = Instant::now();
    send_signal(job.rank(1), Signal::USR1);
    assert_stopped(&run, job, request);
    run.finish(2, &[]);
    run.assert_same_as(reference_run(2))
}

fn sigusr2_saves_and_continues() -> Outcome {
    let run = Run::with_overrides(&["checkpoint.every_steps=100000", "checkpoint.keep_last=9"]);
    let mut job = run.start(2, &[]);
    job.wait_for_step(20);
    send_signal(job.pid(), Signal::USR2);
    let end = job.end(60);
    assert_eq!((end.code, end.stderr.as_str()), (0, ""));
    let saved = run.saved();
    // The signal may reach one rank a step later than the other, and is then a second request.
    let (last, request) = saved.split_last().expect("a checkpoint");
    let spread = request.iter().max().zip(request.iter().min()).map(|(max, min)| max - min);
    assert!(*last == STEPS && request[0] >= 20 && spread.is_some_and(|spread| spread <= 1), "{saved:?}");
    run.assert_same_as(reference_run(2))
}

/// A signal during a matrix product of a library has been seen to damage the heap, so one thread receives them all.
fn compute_threads_receive_no_signals() -> Outcome {
    let run = Run::with_overrides(&["train.steps=50000"]);
    let mut job = run.start(2, &[]);
    job.wait_for_step(10);
    let signals = [Signal::TERM, Signal::INT, Signal::USR1, Signal::USR2];
    let all = signals.iter().fold(0u64, |mask, signal| mask | 1 << (signal.as_raw() - 1));
    for thread in std::fs::read_dir(format!("/proc/{}/task", job.rank(0)))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a status has it");
            line.trim().to_owned()
        };
        let name = field("Name:");
        let masked = u64::from_str_radix(&field("SigBlk:"), 16)?;
        let expected = if name == "signals" { 0 } else { all };
        assert_eq!(masked & all, expected, "thread {name}");
    }
    send_signal(job.pid(), Signal::TERM);
    assert_eq!(job.end(30).code, 75);
    Ok(())
}

/// `--resume URL` starts there, and leaves that run unchanged; the same command after a stop resumes from the run's own
/// checkpoint; a checkpoint of its own rewinds the run.
fn a_run_initialized_from_another_resumes_from_its_own_checkpoints() -> Outcome {
    let first = Run::with_overrides(&["checkpoint.keep_last=9"]);
    let mut job = first.start(0, &[]);
    job.wait_for_step(50);
    send_signal(job.pid(), Signal::USR1);
    let first_stop = assert_stopped(&first, job, Instant::now());
    let url = first.folder();
    let url = url.to_str().expect("UTF-8");

    let run = Run::tiny();
    let mut job = run.start(0, &["--resume", url]);
    job.wait_for_step(first_stop + 30);
    send_signal(job.pid(), Signal::USR1);
    let second_stop = assert_stopped(&run, job, Instant::now());
    assert_eq!(run.lines()[0].step, first_stop + 1, "did not start from the checkpoint of the other run");
    assert_eq!(first.saved().last(), Some(&first_stop), "the other run was changed");

    let output = run.finish(0, &["--resume", url]);
    assert!(output.contains(&format!("its own checkpoint of step {second_stop}")), "{output}");
    let steps: Vec<u64> = run.lines().iter().map(|line| line.step).collect();
    assert_eq!(steps, (first_stop + 1..=STEPS).collect::<Vec<_>>());
    assert_eq!(run.newest_checkpoint()?.tensors, reference_run(0).newest_checkpoint()?.tensors);

    let earlier = first.folder().join("checkpoints/step-00000040");
    first.finish(0, &["--resume", earlier.to_str().expect("UTF-8")]);
    first.assert_same_as(reference_run(0))
}
