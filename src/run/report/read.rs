//! Reads what a run folder holds, and says what it lacks.

use crate::fault::{Fault, Result};
use crate::run::log::Line;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

/// What the report knows of one run.
pub struct Run {
    pub dir: PathBuf,
    pub name: String,
    /// The resolved config.
    pub config: Option<Value>,
    /// In rising order of steps.
    pub lines: Vec<Line>,
    /// File name and PNG bytes, the latest first.
    pub pictures: Vec<(String, Vec<u8>)>,
    pub probes: Vec<Probe>,
    /// What was missing or damaged, in whole sentences.
    pub notes: Vec<String>,
}

/// One row of `probe.json`: how good the frozen features are.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Probe {
    /// `pretrained`, or `random` for untrained weights of the same form.
    pub checkpoint: String,
    /// `knn` or `linear`.
    pub protocol: String,
    /// Share of the test samples whose class is right, 0 to 1.
    pub top1: f64,
    pub n_train: Option<u64>,
    pub n_test: Option<u64>,
}

/// Pictures of one run that a page embeds, and the largest file among them.
const PICTURES: usize = 12;
const LARGEST_PICTURE: u64 = 8 << 20;

impl Run {
    /// The config's own words: title, source, what was reported and measured, a sentence each.
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
    /// A number of the config by its dotted path.
    pub fn number(&self, path: &str) -> Option<f64> {
        path.split('.').try_fold(self.config.as_ref()?, |value, key| value.get(key))?.as_f64()
    }
}

/// Reads the run in `dir`.
pub fn run(dir: &Path) -> Result<Run> {
    let run_like = ["config.json", "metrics.jsonl", "metrics"].iter().any(|name| dir.join(name).exists());
    if !run_like {
        let dir = dir.display();
        return Err(Fault::usage(format!(
            "{dir} is no run: it holds neither config.json nor metrics.jsonl. Name a folder that occlude train wrote."
        )));
    }
    let mut notes = Vec::new();
    let config = json(&dir.join("config.json"), &mut notes)?;
    let lines = lines(dir, &mut notes)?;
    let bad: Vec<_> = lines.iter().filter(|line| !line.loss.is_finite()).map(|line| line.step).collect();
    if let Some(first) = bad.first() {
        notes.push(format!("The loss was not finite at {} steps, first at step {first}.", bad.len()));
    }
    let pictures = pictures(&dir.join("pictures"), &mut notes)?;
    let path = dir.join("probe.json");
    let probes = if path.exists() { json(&path, &mut notes)?.unwrap_or_default() } else { Vec::new() };
    let name = name(dir, 1);
    Ok(Run { dir: dir.into(), name, config, lines, pictures, probes, notes })
}

/// Lengthens the names of runs whose folders are called alike, until they differ.
pub fn name_apart(runs: &mut [Run]) {
    for parts in 1..=8 {
        let names: Vec<_> = runs.iter().map(|run| name(&run.dir, parts)).collect();
        let apart = names.iter().collect::<HashSet<_>>().len() == names.len();
        runs.iter_mut().zip(names).for_each(|(run, name)| run.name = name);
        if apart {
            return;
        }
    }
}

/// The last `parts` parts of a folder's path.
fn name(dir: &Path, parts: usize) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.into());
    let all: Vec<_> = whole.iter().map(|part| part.to_string_lossy()).collect();
    all[all.len().saturating_sub(parts)..].join("/")
}

/// A whole JSON file; a missing or damaged one is a note.
fn json<T: for<'de> Deserialize<'de>>(path: &Path, notes: &mut Vec<String>) -> Result<Option<T>> {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            notes.push(format!("{file} is missing."));
            return Ok(None);
        }
        Err(error) => return Err(Fault::disk(path.display(), error)),
    };
    let value = serde_json::from_slice(&bytes);
    if let Err(error) = &value {
        notes.push(format!("{file} is damaged and was left out: {error}."));
    }
    Ok(value.ok())
}

/// `metrics.jsonl`, or the parts that a store without append has, in their order. A line that goes back in steps stands
/// for a resume: it replaces what came after its step.
fn lines(dir: &Path, notes: &mut Vec<String>) -> Result<Vec<Line>> {
    let whole = dir.join("metrics.jsonl");
    let files = if whole.exists() { vec![whole] } else { listed(&dir.join("metrics"), "jsonl")? };
    let (mut lines, mut damaged) = (Vec::<Line>::new(), 0);
    for path in files {
        let fault = |error| Fault::disk(path.display(), error);
        for text in BufReader::new(File::open(&path).map_err(fault)?).split(b'\n') {
            let text = text.map_err(fault)?;
            let Ok(line) = serde_json::from_slice::<Line>(&text) else {
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

/// The files of a folder with this extension, by number and name; none where the folder is missing.
fn listed(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Fault::disk(dir.display(), error)),
    };
    let entries = entries.collect::<std::io::Result<Vec<_>>>().map_err(|error| Fault::disk(dir.display(), error))?;
    let paths = entries.into_iter().map(|entry| entry.path());
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    paths.sort_by_cached_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let digits = name.split(|c: char| !c.is_ascii_digit()).find(|run| !run.is_empty());
        (digits.and_then(|digits| digits.parse::<u64>().ok()), name)
    });
    Ok(paths)
}

/// The latest pictures first; of many, a spread from the first to the last, so that progress shows.
fn pictures(dir: &Path, notes: &mut Vec<String>) -> Result<Vec<(String, Vec<u8>)>> {
    let all = listed(dir, "png")?;
    if all.is_empty() {
        notes.push("There are no pictures.".into());
    }
    let shown = all.len().min(PICTURES);
    if shown < all.len() {
        notes.push(format!("{shown} of {} pictures are shown.", all.len()));
    }
    let mut pictures = Vec::new();
    for number in (0..shown).rev() {
        let path = &all[if shown > 1 { number * (all.len() - 1) / (shown - 1) } else { 0 }];
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fault = |error| Fault::disk(path.display(), error);
        let found = fs::metadata(path).map_err(fault)?;
        if !found.is_file() {
            notes.push(format!("pictures/{name} is no file and was left out."));
            continue;
        }
        if found.len() > LARGEST_PICTURE {
            notes.push(format!("pictures/{name} is larger than 8 MiB and was left out."));
            continue;
        }
        let bytes = fs::read(path).map_err(fault)?;
        if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            pictures.push((name, bytes));
        } else {
            notes.push(format!("pictures/{name} is no PNG file and was left out."));
        }
    }
    Ok(pictures)
}
