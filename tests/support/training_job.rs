//! Trainings as a user starts them: the program, alone or under launch/mpirun, on tiny synthetic images.

use crate::support::{Outcome, root};
use occlude::checkpoint;
use occlude::checkpoint::LoadedCheckpoint;
use occlude::log::MetricsLine;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Steps of a tiny training, and between its checkpoints.
pub const STEPS: u64 = 240;
pub const EVERY: u64 = 20;

pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_occlude")
}

/// Returns the program with command-line words, with one thread per process.
pub fn occlude_command(words: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(words).env("OMP_NUM_THREADS", "1").env("OMP_WAIT_POLICY", "passive");
    command
}

/// Returns the folder of images and shards that all tests share: `in/` (three classes), `flat/` (no classes), `train/`,
/// `test/` and `plain/` (packed).
pub fn shared_data() -> PathBuf {
    let mut output = DATA.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = output.get_or_insert_with(|| make_data().expect("images and shards"));
    folder.path().to_owned()
}

static DATA: Mutex<Option<TempDir>> = Mutex::new(None);

/// Removes the shared data of the tests.
pub fn remove_shared_data() {
    drop(DATA.lock().unwrap_or_else(PoisonError::into_inner).take());
}

fn make_data() -> Result<TempDir, libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    // Stripes of three directions, each with its own phase and noise: learnable, and no two alike.
    for number in 0..260u32 {
        let class = number % 3;
        let image = image::GrayImage::from_fn(16, 16, |x, y| {
            let along = [x, y, x + y][class as usize] + number / 3;
            let noise = (x * 31 + y * 17 + number * 101).wrapping_mul(2_654_435_761) >> 27;
            image::Luma([(if along % 6 < 3 { 40 } else { 180 }) + noise as u8])
        });
        for position in [at("in").join(format!("stripes-{class}")), at("flat")] {
            std::fs::create_dir_all(&position)?;
            image.save(position.join(format!("{number:03}.png")))?;
        }
    }
    let run = |words: &[&str]| {
        let output = occlude_command(words).output().expect("occlude starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let path = |name: &str| at(name).to_str().expect("UTF-8").to_owned();
    run(&["pack", &path("in"), &path(""), "--name", "stripes", "--samples-per-shard", "50", "--test-fraction", "0.2"]);
    run(&["pack", &path("flat"), &path("plain")]);
    Ok(folder)
}

/// Returns a tiny config: grayscale images of 16 × 16 and one block of width 16; a step takes some milliseconds.
pub fn tiny_config() -> Value {
    let shape = json!({"width": 16, "depth": 1, "heads": 2});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"channels": 1, "height": 16, "width": 16, "patch": 4},
        "view": {"crop": {"scale": [0.6, 1.0]}},
        "method": {"mae": {"encoder": shape, "decoder": shape}},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": shared_data().join("train"), "threads": 1},
        "train": {"steps": STEPS, "global_batch": 10, "seed": 5},
        "checkpoint": {"every_steps": EVERY},
        "log": {"image_interval_steps": 0, "interval_s": 1000},
    })
}

/// A config, the folder of a run, and the jobs that train it.
pub struct Run {
    place: TempDir,
    folder: Option<PathBuf>,
    pub sets: Vec<String>,
}

impl Run {
    pub fn new(config: &Value) -> Run {
        let path = tempfile::tempdir().expect("a folder");
        std::fs::write(path.path().join("config.json"), config.to_string()).expect("a config");
        Run { place: path, folder: None, sets: Vec::new() }
    }
    pub fn tiny() -> Run {
        Run::new(&tiny_config())
    }
    /// Returns the tiny training with overrides.
    pub fn with_overrides(sets: &[&str]) -> Run {
        Run { sets: sets.iter().map(ToString::to_string).collect(), ..Run::tiny() }
    }
    /// Copies the run in its present state.
    pub fn copy(&self) -> Run {
        let path = tempfile::tempdir().expect("a folder");
        let copied = Command::new("cp").arg("-a").arg(self.place.path().join(".")).arg(path.path()).status();
        assert!(copied.expect("cp").success());
        Run { place: path, folder: None, sets: self.sets.clone() }
    }
    /// Returns the same run with another folder.
    pub fn at(self, folder: PathBuf) -> Run {
        Run { folder: Some(folder), ..self }
    }
    pub fn folder(&self) -> PathBuf {
        self.folder.clone().unwrap_or_else(|| self.place.path().join("run"))
    }
    pub fn config(&self) -> PathBuf {
        self.place.path().join("config.json")
    }
    /// Returns the command-line words after the program's name.
    pub fn words(&self, more: &[&str]) -> Vec<String> {
        let path = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
        let mut words: Vec<String> = vec!["train".into(), "--config".into(), path(self.config())];
        words.extend(["--run".into(), path(self.folder())]);
        words.extend(self.sets.iter().flat_map(|set| ["--set".into(), set.clone()]));
        words.extend(more.iter().map(ToString::to_string));
        words
    }
    /// Starts a training on `ranks` ranks under launch/mpirun, or as a single process if `ranks` is 0.
    pub fn start(&self, ranks: usize, more: &[&str]) -> Job {
        match ranks {
            0 => self.spawn(occlude_command(&[]).args(self.words(more))),
            _ => self.launch(&["-n", &ranks.to_string()], &[program()], more),
        }
    }
    /// Starts `launch/mpirun OPTIONS -- BEFORE train ...`.
    pub fn launch(&self, options: &[&str], before: &[&str], more: &[&str]) -> Job {
        let mut command = Command::new(root().join("launch/mpirun"));
        command.args(options).arg("--").args(before).args(self.words(more)).env("OMP_NUM_THREADS", "1");
        self.spawn(&mut command)
    }
    pub fn spawn(&self, command: &mut Command) -> Job {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}.{}.", std::process::id(), STARTED.fetch_add(1, Ordering::SeqCst));
        command.env("OCCLUDE_TEST_JOB", &mark).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the job starts");
        let mut pipe = child.stderr.take().expect("a pipe");
        let output = std::thread::spawn(move || {
            let mut output = Vec::new();
            let _ = pipe.read_to_end(&mut output);
            String::from_utf8_lossy(&output).into_owned()
        });
        Job { child, stderr: Some(output), run: self.folder(), mark }
    }
    /// Trains to the end, which must succeed, and returns standard error.
    pub fn finish(&self, ranks: usize, more: &[&str]) -> String {
        let end = self.start(ranks, more).end(60);
        assert_eq!(end.code, 0, "{}", end.stderr);
        end.stderr
    }
    /// Returns the lines of metrics.jsonl without a partial last one.
    pub fn lines(&self) -> Vec<MetricsLine> {
        let text = std::fs::read_to_string(self.folder().join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
    /// Returns the newest intact checkpoint.
    pub fn newest_checkpoint(&self) -> Result<LoadedCheckpoint, libtest_mimic::Failed> {
        Ok(checkpoint::load_from_url(self.folder().to_str().expect("UTF-8"))?)
    }
    /// Returns the steps whose checkpoint has a manifest.
    pub fn saved(&self) -> Vec<u64> {
        let Ok(folders) = std::fs::read_dir(self.folder().join("checkpoints")) else { return Vec::new() };
        let step = |path: PathBuf| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
        let full = folders.flatten().map(|entry| entry.path()).filter(|path| path.join("manifest.json").exists());
        let mut steps: Vec<u64> = full.filter_map(step).collect();
        steps.sort();
        steps
    }
    /// Asserts that this run equals `other`: the last checkpoint bit for bit, and every step once with the same
    /// numbers.
    pub fn assert_same_as(&self, other: &Run) -> Outcome {
        let ours = self.newest_checkpoint()?;
        let reference = other.newest_checkpoint()?;
        assert_eq!((ours.manifest.step, ours.manifest.samples), (reference.manifest.step, reference.manifest.samples));
        assert_eq!(ours.tensors.len(), reference.tensors.len());
        for (name, tensor) in &reference.tensors {
            assert!(ours.tensors[name] == *tensor, "{name} differs");
        }
        let numbers = |run: &Run| -> Vec<_> {
            let bits = |line: &MetricsLine| [line.epoch, line.loss, line.lr, line.grad_norm].map(f64::to_bits);
            run.lines().iter().map(|line| (line.step, line.samples, bits(line))).collect()
        };
        let ours = numbers(self);
        let reference = numbers(other);
        let steps: Vec<u64> = ours.iter().map(|line| line.0).collect();
        assert_eq!(
            steps,
            (1..=self.newest_checkpoint()?.manifest.step).collect::<Vec<_>>(),
            "every step once, in order"
        );
        assert!(ours == reference, "losses differ");
        Ok(())
    }
}

/// Returns the uninterrupted tiny training on 2 ranks, or in a single process if `ranks` is 0.
pub fn reference_run(ranks: usize) -> &'static Run {
    static PLAIN: LazyLock<Run> = LazyLock::new(|| train_reference(0));
    static TWO: LazyLock<Run> = LazyLock::new(|| train_reference(2));
    if ranks == 0 { &PLAIN } else { &TWO }
}

fn train_reference(ranks: usize) -> Run {
    let run = Run::tiny();
    run.finish(ranks, &[]);
    run
}

/// A running job. If a test fails, it is killed with all of its ranks.
pub struct Job {
    pub child: Child,
    stderr: Option<JoinHandle<String>>,
    run: PathBuf,
    /// Marks the environment of all of its processes.
    mark: String,
}

/// The end of a job.
pub struct JobResult {
    pub code: i32,
    /// Standard error without progress lines.
    pub stderr: String,
}

impl Job {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
    /// Waits until step `step` is in metrics.jsonl.
    pub fn wait_for_step(&mut self, step: u64) {
        let path = self.run.join("metrics.jsonl");
        let started = Instant::now();
        let mark = format!("{{\"step\":{step},");
        while !std::fs::read_to_string(&path).is_ok_and(|text| text.contains(&mark)) {
            assert!(started.elapsed() < Duration::from_secs(60), "step {step} was not reached in 60 s");
            if let Some(status) = self.child.try_wait().expect("wait") {
                let output = self.stderr.take().map(|output| output.join()).and_then(Result::ok).unwrap_or_default();
                panic!("the job ended before step {step} ({status}): {output}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    /// Returns the process of a rank, which may be about to start.
    pub fn rank(&self, rank: usize) -> i32 {
        let is = |pid: &i32| {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            program == *program_path() && has_environment(*pid, &format!("OMPI_COMM_WORLD_RANK={rank}"))
        };
        let mut found = None;
        wait_for(30, "a process of the rank", || {
            found = self.processes().into_iter().find(is);
            found.is_some()
        });
        found.expect("found")
    }
    /// Returns all living processes of the job: launcher, mpirun, ranks.
    pub fn processes(&self) -> Vec<i32> {
        let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| has_environment(*pid, &format!("OCCLUDE_TEST_JOB={}", self.mark))).collect()
    }
    /// Returns the exit code and standard error, at most `seconds` from now; asserts that no process of the job is
    /// left.
    pub fn end(mut self, seconds: u64) -> JobResult {
        wait_for(seconds, "the job ends", || self.child.try_wait().expect("wait").is_some());
        let code = self.child.wait().expect("wait").code().unwrap_or(-1);
        wait_for(20, "no process of the job is left", || self.processes().is_empty());
        let output = self.stderr.take().expect("joined once").join().expect("text");
        let output = output.lines().filter(|line| !line.starts_with("step ")).collect::<Vec<_>>().join("\n");
        JobResult { code, stderr: output }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.stderr.is_some() {
            let _ = self.child.kill();
            self.processes().into_iter().for_each(|pid| send_signal(pid, Signal::KILL));
            let _ = self.child.wait();
        }
    }
}

fn program_path() -> &'static PathBuf {
    static PATH: LazyLock<PathBuf> = LazyLock::new(|| Path::new(program()).canonicalize().expect("the program"));
    &PATH
}

/// Tests if the environment of a living process has this entry.
fn has_environment(pid: i32, entry: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|found| found == entry.as_bytes())
}

/// Sends a signal; it is no error if the process is gone.
pub fn send_signal(pid: i32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid).expect("a pid"), signal);
}

pub fn wait_for(seconds: u64, label: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {label}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
