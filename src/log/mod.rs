//! The log of a run: `metrics.jsonl` for programs, TensorBoard events, and a progress line or bar for a person.
//!
//! Only rank 0 has a log. Each step's line reaches the operating system in one write, so that a killed run leaves whole
//! lines and at most one torn one, which the next start removes.

pub mod chart; // curves as SVG
pub mod image_grid; // grids of images with headings
pub mod tensorboard; // event files
pub mod upload; // background upload to an object store

use crate::error::{Error, Result};
use image::RgbImage;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tensorboard::EventWriter;

/// One object of `metrics.jsonl`. A value that is not finite is written as null and read back as NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricsLine {
    /// Steps done, including this one: the first line has 1.
    pub step: u64,
    /// Passes over the data set, with a fraction.
    #[serde(deserialize_with = "null_is_nan")]
    pub epoch: f64,
    /// Samples seen since step 0, over all ranks.
    pub samples: u64,
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Named terms of the loss, in the method's order.
    #[serde(serialize_with = "write_terms", deserialize_with = "read_terms")]
    pub terms: Vec<(String, f64)>,
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// L2 norm of the mean gradient, before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Samples per second over all ranks.
    #[serde(deserialize_with = "null_is_nan")]
    pub samples_per_s: f64,
    /// Fraction of the step's time spent waiting for data, 0 to 1.
    #[serde(deserialize_with = "null_is_nan")]
    pub data_wait: f64,
    /// Fraction of the step's time spent waiting for other ranks, 0 to 1.
    #[serde(deserialize_with = "null_is_nan")]
    pub comm_wait: f64,
    /// Model FLOP utilization (PaLM, Chowdhery et al., 2022, appendix B): the FLOP of the step's samples (matrix
    /// products and attention of the tokens that are computed, forward and backward), divided by the peak of all ranks'
    /// devices. The peak is that of the data sheet, otherwise the best of several matrix products measured at the
    /// start. Null where no peak is known.
    pub mfu: Option<f64>,
    /// Wall-clock seconds of the step.
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
pub struct RunLog {
    dir: PathBuf,
    path: PathBuf,
    lines: File,
    events: EventWriter,
    total_steps: u64,
    speed: SpeedWindow,
    progress: ProgressDisplay,
    /// Samples per second at full utilization of the devices.
    peak_samples_per_s: Option<f64>,
}

impl RunLog {
    /// Creates the log of a new run of `steps` steps in `dir`. Progress goes to standard error: as a bar on a terminal,
    /// otherwise as a line at once and then at most one every `interval_s` seconds.
    ///
    /// # Errors
    /// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if `dir` already has metrics, which are never overwritten;
    /// [`ExitCode::Disk`](crate::error::ExitCode::Disk), as from every method here, if the disk fails.
    pub fn create(dir: &Path, steps: u64, interval_s: f64) -> Result<RunLog> {
        let path = dir.join("metrics.jsonl");
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) {
            let path = path.display();
            return Err(Error::usage(format!(
                "{path} already holds the metrics of a run. Resume it, or give this run another folder."
            )));
        }
        RunLog::open(dir, EventWriter::create, steps, interval_s)
    }

    /// Continues the log in `dir` after a checkpoint at `step`: removes later lines and a torn last one, and makes
    /// TensorBoard discard the later points. Otherwise like [`RunLog::create`].
    pub fn resume(dir: &Path, step: u64, steps: u64, interval_s: f64) -> Result<RunLog> {
        truncate_after(&dir.join("metrics.jsonl"), step)?;
        RunLog::open(dir, |dir| EventWriter::resume(dir, step + 1), steps, interval_s)
    }

    fn open(
        dir: &Path,
        open_events: impl FnOnce(&Path) -> Result<EventWriter>,
        total_steps: u64,
        interval_s: f64,
    ) -> Result<RunLog> {
        fs::create_dir_all(dir).map_err(|error| Error::disk(dir.display(), error))?;
        let path = dir.join("metrics.jsonl");
        let lines = OpenOptions::new().create(true).append(true).open(&path);
        let lines = lines.map_err(|error| Error::disk(path.display(), error))?;
        let events = open_events(&dir.join("tensorboard"))?;
        let progress = ProgressDisplay::stderr(total_steps, interval_s);
        Ok(RunLog {
            dir: dir.into(),
            path,
            lines,
            events,
            total_steps,
            speed: SpeedWindow::default(),
            progress,
            peak_samples_per_s: None,
        })
    }

    /// Sets the samples per second at full utilization of the devices, from which `mfu` is computed.
    pub fn with_peak_samples_per_s(self, samples_per_s: f64) -> RunLog {
        RunLog { peak_samples_per_s: Some(samples_per_s), ..self }
    }

    /// Sends plain progress lines to `out` instead of standard error.
    pub fn with_output(mut self, out: impl Write + Send + 'static, interval_s: f64) -> RunLog {
        self.progress = ProgressDisplay::plain(out, interval_s);
        self
    }

    /// Records one step.
    pub fn record_step(&mut self, line: &MetricsLine) -> Result<()> {
        let mfu = line.mfu.or(self.peak_samples_per_s.map(|peak| line.samples_per_s / peak));
        let line = &MetricsLine { mfu, ..line.clone() };
        let mut text = serde_json::to_string(line).expect("a line is plain data");
        text.push('\n');
        self.lines.write_all(text.as_bytes()).map_err(|error| Error::disk(self.path.display(), error))?;
        self.write_scalars(line)?;
        self.speed.push(Instant::now(), line);
        if self.progress.is_due(line.step, self.total_steps) {
            self.events.flush()?;
            let remaining = self.speed.remaining_seconds(self.total_steps);
            let text = format_progress(line, self.total_steps, self.speed.samples_per_s(), remaining);
            self.progress.show(line.step, &text);
        }
        Ok(())
    }

    /// Saves an image as `pictures/step-NNNNNNNN-<name>.png` and writes it to TensorBoard under the same name.
    pub fn save_image(&mut self, step: u64, name: &str, image: &RgbImage) -> Result<()> {
        let dir = self.dir.join("pictures");
        fs::create_dir_all(&dir).map_err(|error| Error::disk(dir.display(), error))?;
        let png = image_grid::encode_png(image);
        let path = dir.join(format!("step-{step:08}-{name}.png"));
        write_atomically(&path, |out| out.write_all(&png))?;
        self.events.write_image(step, name, &png, image.width(), image.height(), 3)?;
        self.events.flush()
    }

    /// Prints one line next to the progress, without tearing the bar.
    pub fn print(&mut self, text: &str) {
        self.progress.print(text);
    }

    /// Flushes everything to the disk: before a checkpoint is published, and at the end.
    pub fn sync(&mut self) -> Result<()> {
        self.events.flush()?;
        self.lines.sync_data().map_err(|error| Error::disk(self.path.display(), error))
    }

    fn write_scalars(&mut self, line: &MetricsLine) -> Result<()> {
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
        points.iter().try_for_each(|(tag, value)| self.events.write_scalar(line.step, tag, *value as f32))
    }
}

/// Removes every line of `path` after `step` and every damaged line, by writing a new file and renaming it.
fn truncate_after(path: &Path, step: u64) -> Result<()> {
    #[derive(Deserialize)]
    struct StepOfLine {
        step: u64,
    }
    let old = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::disk(path.display(), error)),
    };
    write_atomically(path, |out| {
        for line in BufReader::new(old).split(b'\n') {
            let line = line?;
            if serde_json::from_slice::<StepOfLine>(&line).is_ok_and(|parsed| parsed.step <= step) {
                out.write_all(&line)?;
                out.write_all(b"\n")?;
            }
        }
        Ok(())
    })
}

/// Writes `path` through a temporary file and a rename, so that a reader finds either the old or the new bytes.
fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let disk_error = |error| Error::disk(path.display(), error);
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut out = BufWriter::new(File::create(&new).map_err(disk_error)?);
    write(&mut out).map_err(disk_error)?;
    let file = out.into_inner().map_err(|error| disk_error(error.into_error()))?;
    file.sync_data().map_err(disk_error)?;
    fs::rename(&new, path).map_err(disk_error)
}

/// A sliding window over the last steps, from which speed and remaining time are computed. Uses the monotonic clock.
#[derive(Default)]
pub struct SpeedWindow {
    /// End time, step and samples of each step in the window.
    ends: VecDeque<(Instant, u64, u64)>,
    /// Samples per second and seconds of the last step, used while the window holds one step.
    last_step: Option<(f64, f64)>,
}

impl SpeedWindow {
    /// Maximum number of steps in the window.
    const MAX_STEPS: usize = 64;
    /// Age beyond which a step is dropped.
    const MAX_AGE: Duration = Duration::from_secs(120);

    /// Adds a step that ended at `end`.
    pub fn push(&mut self, end: Instant, line: &MetricsLine) {
        self.last_step = Some((line.samples_per_s, line.seconds));
        self.ends.push_back((end, line.step, line.samples));
        while self.ends.len() > Self::MAX_STEPS || (self.ends.len() > 2 && end - self.ends[0].0 > Self::MAX_AGE) {
            self.ends.pop_front();
        }
    }

    /// Returns the samples per second over the window; the step's own value while there is only one.
    pub fn samples_per_s(&self) -> f64 {
        match self.span() {
            Some((seconds, _, samples)) => samples as f64 / seconds,
            None => self.last_step.map_or(f64::NAN, |(rate, _)| rate),
        }
    }

    /// Returns the estimated seconds until step `total_steps`.
    pub fn remaining_seconds(&self, total_steps: u64) -> f64 {
        let last = self.ends.back().map_or(0, |(_, step, _)| *step);
        let seconds_per_step = match self.span() {
            Some((seconds, steps, _)) => seconds / steps as f64,
            None => self.last_step.map_or(f64::NAN, |(_, seconds)| seconds),
        };
        seconds_per_step * total_steps.saturating_sub(last) as f64
    }

    /// Returns seconds, steps and samples between the first and the last step of the window.
    fn span(&self) -> Option<(f64, u64, u64)> {
        let (first_end, first_step, first_samples) = self.ends.front()?;
        let (last_end, last_step, last_samples) = self.ends.back()?;
        let seconds = (*last_end - *first_end).as_secs_f64();
        (seconds > 0.0 && last_step > first_step)
            .then(|| (seconds, last_step - first_step, last_samples.saturating_sub(*first_samples)))
    }
}

/// Formats `step 120/400  epoch 2.41  loss 0.5312  lr 1.2e-3  412 samples/s  data wait 1 %  eta 0:41`.
pub fn format_progress(line: &MetricsLine, total_steps: u64, samples_per_s: f64, remaining_s: f64) -> String {
    format!(
        "step {}/{total_steps}  epoch {:.2}  loss {:.4}  lr {:.1e}  {} samples/s  data wait {:.0} %  eta {}",
        line.step,
        line.epoch,
        line.loss,
        line.lr,
        if samples_per_s < 10.0 { format!("{samples_per_s:.1}") } else { format!("{samples_per_s:.0}") },
        line.data_wait * 100.0,
        format_duration(remaining_s)
    )
}

/// Formats a duration: `0:41`, `12:05`, `3:07:00`, `2 d 3:07`.
fn format_duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "unknown".into();
    }
    let total = seconds.max(0.0).round() as u64;
    let days = total / 86_400;
    let hours = total / 3600 % 24;
    let minutes = total / 60 % 60;
    let seconds = total % 60;
    match (days, hours) {
        (0, 0) => format!("{minutes}:{seconds:02}"),
        (0, _) => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => format!("{days} d {hours}:{minutes:02}"),
    }
}

/// The display of a run's progress for a person.
enum ProgressDisplay {
    Bar(ProgressBar),
    Plain { out: Box<dyn Write + Send>, interval: Duration, last: Option<Instant> },
}

impl ProgressDisplay {
    fn stderr(total_steps: u64, interval_s: f64) -> ProgressDisplay {
        if !io::stderr().is_terminal() {
            return ProgressDisplay::plain(io::stderr(), interval_s);
        }
        // The bar redraws its terminal line at most twelve times a second.
        let bar = ProgressBar::with_draw_target(Some(total_steps), ProgressDrawTarget::stderr_with_hz(12));
        let style = ProgressStyle::with_template("{bar:20.cyan/dim} {wide_msg}").expect("a fixed template");
        bar.set_style(style);
        ProgressDisplay::Bar(bar)
    }

    fn plain(out: impl Write + Send + 'static, interval_s: f64) -> ProgressDisplay {
        let interval = Duration::try_from_secs_f64(interval_s).unwrap_or(Duration::ZERO);
        ProgressDisplay::Plain { out: Box::new(out), interval, last: None }
    }

    /// Returns whether step `step` should be shown: always on a bar; otherwise the first step, the last step, and steps
    /// after the interval has passed.
    fn is_due(&self, step: u64, total_steps: u64) -> bool {
        match self {
            ProgressDisplay::Bar(_) => true,
            ProgressDisplay::Plain { interval, last, .. } => {
                step >= total_steps || last.is_none_or(|last| last.elapsed() >= *interval)
            }
        }
    }

    fn show(&mut self, step: u64, text: &str) {
        match self {
            ProgressDisplay::Bar(bar) => {
                bar.set_position(step);
                bar.set_message(text.to_owned());
            }
            ProgressDisplay::Plain { last, .. } => {
                *last = Some(Instant::now());
                self.print(text);
            }
        }
    }

    fn print(&mut self, text: &str) {
        match self {
            ProgressDisplay::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            // A closed pipe must not end the training.
            ProgressDisplay::Plain { out, .. } => drop(writeln!(out, "{text}").and_then(|()| out.flush())),
        }
    }
}

impl Drop for ProgressDisplay {
    fn drop(&mut self) {
        if let ProgressDisplay::Bar(bar) = self {
            bar.abandon();
        }
    }
}
