//! `occlude inspect`: what a data set holds and whether its bytes are whole, without training on it.

mod look; // reads samples, many at a time
mod tally; // counts what was seen
mod sheet; // some of the pictures, side by side
mod words; // the report for people

use crate::data::scan;
use crate::data::set::{DataSet, Manifest};
use crate::data::shard::Found;
use crate::data::store::Store;
use crate::fault::{Code, Fault, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
pub use tally::{Bin, Spread, Videos};

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// As `data.train` names shards.
    pub url: String,
    /// Write an index, with digests, beside each tar that has none.
    pub index: bool,
    /// Where the contact sheet goes; `NAME-sheet.png` in the working folder where nobody says.
    pub sheet: Option<PathBuf>,
    /// Look at so many samples only, spread evenly; at all where nobody says.
    pub sample: Option<u64>,
}

/// The answer; one JSON object.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    pub url: String,
    pub name: String,
    pub samples: u64,
    pub shards: u64,
    /// Of all tars.
    pub bytes: u64,
    /// Indices that this call wrote.
    pub indexed: u64,
    /// Samples whose members were read; everything below is of these.
    pub looked_at: u64,
    /// Members by extension.
    pub members: BTreeMap<String, u64>,
    /// Samples by the name of their class, or its number where classes have no names.
    pub classes: BTreeMap<String, u64>,
    /// Pictures whose header could be read.
    pub pictures: u64,
    /// Sounds whose structure is whole.
    pub sounds: u64,
    /// Bytes of a picture's or sound's file.
    pub file_bytes: Spread,
    /// Pixels of the shorter side.
    pub shorter_side: Vec<Bin>,
    /// Width / height, upright.
    pub aspect: Vec<Bin>,
    /// Of those pictures that move.
    pub videos: Videos,
    /// Seconds of a sound, and of all together.
    pub seconds: Vec<Bin>,
    pub seconds_total: f64,
    /// Sounds by samples a second, and by number of channels.
    pub rates: BTreeMap<u32, u64>,
    pub channels: BTreeMap<u32, u64>,
    /// `ok`: all members have the digests that their indices say. `unchecked`: some index says none. `damaged`.
    pub verdict: String,
    /// Members without a digest to compare with.
    pub unchecked: u64,
    /// What is damaged, the first hundred of them, and how many there are.
    pub damaged: Vec<String>,
    pub damaged_count: u64,
    /// Pictures, sounds and labels that cannot be read though their bytes are as they were written.
    pub unreadable: Vec<String>,
    pub unreadable_count: u64,
    /// The contact sheet.
    pub sheet: Option<PathBuf>,
}

impl Report {
    /// The verdict as the program's exit: Code::Corrupt where something is damaged.
    pub fn verdict(&self) -> Result<()> {
        match self.damaged.first() {
            None => Ok(()),
            Some(first) => Err(Fault::new(
                Code::Corrupt,
                format!(
                    "{}: {} damaged, the first is {first}; fetch or pack the shards again",
                    self.url, self.damaged_count
                ),
            )),
        }
    }
}

/// Looks at a data set. Damage is told in the report; faults are for what keeps one from looking: Code::Usage where
/// there is nothing, Code::Store, Code::Disk for the sheet.
pub fn inspect(question: &Question) -> Result<Report> {
    let set = match DataSet::open(&question.url) {
        Ok(set) => set,
        Err(fault) => return unopened(&question.url, fault),
    };
    let indexed = if question.index { index(&set)? } else { 0 };
    let set = if indexed > 0 { DataSet::open(&question.url)? } else { set };
    let wanted = question.sample.unwrap_or(set.len()).clamp(1, set.len());
    let bar = progress("looking {bar:40} {pos}/{len} samples, {eta} left", wanted);
    let seen = look::look(&set, wanted, &bar)?;
    bar.finish_and_clear();
    let path = question.sheet.clone().unwrap_or_else(|| PathBuf::from(format!("{}-sheet.png", set.name)));
    let sheet = sheet::write(&set, wanted, &path)?.then_some(path);
    let mut report = seen.report(&set.classes);
    report.url = question.url.clone();
    report.name = set.name.clone();
    report.samples = set.len();
    report.shards = set.shards().len() as u64;
    report.bytes = set.shards().iter().map(|shard| shard.header().shard_bytes).sum();
    report.indexed = indexed;
    report.sheet = sheet;
    Ok(report)
}

/// A set that does not open: the report that names its damaged shards, or the fault where there is no set.
fn unopened(url: &str, fault: Fault) -> Result<Report> {
    if !matches!(fault.code, Code::Usage | Code::Corrupt) {
        return Err(fault);
    }
    // Shards that a pattern names are not looked for one by one; the fault names the first that is wrong.
    let (folder, one) = match url.rsplit_once('/') {
        _ if !url.ends_with(".tar") => (url, None),
        Some((folder, file)) => (folder, Some(file)),
        None => (".", Some(url)),
    };
    let store = Store::open(folder)?;
    let there = if store.lists() && !url.contains('{') { store.list("")? } else { Vec::new() };
    let has = |file: &str| there.binary_search_by(|(name, _)| name.as_str().cmp(file)).is_ok();
    let asked = |file: &str| one.is_none_or(|one| one == file) && file.ends_with(".tar") && !file.contains('/');
    let tars = there.iter().filter(|(file, _)| asked(file));
    let find = |(file, bytes): &(String, u64)| {
        let found = Found::find(&store, file, *bytes, has(&Found::index_of(file)));
        found.and_then(|found| found.open().map(drop)).err().map(|fault| fault.message)
    };
    let mut damaged: Vec<String> = tars.filter_map(find).collect();
    // All tars are whole, but they are not those that the manifest lists.
    if damaged.is_empty() && (fault.code == Code::Corrupt || one.is_none() && has(Manifest::FILE)) {
        damaged.push(fault.message.clone());
    }
    if damaged.is_empty() {
        return Err(fault);
    }
    let damaged_count = damaged.len() as u64;
    Ok(Report { url: url.to_owned(), verdict: "damaged".into(), damaged, damaged_count, ..Report::default() })
}

/// Writes an index beside each tar that has none; how many there were.
fn index(set: &DataSet) -> Result<u64> {
    let names: Vec<String> = set.shards().iter().map(Found::name).collect();
    let folder = names[0].rsplit_once('/').map_or("", |(folder, _)| folder);
    let store = Store::open(if folder.is_empty() { "/" } else { folder })?;
    if !store.lists() {
        let message = format!("{folder}: nothing can be written through a web server; give its store's URL");
        return Err(Fault::usage(message));
    }
    let bytes = set.shards().iter().map(|shard| shard.header().shard_bytes).sum();
    let bar = progress("hashing {bar:40} {bytes}/{total_bytes}, {eta} left", bytes);
    let next = AtomicUsize::new(0);
    let written = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(found) = set.shards().get(next.fetch_add(1, Ordering::Relaxed)) {
            let name = found.name();
            let file = name.rsplit_once('/').map_or(&name[..], |(_, file)| file);
            if store.size(&Found::index_of(file))?.is_none() {
                let hashed = scan::hashed(&store, file, found.open()?.index(), |bytes| bar.inc(bytes));
                store.put(&Found::index_of(file), hashed.map_err(|fault| fault.at(&name))?.bytes())?;
                written.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    side_by_side(work)?;
    bar.finish_and_clear();
    Ok(written.into_inner() as u64)
}

/// `work` on as many threads as there are cores; the first fault, once all have ended.
fn side_by_side<T: Send>(work: impl Fn() -> Result<T> + Sync) -> Result<Vec<T>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic at work")).collect()
    })
}

/// Drawn on a terminal only.
fn progress(template: &str, length: u64) -> ProgressBar {
    ProgressBar::new(length).with_style(ProgressStyle::with_template(template).expect("a valid template"))
}
