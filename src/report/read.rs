//! Reads the contents of a run folder and notes what is missing or damaged.

use crate::error::{Error, Result};
use crate::log::MetricsLine;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

/// The contents of a run folder, as far as the report shows them.
pub struct RunData {
    pub dir: PathBuf,
    pub name: String,
    /// The resolved config.
    pub config: Option<Value>,
    /// Metrics in ascending order of steps.
    pub lines: Vec<MetricsLine>,
    /// File names and PNG bytes, the latest first.
    pub pictures: Vec<(String, Vec<u8>)>,
    pub probes: Vec<ProbeRecord>,
    /// Sentences about missing or damaged files.
    pub notes: Vec<String>,
}

/// One entry of `probe.json`: the accuracy of a probe on frozen features.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ProbeRecord {
    /// `pretrained`, or `random` for untrained weights of the same model.
    pub checkpoint: String,
    /// `knn` or `linear`.
    pub protocol: String,
    /// Fraction of the test samples that are classified correctly.
    pub top1: f64,
    pub n_train: Option<u64>,
    pub n_test: Option<u64>,
}

/// Maximum number of pictures of one run that a page embeds.
const MAX_PICTURES: usize = 12;
/// Maximum size of a picture's file in bytes.
const MAX_PICTURE_BYTES: u64 = 8 << 20;

impl RunData {
    /// Returns the config's `about` section as sentences: title, source, reported and measured results.
    pub fn about(&self) -> Option<String> {
        match self.config.as_ref()?.get("about")? {
            Value::String(text) => Some(text.clone()),
            Value::Object(parts) => Some(
                parts
                    .iter()
                    .filter_map(|(name, text)| match (name.as_str(), text.as_str()?) {
                        ("title", text) => Some(format!("{text}.")),
                        (name, text) => Some(format!("{name}: {text}.")),
                    })
                    .collect::<Vec<_>>()
                    .join(" "),
            ),
            _ => None,
        }
    }

    /// Returns a number of the config by its dotted path.
    pub fn config_number(&self, path: &str) -> Option<f64> {
        path.split('.').try_fold(self.config.as_ref()?, |value, key| value.get(key))?.as_f64()
    }
}

/// Reads the run in `dir`.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if `dir` is not a run.
pub fn read_run(dir: &Path) -> Result<RunData> {
    let is_run = ["config.json", "metrics.jsonl", "metrics"].iter().any(|name| dir.join(name).exists());
    if !is_run {
        let dir = dir.display();
        return Err(Error::usage(format!(
            "{dir} is no run: it holds neither config.json nor metrics.jsonl. Name a folder that occlude train wrote."
        )));
    }
    let mut notes = Vec::new();
    let config = read_json(&dir.join("config.json"), &mut notes)?;
    let lines = read_metrics(dir, &mut notes)?;
    let nonfinite: Vec<_> = lines.iter().filter(|line| !line.loss.is_finite()).map(|line| line.step).collect();
    if let Some(first) = nonfinite.first() {
        notes.push(format!("The loss was not finite at {} steps, first at step {first}.", nonfinite.len()));
    }
    let pictures = read_pictures(&dir.join("pictures"), &mut notes)?;
    let path = dir.join("probe.json");
    let probes = if path.exists() { read_json(&path, &mut notes)?.unwrap_or_default() } else { Vec::new() };
    let name = last_components(dir, 1);
    Ok(RunData { dir: dir.into(), name, config, lines, pictures, probes, notes })
}

/// Lengthens the names of runs whose folders have the same name until all names are unique.
pub fn make_names_unique(runs: &mut [RunData]) {
    for components in 1..=8 {
        let names: Vec<_> = runs.iter().map(|run| last_components(&run.dir, components)).collect();
        let are_unique = names.iter().collect::<HashSet<_>>().len() == names.len();
        runs.iter_mut().zip(names).for_each(|(run, name)| run.name = name);
        if are_unique {
            return;
        }
    }
}

/// Returns the last `count` components of a folder's path.
fn last_components(dir: &Path, count: usize) -> String {
    let path = dir.canonicalize().unwrap_or_else(|_| dir.into());
    let components: Vec<_> = path.iter().map(|component| component.to_string_lossy()).collect();
    components[components.len().saturating_sub(count)..].join("/")
}

/// Reads a JSON file; a missing or damaged one is noted.
fn read_json<T: for<'de> Deserialize<'de>>(path: &Path, notes: &mut Vec<String>) -> Result<Option<T>> {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            notes.push(format!("{file} is missing."));
            return Ok(None);
        }
        Err(error) => return Err(Error::disk(path.display(), error)),
    };
    let value = serde_json::from_slice(&bytes);
    if let Err(error) = &value {
        notes.push(format!("{file} is damaged and was left out: {error}."));
    }
    Ok(value.ok())
}

/// Reads `metrics.jsonl`, or the parts that a run in an object store has, in order. A line whose step is not larger
/// than the last one's comes from a resume: it replaces the lines from its step on.
fn read_metrics(dir: &Path, notes: &mut Vec<String>) -> Result<Vec<MetricsLine>> {
    let single_file = dir.join("metrics.jsonl");
    let files = if single_file.exists() { vec![single_file] } else { list_files(&dir.join("metrics"), "jsonl")? };
    let mut lines = Vec::<MetricsLine>::new();
    let mut damaged = 0;
    for path in files {
        let disk_error = |error| Error::disk(path.display(), error);
        for text in BufReader::new(File::open(&path).map_err(disk_error)?).split(b'\n') {
            let text = text.map_err(disk_error)?;
            let Ok(line) = serde_json::from_slice::<MetricsLine>(&text) else {
                damaged += usize::from(!text.is_empty());
                continue;
            };
            while lines.last().is_some_and(|last| last.step >= line.step) {
                lines.pop();
            }
            lines.push(line);
        }
    }
    if damaged > 0 {
        notes.push(format!("{damaged} lines of the metrics are damaged and were left out."));
    }
    if lines.is_empty() {
        notes.push("There are no metrics yet, so there are no curves.".into());
    }
    Ok(lines)
}

/// Lists the files of a folder with this extension, sorted by the first number in their name, then by name. A missing
/// folder has none.
fn list_files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::disk(dir.display(), error)),
    };
    let entries = entries.collect::<std::io::Result<Vec<_>>>().map_err(|error| Error::disk(dir.display(), error))?;
    let paths = entries.into_iter().map(|entry| entry.path());
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    paths.sort_by_cached_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let digits = name.split(|c: char| !c.is_ascii_digit()).find(|digits| !digits.is_empty());
        (digits.and_then(|digits| digits.parse::<u64>().ok()), name)
    });
    Ok(paths)
}

/// Reads the pictures, the latest first. If there are too many, reads evenly spaced ones from the first to the last, so
/// that progress is visible.
fn read_pictures(dir: &Path, notes: &mut Vec<String>) -> Result<Vec<(String, Vec<u8>)>> {
    let files = list_files(dir, "png")?;
    if files.is_empty() {
        notes.push("There are no pictures.".into());
    }
    let count = files.len().min(MAX_PICTURES);
    if count < files.len() {
        notes.push(format!("{count} of {} pictures are shown.", files.len()));
    }
    let mut pictures = Vec::new();
    for index in (0..count).rev() {
        let path = &files[if count > 1 { index * (files.len() - 1) / (count - 1) } else { 0 }];
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let disk_error = |error| Error::disk(path.display(), error);
        let metadata = fs::metadata(path).map_err(disk_error)?;
        if !metadata.is_file() {
            notes.push(format!("pictures/{name} is no file and was left out."));
            continue;
        }
        if metadata.len() > MAX_PICTURE_BYTES {
            notes.push(format!("pictures/{name} is larger than 8 MiB and was left out."));
            continue;
        }
        let bytes = fs::read(path).map_err(disk_error)?;
        if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            pictures.push((name, bytes));
        } else {
            notes.push(format!("pictures/{name} is no PNG file and was left out."));
        }
    }
    Ok(pictures)
}
