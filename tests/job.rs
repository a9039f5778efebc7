//! A training as its user starts it: the program, alone or under launch/mpirun, on tiny made-up pictures.

use crate::support::{Outcome, root};
use occlude::run::checkpoint::{self, Loaded};
use occlude::run::log::Line;
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

/// The program with a verb's words, one thread to each process.
pub fn occlude(words: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(words).env("OMP_NUM_THREADS", "1");
    command
}

/// Pictures and shards that all tests share: `in/` (three classes), `flat/` (no classes), `train/`, `test/` and
/// `plain/` (packed).
pub fn data() -> PathBuf {
    let mut made = DATA.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = made.get_or_insert_with(|| make_data().expect("pictures and shards"));
    folder.path().to_owned()
}

static DATA: Mutex<Option<TempDir>> = Mutex::new(None);

/// Removes what the tests shared.
pub fn clean() {
    drop(DATA.lock().unwrap_or_else(PoisonError::into_inner).take());
}

fn make_data() -> Result<TempDir, libtest_mimic::Failed> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    // Stripes of three directions, each with its own phase and noise: something to learn, and no two alike.
    for number in 0..260u32 {
        let class = number % 3;
        let picture = image::GrayImage::from_fn(16, 16, |x, y| {
            let along = [x, y, x + y][class as usize] + number / 3;
            let noise = (x * 31 + y * 17 + number * 101).wrapping_mul(2_654_435_761) >> 27;
            image::Luma([(if along % 6 < 3 { 40 } else { 180 }) + noise as u8])
        });
        for place in [at("in").join(format!("stripes-{class}")), at("flat")] {
            std::fs::create_dir_all(&place)?;
            picture.save(place.join(format!("{number:03}.png")))?;
        }
    }
    let run = |words: &[&str]| {
        let output = occlude(words).output().expect("occlude starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let path = |name: &str| at(name).to_str().expect("UTF-8").to_owned();
    run(&["pack", &path("in"), &path(""), "--name", "stripes", "--samples-per-shard", "50", "--test-share", "0.2"]);
    run(&["pack", &path("flat"), &path("plain")]);
    Ok(folder)
}

/// A tiny config: grey pictures of 16 × 16 and one block of width 16, some milliseconds a step.
pub fn tiny() -> Value {
    let shape = json!({"width": 16, "depth": 1, "heads": 2});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"channels": 1, "height": 16, "width": 16, "patch": 4},
        "view": {"crop": {"scale": [0.6, 1.0]}},
        "method": {"mae": {"encoder": shape, "decoder": shape}},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": data().join("train"), "threads": 1},
        "train": {"steps": STEPS, "global_batch": 10, "seed": 5},
        "checkpoint": {"every_steps": EVERY},
        "log": {"pictures_every_steps": 0, "every_s": 1000},
    })
}

/// A config, a run's folder beside it, and the jobs that train it.
pub struct Run {
    place: TempDir,
    folder: Option<PathBuf>,
    pub sets: Vec<String>,
}

impl Run {
    pub fn new(config: &Value) -> Run {
        let place = tempfile::tempdir().expect("a folder");
        std::fs::write(place.path().join("config.json"), config.to_string()).expect("a config");
        Run { place, folder: None, sets: Vec::new() }
    }
    pub fn tiny() -> Run {
        Run::new(&tiny())
    }
    /// The tiny training with overrides.
    pub fn with(sets: &[&str]) -> Run {
        Run { sets: sets.iter().map(ToString::to_string).collect(), ..Run::tiny() }
    }
    /// Another run that stands where this one does.
    pub fn copy(&self) -> Run {
        let place = tempfile::tempdir().expect("a folder");
        let copied = Command::new("cp").arg("-a").arg(self.place.path().join(".")).arg(place.path()).status();
        assert!(copied.expect("cp").success());
        Run { place, folder: None, sets: self.sets.clone() }
    }
    /// The same with its folder somewhere else.
    pub fn at(self, folder: PathBuf) -> Run {
        Run { folder: Some(folder), ..self }
    }
    pub fn folder(&self) -> PathBuf {
        self.folder.clone().unwrap_or_else(|| self.place.path().join("run"))
    }
    pub fn config(&self) -> PathBuf {
        self.place.path().join("config.json")
    }
    /// The words after the program's name.
    pub fn words(&self, more: &[&str]) -> Vec<String> {
        let path = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
        let mut words: Vec<String> = vec!["train".into(), "--config".into(), path(self.config())];
        words.extend(["--run".into(), path(self.folder())]);
        words.extend(self.sets.iter().flat_map(|set| ["--set".into(), set.clone()]));
        words.extend(more.iter().map(ToString::to_string));
        words
    }
    /// Starts a training: on so many ranks under launch/mpirun, or as a plain process where there are none.
    pub fn start(&self, ranks: usize, more: &[&str]) -> Job {
        match ranks {
            0 => self.spawn(occlude(&[]).args(self.words(more))),
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
        let told = std::thread::spawn(move || {
            let mut told = Vec::new();
            let _ = pipe.read_to_end(&mut told);
            String::from_utf8_lossy(&told).into_owned()
        });
        Job { child, told: Some(told), run: self.folder(), mark }
    }
    /// Trains to the end, which must be a good one; what was told.
    pub fn finish(&self, ranks: usize, more: &[&str]) -> String {
        let end = self.start(ranks, more).end(60);
        assert_eq!(end.code, 0, "{}", end.told);
        end.told
    }
    /// The lines of metrics.jsonl; a torn last one is none.
    pub fn lines(&self) -> Vec<Line> {
        let text = std::fs::read_to_string(self.folder().join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
    /// The newest whole checkpoint.
    pub fn newest(&self) -> Result<Loaded, libtest_mimic::Failed> {
        Ok(checkpoint::open(self.folder().to_str().expect("UTF-8"))?)
    }
    /// Steps whose checkpoint has a manifest.
    pub fn saved(&self) -> Vec<u64> {
        let Ok(folders) = std::fs::read_dir(self.folder().join("checkpoints")) else { return Vec::new() };
        let step = |path: PathBuf| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
        let whole = folders.flatten().map(|entry| entry.path()).filter(|path| path.join("manifest.json").exists());
        let mut steps: Vec<u64> = whole.filter_map(step).collect();
        steps.sort();
        steps
    }
    /// What `other` has trained, this run has: the last checkpoint to the bit, every step once and with the same
    /// numbers.
    pub fn same_as(&self, other: &Run) -> Outcome {
        let (ours, theirs) = (self.newest()?, other.newest()?);
        assert_eq!((ours.manifest.step, ours.manifest.samples), (theirs.manifest.step, theirs.manifest.samples));
        assert_eq!(ours.tensors.len(), theirs.tensors.len());
        for (name, tensor) in &theirs.tensors {
            assert!(ours.tensors[name] == *tensor, "{name} is not the same to the bit");
        }
        let numbers = |run: &Run| -> Vec<_> {
            let bits = |line: &Line| [line.epoch, line.loss, line.lr, line.grad_norm].map(f64::to_bits);
            run.lines().iter().map(|line| (line.step, line.samples, bits(line))).collect()
        };
        let (ours, theirs) = (numbers(self), numbers(other));
        let steps: Vec<u64> = ours.iter().map(|line| line.0).collect();
        assert_eq!(steps, (1..=self.newest()?.manifest.step).collect::<Vec<_>>(), "every step once, in order");
        assert!(ours == theirs, "losses differ");
        Ok(())
    }
}

/// The tiny training without a disturbance, on so many ranks (0: a plain process).
pub fn undisturbed(ranks: usize) -> &'static Run {
    static PLAIN: LazyLock<Run> = LazyLock::new(|| reference(0));
    static TWO: LazyLock<Run> = LazyLock::new(|| reference(2));
    if ranks == 0 { &PLAIN } else { &TWO }
}

fn reference(ranks: usize) -> Run {
    let run = Run::tiny();
    run.finish(ranks, &[]);
    run
}

/// A job under way. One that a failed test leaves is killed with all of its ranks.
pub struct Job {
    pub child: Child,
    told: Option<JoinHandle<String>>,
    run: PathBuf,
    /// In the environment of all of its processes.
    mark: String,
}

/// How a job ended.
pub struct End {
    pub code: i32,
    /// Standard error without progress lines.
    pub told: String,
}

impl Job {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
    /// Waits until step `step` is in metrics.jsonl.
    pub fn reach(&mut self, step: u64) {
        let path = self.run.join("metrics.jsonl");
        let begun = Instant::now();
        let mark = format!("{{\"step\":{step},");
        while !std::fs::read_to_string(&path).is_ok_and(|text| text.contains(&mark)) {
            assert!(begun.elapsed() < Duration::from_secs(60), "step {step} was not reached in 60 s");
            if let Some(status) = self.child.try_wait().expect("wait") {
                let told = self.told.take().map(|told| told.join()).and_then(Result::ok).unwrap_or_default();
                panic!("the job ended before step {step} ({status}): {told}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    /// The process of a rank, which may be about to start.
    pub fn rank(&self, rank: usize) -> i32 {
        let is = |pid: &i32| {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            program == *program_path() && knows(*pid, &format!("OMPI_COMM_WORLD_RANK={rank}"))
        };
        let mut found = None;
        within(30, "a process of the rank", || {
            found = self.processes().into_iter().find(is);
            found.is_some()
        });
        found.expect("found")
    }
    /// All living processes of the job: launcher, mpirun, ranks.
    pub fn processes(&self) -> Vec<i32> {
        let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| knows(*pid, &format!("OCCLUDE_TEST_JOB={}", self.mark))).collect()
    }
    /// The exit code and what was told, at most `seconds` from now; no process of the job is left.
    pub fn end(mut self, seconds: u64) -> End {
        within(seconds, "the job ends", || self.child.try_wait().expect("wait").is_some());
        let code = self.child.wait().expect("wait").code().unwrap_or(-1);
        within(20, "no process of the job is left", || self.processes().is_empty());
        let told = self.told.take().expect("told once").join().expect("text");
        let told = told.lines().filter(|line| !line.starts_with("step ")).collect::<Vec<_>>().join("\n");
        End { code, told }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.told.is_some() {
            let _ = self.child.kill();
            self.processes().into_iter().for_each(|pid| signal(pid, Signal::KILL));
            let _ = self.child.wait();
        }
    }
}

fn program_path() -> &'static PathBuf {
    static PATH: LazyLock<PathBuf> = LazyLock::new(|| Path::new(program()).canonicalize().expect("the program"));
    &PATH
}

/// Whether a living process has this in its environment.
fn knows(pid: i32, entry: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|found| found == entry.as_bytes())
}

/// Sends a signal; a process that is gone already does not mind.
pub fn signal(pid: i32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid).expect("a pid"), signal);
}

pub fn within(seconds: u64, what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(seconds), "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
