//! The launcher and what ends a job: signals, lost ranks, frozen ranks, a lost launcher.

use crate::support::{Outcome, root};
use occlude::device::{Limits, Phase, Pulse, Requests};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

crate::trials![
    sigterm_lets_the_ranks_save_and_stop,
    a_second_sigterm_ends_at_once,
    a_killed_rank_ends_the_job_and_is_named,
    a_frozen_rank_ends_the_job_and_is_named,
    a_stuck_rank_ends_the_job_and_is_named,
    a_killed_launcher_leaves_no_rank,
    a_rank_s_own_code_is_passed_on,
    restarts_stop_without_progress,
    a_pinned_rank_is_widened_to_its_share,
    an_mpirun_that_does_not_come_up_is_started_again,
];

/// What a rank does in these tests: steps until it is asked to stop, then saves for 2 s and leaves with 75.
pub fn case(name: &str) -> i32 {
    if name == "ground" {
        println!("threads {}, cores {}", occlude::device::ground(None), cores());
        return 0;
    }
    let requests = Requests::listen().expect("signals");
    let world = occlude::device::join().expect("a launcher");
    let limits = Limits { silence: Duration::from_secs(3), ..Limits::default() };
    let pulse = Pulse::start(&world, limits.with(Phase::Compute, Duration::from_secs(2))).expect("a heartbeat");
    let beat = pulse.beat();
    let folder = std::path::PathBuf::from(std::env::var_os("OCCLUDE_FOLDER").expect("a folder"));
    std::fs::write(folder.join(format!("pid-{}", world.rank())), std::process::id().to_string()).expect("pid");
    let mut step = 0;
    while !requests.poll().stop {
        step += 1;
        beat.at(step, Phase::Compute);
        std::thread::sleep(Duration::from_millis(20));
        if name == "stuck" && world.rank() == 1 && step == 12 {
            std::thread::sleep(Duration::from_secs(60));
        }
    }
    beat.at(step, Phase::Save);
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
        within(60, "both ranks run", || (0..2).all(|rank| job.pid(rank).is_some()));
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
    /// The exit code and what was told, at most `seconds` from now, and no rank is left.
    fn end(mut self, seconds: u64) -> (i32, String) {
        within(seconds, "the job ends", || self.child.try_wait().expect("wait").is_some());
        let code = self.child.wait().expect("wait").code().expect("a code");
        let mut told = String::new();
        self.child.stderr.take().expect("a pipe").read_to_string(&mut told).expect("text");
        within(2, "no rank is left", || !self.alive());
        (code, told)
    }
    fn alive(&self) -> bool {
        (0..2).filter_map(|rank| self.pid(rank)).any(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            !status.is_empty() && !status.contains("State:\tZ")
        })
    }
}

impl Drop for Job {
    /// A test that has failed leaves nothing behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn launcher() -> Command {
    Command::new(root().join("launch/mpirun"))
}

fn within(seconds: u64, what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn sigterm_lets_the_ranks_save_and_stop() -> Outcome {
    let job = Job::start("sleep");
    let folder = job.folder.path().to_path_buf();
    job.signal("-TERM", job.child.id());
    within(10, "both ranks have saved", || (0..2).all(|rank| folder.join(format!("saved-{rank}")).exists()));
    let (code, told) = job.end(10);
    assert_eq!((code, told.as_str()), (75, ""));
    Ok(())
}

fn a_second_sigterm_ends_at_once() -> Outcome {
    let job = Job::start("sleep");
    job.signal("-TERM", job.child.id());
    std::thread::sleep(Duration::from_millis(600));
    job.signal("-TERM", job.child.id());
    let (code, told) = job.end(2);
    assert!(code == 70 && told.contains("second request"), "{code}: {told}");
    Ok(())
}

fn a_killed_rank_ends_the_job_and_is_named() -> Outcome {
    let job = Job::start("sleep");
    job.signal_rank("-KILL", 1);
    let (code, told) = job.end(5);
    assert_eq!(code, 70, "{told}");
    assert!(told.lines().count() == 1 && told.contains("rank 1 on host") && told.contains("SIGKILL"), "{told}");
    Ok(())
}

fn a_frozen_rank_ends_the_job_and_is_named() -> Outcome {
    let job = Job::start("sleep");
    job.signal_rank("-STOP", 1);
    let (code, told) = job.end(3 + 4);
    assert_eq!(code, 70, "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    for words in ["Rank 1 on host", "no sign of life", "limit 3.0 s", "phase compute"] {
        assert!(told.contains(words), "no `{words}` in: {told}");
    }
    Ok(())
}

fn a_stuck_rank_ends_the_job_and_is_named() -> Outcome {
    let (code, told) = Job::start("stuck").end(2 + 5);
    assert_eq!(code, 70, "{told}");
    assert!(told.lines().count() == 1 && told.contains("Rank 1 on host"), "{told}");
    assert!(told.contains("lives but has been at step 12, phase compute"), "{told}");
    Ok(())
}

fn a_killed_launcher_leaves_no_rank() -> Outcome {
    let mut job = Job::start("sleep");
    job.child.kill()?;
    job.child.wait()?;
    within(5, "no rank is left", || !job.alive());
    Ok(())
}

fn a_rank_s_own_code_is_passed_on() -> Outcome {
    for code in [0, 7, 65, 75] {
        let line = format!("sleep 0.2; exit {code}");
        let output = launcher().args(["-n", "2", "--", "bash", "-c", &line]).output()?;
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
    Ok(())
}

/// A job that always fails: with a newer checkpoint each time it is started as often as asked, without one only three
/// times more.
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

/// The processors that this process may use.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn a_pinned_rank_is_widened_to_its_share() -> Outcome {
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
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(told.trim(), format!("threads {0}, cores {0}", cores()), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A busy host may keep mpirun from starting; it says so, before any rank has begun.
fn an_mpirun_that_does_not_come_up_is_started_again() -> Outcome {
    let folder = tempfile::tempdir()?;
    let place = |name: &str| folder.path().join(name);
    for name in ["launch", "mpi/bin"] {
        std::fs::create_dir_all(place(name))?;
    }
    std::fs::copy(root().join("launch/mpirun"), place("launch/mpirun"))?;
    let stand_in = r#"#!/bin/sh
        echo started >> "$OCCLUDE_STARTS"
        [ "$(wc -l < "$OCCLUDE_STARTS")" -gt 2 ] && exit 75
        rule=$(printf '%074d' 0 | tr 0 -)
        printf '%s\nThe PMIx server'"'"'s listener thread failed to start. We cannot\ncontinue.\n%s\n' "$rule" "$rule" >&2
        exit 213"#;
    std::fs::write(place("mpi/bin/mpirun"), stand_in)?;
    std::fs::set_permissions(place("mpi/bin/mpirun"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let output = Command::new(place("launch/mpirun"))
        .args(["-n", "2", "true"])
        .env("OCCLUDE_STARTS", place("starts"))
        .output()?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), told.as_str()), (Some(75), ""), "the third start's own code, and not a word");
    assert_eq!(std::fs::read_to_string(place("starts"))?.lines().count(), 3);
    Ok(())
}
