//! What a run tells while it trains: `metrics.jsonl` for programs, TensorBoard for eyes, one line or bar for a person.
//!
//! Rank 0 alone holds the log. A step's line is handed to the operating system as one write, so that what a killed run
//! leaves is whole lines and at most one torn one, which the next start drops.

use crate::fault::{Fault, Result};
use crate::run::events::Events;
use crate::run::picture;
use image::RgbImage;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One object of `metrics.jsonl`. A value that is not finite is written as null and read back as NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Steps done, this one included: the first is 1.
    pub step: u64,
    /// Passes over the data set, with fraction.
    #[serde(deserialize_with = "null_is_nan")]
    pub epoch: f64,
    /// Samples seen since step 0, over all ranks.
    pub samples: u64,
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The loss's named terms, in the method's order.
    #[serde(serialize_with = "write_terms", deserialize_with = "read_terms")]
    pub terms: Vec<(String, f64)>,
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// L2 norm of the mean gradient, before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Over all ranks.
    #[serde(deserialize_with = "null_is_nan")]
    pub samples_per_s: f64,
    /// Share of the step's time spent waiting for data, 0 to 1.
    #[serde(deserialize_with = "null_is_nan")]
    pub data_wait: f64,
    /// Share of the step's time spent waiting for other ranks, 0 to 1.
    #[serde(deserialize_with = "null_is_nan")]
    pub comm_wait: f64,
    /// Model FLOP utilisation, which the log works out: the floating-point operations that the step's samples want (matrix
    /// products and attention, forward and backward, of tokens that are computed) as a share of the peak of all ranks'
    /// devices: that of the data sheet where it is known, else of a matrix product measured at the start, which a noisy
    /// machine may take beyond 1. Null where no peak was given.
    pub mfu: Option<f64>,
    /// Wall-clock seconds that the step took.
    #[serde(deserialize_with = "null_is_nan")]
    pub seconds: f64,
}

fn null_is_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

fn write_terms<S: Serializer>(terms: &[(String, f64)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(terms.iter().map(|(name, value)| (name, value)))
}

fn read_terms<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(String, f64)>, D::Error> {
    let map = serde_json::Map::deserialize(from)?;
    Ok(map.into_iter().map(|(name, value)| (name, value.as_f64().unwrap_or(f64::NAN))).collect())
}

/// The log of one run folder.
pub struct Log {
    dir: PathBuf,
    path: PathBuf,
    lines: File,
    events: Events,
    steps: u64,
    window: Window,
    progress: Progress,
    /// Samples a second at full use of the devices.
    ceiling: Option<f64>,
}

impl Log {
    /// Begins the log of a new run in `dir`, of `steps` steps. Progress goes to standard error: a bar on a terminal,
    /// otherwise a line at once and then one at most every `every_s` seconds.
    ///
    /// # Errors
    /// [`Code::Usage`](crate::fault::Code::Usage) where `dir` already holds metrics, which are never overwritten;
    /// [`Code::Disk`](crate::fault::Code::Disk), as from every call here, where the disk fails.
    pub fn create(dir: &Path, steps: u64, every_s: f64) -> Result<Log> {
        let path = dir.join("metrics.jsonl");
        if fs::metadata(&path).is_ok_and(|found| found.len() > 0) {
            let path = path.display();
            return Err(Fault::usage(format!(
                "{path} already holds the metrics of a run. Resume it, or give this run another folder."
            )));
        }
        let events = |dir: &Path| Events::create(dir);
        Log::open(dir, events, steps, every_s)
    }

    /// Goes on with the log in `dir` after a checkpoint of `step`: later lines and a torn last one are dropped, and
    /// TensorBoard is told to forget the later points. Otherwise as [`Log::create`].
    pub fn resume(dir: &Path, step: u64, steps: u64, every_s: f64) -> Result<Log> {
        keep_until(&dir.join("metrics.jsonl"), step)?;
        Log::open(dir, |dir| Events::resume(dir, step + 1), steps, every_s)
    }

    fn open(dir: &Path, events: impl FnOnce(&Path) -> Result<Events>, steps: u64, every_s: f64) -> Result<Log> {
        fs::create_dir_all(dir).map_err(|error| Fault::disk(dir.display(), error))?;
        let path = dir.join("metrics.jsonl");
        let lines = OpenOptions::new().create(true).append(true).open(&path);
        let lines = lines.map_err(|error| Fault::disk(path.display(), error))?;
        let events = events(&dir.join("tensorboard"))?;
        let progress = Progress::stderr(steps, every_s);
        Ok(Log { dir: dir.into(), path, lines, events, steps, window: Window::default(), progress, ceiling: None })
    }

    /// Samples a second at which the devices would be used whole: what `mfu` is told from.
    pub fn with_ceiling(self, samples_per_s: f64) -> Log {
        Log { ceiling: Some(samples_per_s), ..self }
    }

    /// Sends plain progress lines to `out` instead of standard error.
    pub fn tell(mut self, out: impl Write + Send + 'static, every_s: f64) -> Log {
        self.progress = Progress::plain(out, every_s);
        self
    }

    /// Records one step.
    pub fn step(&mut self, line: &Line) -> Result<()> {
        let line = &Line { mfu: line.mfu.or(self.ceiling.map(|most| line.samples_per_s / most)), ..line.clone() };
        let mut text = serde_json::to_string(line).expect("a line is plain data");
        text.push('\n');
        self.lines.write_all(text.as_bytes()).map_err(|error| Fault::disk(self.path.display(), error))?;
        self.scalars(line)?;
        self.window.push(Instant::now(), line);
        if self.progress.due(line.step, self.steps) {
            self.events.flush()?;
            let text = progress_text(line, self.steps, self.window.samples_per_s(), self.window.eta(self.steps));
            self.progress.show(line.step, &text);
        }
        Ok(())
    }

    /// Saves a picture as `pictures/step-NNNNNNNN-<name>.png` and shows it in TensorBoard under the same name.
    pub fn picture(&mut self, step: u64, name: &str, picture: &RgbImage) -> Result<()> {
        let dir = self.dir.join("pictures");
        fs::create_dir_all(&dir).map_err(|error| Fault::disk(dir.display(), error))?;
        let png = picture::png(picture);
        let path = dir.join(format!("step-{step:08}-{name}.png"));
        replace(&path, |out| out.write_all(&png))?;
        self.events.image(step, name, &png, picture.width(), picture.height(), 3)?;
        self.events.flush()
    }

    /// Says one line to the person watching, without tearing the bar.
    pub fn say(&mut self, text: &str) {
        self.progress.say(text);
    }

    /// Puts everything on the disk: before a checkpoint is published, and at the end.
    pub fn sync(&mut self) -> Result<()> {
        self.events.flush()?;
        self.lines.sync_data().map_err(|error| Fault::disk(self.path.display(), error))
    }

    fn scalars(&mut self, line: &Line) -> Result<()> {
        let mut points = vec![("train/loss".to_owned(), line.loss)];
        if line.terms.len() > 1 {
            points.extend(line.terms.iter().map(|(name, value)| (format!("train/loss_{name}"), *value)));
        }
        points.extend([("train/lr".into(), line.lr), ("train/grad_norm".into(), line.grad_norm)]);
        points.extend(line.weight_decay.map(|value| ("train/weight_decay".into(), value)));
        points.push(("train/epoch".into(), line.epoch));
        points.push(("speed/samples_per_s".into(), line.samples_per_s));
        points.push(("speed/data_wait".into(), line.data_wait));
        points.push(("speed/comm_wait".into(), line.comm_wait));
        points.extend(line.mfu.map(|value| ("speed/mfu".into(), value)));
        points.iter().try_for_each(|(tag, value)| self.events.scalar(line.step, tag, *value as f32))
    }
}

/// Drops every line of `path` after `step`, and whatever is no line, by writing the rest anew and renaming it.
fn keep_until(path: &Path, step: u64) -> Result<()> {
    #[derive(Deserialize)]
    struct Stamp {
        step: u64,
    }
    let fault = |error| Fault::disk(path.display(), error);
    let old = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fault(error)),
    };
    replace(path, |out| {
        for line in BufReader::new(old).split(b'\n') {
            let line = line?;
            if serde_json::from_slice::<Stamp>(&line).is_ok_and(|stamp| stamp.step <= step) {
                out.write_all(&line)?;
                out.write_all(b"\n")?;
            }
        }
        Ok(())
    })
}

/// Writes `path` so that a reader finds the old bytes or all of the new ones.
fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let fault = |error| Fault::disk(path.display(), error);
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut out = BufWriter::new(File::create(&new).map_err(fault)?);
    write(&mut out).map_err(fault)?;
    let file = out.into_inner().map_err(|error| fault(error.into_error()))?;
    file.sync_data().map_err(fault)?;
    fs::rename(&new, path).map_err(fault)
}

/// The last steps, by the monotonic clock: what speed and remaining time are told from.
#[derive(Default)]
pub struct Window {
    seen: VecDeque<(Instant, u64, u64)>,
    first: Option<(f64, f64)>,
}

impl Window {
    /// Steps that the window holds, and the age beyond which one is forgotten.
    const STEPS: usize = 64;
    const AGE: Duration = Duration::from_secs(120);

    /// Takes in a step that ended `at`.
    pub fn push(&mut self, at: Instant, line: &Line) {
        self.first = Some((line.samples_per_s, line.seconds));
        self.seen.push_back((at, line.step, line.samples));
        while self.seen.len() > Self::STEPS || (self.seen.len() > 2 && at - self.seen[0].0 > Self::AGE) {
            self.seen.pop_front();
        }
    }

    /// Samples a second over the window; the step's own figure while there is but one.
    pub fn samples_per_s(&self) -> f64 {
        match self.span() {
            Some((seconds, _, samples)) => samples as f64 / seconds,
            None => self.first.map_or(f64::NAN, |(rate, _)| rate),
        }
    }

    /// Seconds until step `steps` at the window's pace.
    pub fn eta(&self, steps: u64) -> f64 {
        let last = self.seen.back().map_or(0, |seen| seen.1);
        let pace = match self.span() {
            Some((seconds, steps, _)) => seconds / steps as f64,
            None => self.first.map_or(f64::NAN, |(_, seconds)| seconds),
        };
        pace * steps.saturating_sub(last) as f64
    }

    fn span(&self) -> Option<(f64, u64, u64)> {
        let (first, last) = (self.seen.front()?, self.seen.back()?);
        let seconds = (last.0 - first.0).as_secs_f64();
        (seconds > 0.0 && last.1 > first.1).then(|| (seconds, last.1 - first.1, last.2.saturating_sub(first.2)))
    }
}

/// `step 120/400  epoch 2.41  loss 0.5312  lr 1.2e-3  412 samples/s  data wait 1 %  eta 0:41`
pub fn progress_text(line: &Line, steps: u64, samples_per_s: f64, eta_s: f64) -> String {
    format!(
        "step {}/{steps}  epoch {:.2}  loss {:.4}  lr {:.1e}  {} samples/s  data wait {:.0} %  eta {}",
        line.step,
        line.epoch,
        line.loss,
        line.lr,
        if samples_per_s < 10.0 { format!("{samples_per_s:.1}") } else { format!("{samples_per_s:.0}") },
        line.data_wait * 100.0,
        clock(eta_s)
    )
}

/// `0:41`, `12:05`, `3:07:00`, `2 d 3:07`.
fn clock(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "unknown".into();
    }
    let total = seconds.max(0.0).round() as u64;
    let (days, hours, minutes, seconds) = (total / 86_400, total / 3600 % 24, total / 60 % 60, total % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}:{seconds:02}"),
        (0, _) => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => format!("{days} d {hours}:{minutes:02}"),
    }
}

/// Where a person sees how far the run is.
enum Progress {
    Bar(ProgressBar),
    Plain { out: Box<dyn Write + Send>, every: Duration, last: Option<Instant> },
}

impl Progress {
    fn stderr(steps: u64, every_s: f64) -> Progress {
        if !io::stderr().is_terminal() {
            return Progress::plain(io::stderr(), every_s);
        }
        // The bar owns a terminal line; twelve frames a second is its own limit.
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr_with_hz(12));
        let style = ProgressStyle::with_template("{bar:20.cyan/dim} {wide_msg}").expect("a fixed template");
        bar.set_style(style);
        Progress::Bar(bar)
    }

    fn plain(out: impl Write + Send + 'static, every_s: f64) -> Progress {
        let every = Duration::try_from_secs_f64(every_s).unwrap_or(Duration::ZERO);
        Progress::Plain { out: Box::new(out), every, last: None }
    }

    /// Whether step `step` is to be shown: always on a bar; else the first, the last and as often as was asked.
    fn due(&self, step: u64, steps: u64) -> bool {
        match self {
            Progress::Bar(_) => true,
            Progress::Plain { every, last, .. } => step >= steps || last.is_none_or(|last| last.elapsed() >= *every),
        }
    }

    fn show(&mut self, step: u64, text: &str) {
        match self {
            Progress::Bar(bar) => {
                bar.set_position(step);
                bar.set_message(text.to_owned());
            }
            Progress::Plain { last, .. } => {
                *last = Some(Instant::now());
                self.say(text);
            }
        }
    }

    fn say(&mut self, text: &str) {
        match self {
            Progress::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            // A watcher that went away (a closed pipe) must not end the training.
            Progress::Plain { out, .. } => drop(writeln!(out, "{text}").and_then(|()| out.flush())),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Progress::Bar(bar) = self {
            bar.abandon();
        }
    }
}
