//! Tests of the launcher and of the ends of a job: signals, lost ranks, frozen ranks, a lost launcher.

use crate::support::{Outcome, root};
use occlude::dist::{Heartbeat, HeartbeatTimeouts, Phase, SignalRequests};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

crate::trials![
    sigterm_lets_ranks_save_and_stop,
    a_second_sigterm_stops_at_once,
    a_killed_rank_ends_the_job_and_is_named,
    a_frozen_rank_ends_the_job_and_is_named,
    a_stuck_rank_ends_the_job_and_is_named,
    a_killed_launcher_leaves_no_rank,
    the_exit_code_of_a_rank_is_passed_on,
    restarts_stop_without_progress,
    a_pinned_rank_gets_its_share_of_cores,
    an_mpirun_that_fails_to_start_is_retried,
];

/// Runs one rank of these tests: steps until it is asked to stop, saves for 2 s and exits with 75.
pub fn case(name: &str) -> i32 {
    if name == "ground" {
        println!("threads {}, cores {}", occlude::dist::pin_threads(None), cores());
        return 0;
    }
    let requests = SignalRequests::listen().expect("signals");
    let world = occlude::dist::init_world().expect("a launcher");
    let limits = HeartbeatTimeouts { silence: Duration::from_secs(3), ..HeartbeatTimeouts::default() };
    let pulse =
        Heartbeat::start(&world, limits.with_phase(Phase::Compute, Duration::from_secs(2))).expect("a heartbeat");
    let beat = pulse.progress_handle();
    let folder = std::path::PathBuf::from(std::env::var_os("OCCLUDE_FOLDER").expect("a folder"));
    std::fs::write(folder.join(format!("pid-{}", world.rank())), std::process::id().to_string()).expect("pid");
    let mut step = 0;
    while !requests.poll().stop {
        step += 1;
        beat.report(step, Phase::Compute);
        std::thread::sleep(Duration::from_millis(20));
        if name == "stuck" && world.rank() == 1 && step == 12 {
            std::thread::sleep(Duration::from_secs(60));
        }
    }
    beat.report(step, Phase::Save);
    std::thread::sleep(Duration::from_secs(2));
    std::fs::write(folder.join(format!("saved-{}", world.rank())), step.to_string()).expect("saved");
    pulse.finish();
    world.leave(Duration::from_secs(20)).expect("every rank leaves");
    75
}

/// Two ranks of a case under launch/mpirun.
struct Job {
    child: Child,
    folder: tempfile::TempDir,
}

impl Job {
    fn start(case: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let child = launcher()
            .args(["-n", "2", "--"])
            .arg(std::env::current_exe().expect("this binary"))
            .envs([("OCCLUDE_CASE", case), ("OMP_NUM_THREADS", "1")])
            .env("OCCLUDE_FOLDER", folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .expect("launch/mpirun starts");
        let job = Job { child, folder };
        wait_for(60, "both ranks run", || (0..2).all(|rank| job.pid(rank).is_some()));
        std::thread::sleep(Duration::from_millis(600));
        job
    }
    fn pid(&self, rank: usize) -> Option<u32> {
        std::fs::read_to_string(self.folder.path().join(format!("pid-{rank}"))).ok()?.parse().ok()
    }
    fn signal(&self, signal: &str, pid: u32) {
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill").success());
    }
    fn signal_rank(&self, signal: &str, rank: usize) {
        self.signal(signal, self.pid(rank).expect("a pid"));
    }
    /// Returns the exit code and standard error, at most `seconds` from now; asserts that no rank is left.
    fn end(mut self, seconds: u64) -> (i32, String) {
        wait_for(seconds, "the job ends", || self.child.try_wait().expect("wait").is_some());
        let code = self.child.wait().expect("wait").code().expect("a code");
        let mut output = String::new();
        self.child.stderr.take().expect("a pipe").read_to_string(&mut output).expect("text");
        wait_for(2, "no rank is left", || !self.alive());
        (code, output)
    }
    fn alive(&self) -> bool {
        (0..2).filter_map(|rank| self.pid(rank)).any(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            !status.is_empty() && !status.contains("State:\tZ")
        })
    }
}

impl Drop for Job {
    /// Kills the job of a failed test.
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn launcher() -> Command {
    Command::new(root().join("launch/mpirun"))
}

fn wait_for(seconds: u64, label: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {label}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn sigterm_lets_ranks_save_and_stop() -> Outcome {
    let job = Job::start("sleep");
    let folder = job.folder.path().to_path_buf();
    job.signal("-TERM", job.child.id());
    wait_for(10, "both ranks have saved", || (0..2).all(|rank| folder.join(format!("saved-{rank}")).exists()));
    let (code, output) = job.end(10);
    assert_eq!((code, output.as_str()), (75, ""));
    Ok(())
}

fn a_second_sigterm_stops_at_once() -> Outcome {
    let job = Job::start("sleep");
    job.signal("-TERM", job.child.id());
    std::thread::sleep(Duration::from_millis(600));
    job.signal("-TERM", job.child.id());
    let (code, output) = job.end(2);
    assert!(code == 70 && output.contains("second request"), "{code}: {output}");
    Ok(())
}

fn a_killed_rank_ends_the_job_and_is_named() -> Outcome {
    let job = Job::start("sleep");
    job.signal_rank("-KILL", 1);
    let (code, output) = job.end(5);
    assert_eq!(code, 70, "{output}");
    assert!(output.lines().count() == 1 && output.contains("rank 1 on host") && output.contains("SIGKILL"), "{output}");
    Ok(())
}

fn a_frozen_rank_ends_the_job_and_is_named() -> Outcome {
    let job = Job::start("sleep");
    job.signal_rank("-STOP", 1);
    let (code, output) = job.end(3 + 4);
    assert_eq!(code, 70, "{output}");
    assert_eq!(output.lines().count(), 1, "{output}");
    for words in ["Rank 1 on host", "no sign of life", "limit 3.0 s", "phase compute"] {
        assert!(output.contains(words), "no `{words}` in: {output}");
    }
    Ok(())
}

fn a_stuck_rank_ends_the_job_and_is_named() -> Outcome {
    let (code, output) = Job::start("stuck").end(2 + 5);
    assert_eq!(code, 70, "{output}");
    assert!(output.lines().count() == 1 && output.contains("Rank 1 on host"), "{output}");
    assert!(output.contains("lives but has been at step 12, phase compute"), "{output}");
    Ok(())
}

fn a_killed_launcher_leaves_no_rank() -> Outcome {
    let mut job = Job::start("sleep");
    job.child.kill()?;
    job.child.wait()?;
    wait_for(5, "no rank is left", || !job.alive());
    Ok(())
}

fn the_exit_code_of_a_rank_is_passed_on() -> Outcome {
    for code in [0, 7, 65, 75] {
        let line = format!("sleep 0.2; exit {code}");
        let output = launcher().args(["-n", "2", "--", "bash", "-c", &line]).output()?;
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
    Ok(())
}

/// A job that always fails: with a newer checkpoint each time it is started as often as requested, without one only
/// three times more.
fn restarts_stop_without_progress() -> Outcome {
    let starts = |line: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        let line = format!("echo >>$1/starts; n=$(wc -l <$1/starts); {line}; exit 70");
        let run = folder.path().to_str().expect("utf-8");
        let output = launcher()
            .args(["-n", "1", "--restarts", "5", "--", "bash", "-c", &line, "--run", run])
            .output()
            .expect("launch/mpirun starts");
        assert_eq!(output.status.code(), Some(70), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read_to_string(folder.path().join("starts")).expect("starts").lines().count()
    };
    assert_eq!(starts(":"), 4);
    let save = "d=$1/checkpoints/step-0000000$n; mkdir -p $d; touch $d/manifest.json";
    assert_eq!(starts(save), 6);
    Ok(())
}

/// Returns the number of processors that this process may use.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn a_pinned_rank_gets_its_share_of_cores() -> Outcome {
    if cores() == 1 {
        return Ok(());
    }
    // Plain mpirun pins a single rank to one core.
    let output = Command::new(root().join(".deps/venv/bin/mpirun"))
        .args(["-n", "1", "--bind-to", "core"])
        .arg(std::env::current_exe()?)
        .env("OCCLUDE_CASE", "ground")
        .env_remove("OMP_NUM_THREADS")
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.trim(), format!("threads {0}, cores {0}", cores()), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A busy host may keep mpirun from starting; it says so before any rank has begun.
fn an_mpirun_that_fails_to_start_is_retried() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    for name in ["launch", "mpi/bin"] {
        std::fs::create_dir_all(path(name))?;
    }
    std::fs::copy(root().join("launch/mpirun"), path("launch/mpirun"))?;
    let stand_in = r#"#!/bin/sh
        echo started >> "$OCCLUDE_STARTS"
        [ "$(wc -l < "$OCCLUDE_STARTS")" -gt 2 ] && exit 75
        rule=$(printf '%074d' 0 | tr 0 -)
        printf '%s\nThe PMIx server'"'"'s listener thread failed to start. We cannot\ncontinue.\n%s\n' "$rule" "$rule" >&2
        exit 213"#;
    std::fs::write(path("mpi/bin/mpirun"), stand_in)?;
    std::fs::set_permissions(path("mpi/bin/mpirun"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let output =
        Command::new(path("launch/mpirun")).args(["-n", "2", "true"]).env("OCCLUDE_STARTS", path("starts")).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        (output.status.code(), text.as_str()),
        (Some(75), ""),
        "the exit code of the third start, and no message"
    );
    assert_eq!(std::fs::read_to_string(path("starts"))?.lines().count(), 3);
    Ok(())
}
