//! `occlude inspect`: reports what a data set contains and whether its bytes are intact.

mod read; // reads samples in parallel
mod stats; // counts and histograms
mod contact_sheet; // a grid of thumbnails
mod summary; // the report as text

use crate::data::scan;
use crate::data::set::{DataSet, DataSetManifest};
use crate::data::shard::ShardInfo;
use crate::data::store::Store;
use crate::error::{Error, ExitCode, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use stats::{Bin, SizeStats, VideoStats};

/// Options of `occlude inspect`.
#[derive(Clone, Debug, Default)]
pub struct InspectOptions {
    /// Shards, as `data.train` names them.
    pub url: String,
    /// Writes an index with digests for each tar that has none.
    pub write_index: bool,
    /// Path of the contact sheet; by default `NAME-sheet.png` in the working directory.
    pub sheet: Option<PathBuf>,
    /// Maximum number of samples to read, evenly spaced; by default all.
    pub max_samples: Option<u64>,
}

/// The result of `occlude inspect`, printed as one JSON object.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct InspectReport {
    pub url: String,
    pub name: String,
    pub samples: u64,
    pub shards: u64,
    /// Bytes of all tars.
    pub bytes: u64,
    /// Number of indices written.
    pub indices_written: u64,
    /// Number of samples whose members were read. All following fields are about these.
    pub inspected: u64,
    /// Members by extension.
    pub members: BTreeMap<String, u64>,
    /// Samples by class name, or by label if classes have no names.
    pub classes: BTreeMap<String, u64>,
    /// Number of images and videos whose header is valid.
    pub images: u64,
    /// Number of audio files whose structure is intact.
    pub audio_files: u64,
    /// File sizes of images, videos and audio.
    pub file_bytes: SizeStats,
    /// Histogram of the shorter side in pixels.
    pub shorter_side: Vec<Bin>,
    /// Histogram of width / height after orientation.
    pub aspect: Vec<Bin>,
    /// Statistics of the videos among `images`.
    pub videos: VideoStats,
    /// Histogram of audio durations in seconds.
    pub seconds: Vec<Bin>,
    /// Duration of all audio in seconds.
    pub seconds_total: f64,
    /// Audio files by sample rate in Hz.
    pub sample_rates: BTreeMap<u32, u64>,
    /// Audio files by number of channels.
    pub channels: BTreeMap<u32, u64>,
    /// `ok`: all digests match; `unchecked`: some members have no digest; `damaged`: some member or shard is corrupt.
    pub verdict: String,
    /// Number of members without a digest.
    pub unchecked: u64,
    /// The first hundred corrupt members or shards.
    pub damaged: Vec<String>,
    /// Number of corrupt members or shards.
    pub damaged_count: u64,
    /// The first hundred images, audio files and labels that are invalid although their digests match.
    pub unreadable: Vec<String>,
    /// Number of invalid members.
    pub unreadable_count: u64,
    /// Path of the contact sheet, if one was written.
    pub sheet: Option<PathBuf>,
}

impl InspectReport {
    /// Checks the verdict.
    ///
    /// # Errors
    /// [`ExitCode::Corrupt`] if anything is damaged.
    pub fn check(&self) -> Result<()> {
        match self.damaged.first() {
            None => Ok(()),
            Some(first) => Err(Error::new(
                ExitCode::Corrupt,
                format!(
                    "{}: {} damaged, the first is {first}; fetch or pack the shards again",
                    self.url, self.damaged_count
                ),
            )),
        }
    }
}

/// Inspects a data set. Damage is part of the report.
///
/// # Errors
/// [`ExitCode::Usage`] if there is no data set, [`ExitCode::Store`] if the store fails, [`ExitCode::Disk`] if the
/// contact sheet cannot be written.
pub fn inspect(options: &InspectOptions) -> Result<InspectReport> {
    let mut set = match DataSet::open(&options.url) {
        Ok(set) => set,
        Err(error) => return report_unopened(&options.url, error),
    };
    let indices_written = if options.write_index { write_indices(&set)? } else { 0 };
    if indices_written > 0 {
        set = DataSet::open(&options.url)?;
    }
    let count = options.max_samples.unwrap_or(set.len()).clamp(1, set.len());
    let bar = progress_bar("reading {bar:40} {pos}/{len} samples, eta {eta}", count);
    let stats = read::read_samples(&set, count, &bar)?;
    bar.finish_and_clear();
    let path = options.sheet.clone().unwrap_or_else(|| PathBuf::from(format!("{}-sheet.png", set.name)));
    let has_sheet = contact_sheet::write(&set, count, &path)?;
    Ok(InspectReport {
        url: options.url.clone(),
        name: set.name.clone(),
        samples: set.len(),
        shards: set.shards().len() as u64,
        bytes: total_bytes(&set),
        indices_written,
        sheet: has_sheet.then_some(path),
        ..stats.into_report(&set.classes)
    })
}

fn total_bytes(set: &DataSet) -> u64 {
    set.shards().iter().map(|shard| shard.header().shard_bytes).sum()
}

/// Reports on a data set that cannot be opened: names its damaged shards, or returns `error` if there is no data set.
fn report_unopened(url: &str, error: Error) -> Result<InspectReport> {
    if !matches!(error.code, ExitCode::Usage | ExitCode::Corrupt) {
        return Err(error);
    }
    let (folder, file) = match url.rsplit_once('/') {
        _ if !url.ends_with(".tar") => (url, None),
        Some((folder, file)) => (folder, Some(file)),
        None => (".", Some(url)),
    };
    let store = Store::open(folder)?;
    // The shards of a pattern are not checked one by one; the error names the first bad one.
    let objects = if store.can_list() && !url.contains('{') { store.list("")? } else { Vec::new() };
    let exists = |name: &str| objects.binary_search_by(|(other, _)| other.as_str().cmp(name)).is_ok();
    let mut damaged = Vec::new();
    for (name, bytes) in &objects {
        let is_requested = file.is_none_or(|file| file == name) && name.ends_with(".tar") && !name.contains('/');
        if is_requested {
            let info = ShardInfo::read(&store, name, *bytes, exists(&ShardInfo::index_name(name)));
            damaged.extend(info.and_then(|info| info.open().map(drop)).err().map(|error| error.message));
        }
    }
    // All tars are intact, but they differ from those in the manifest.
    if damaged.is_empty() && (error.code == ExitCode::Corrupt || file.is_none() && exists(DataSetManifest::FILE)) {
        damaged.push(error.message.clone());
    }
    if damaged.is_empty() {
        return Err(error);
    }
    let damaged_count = damaged.len() as u64;
    Ok(InspectReport {
        url: url.to_owned(),
        verdict: "damaged".into(),
        damaged,
        damaged_count,
        ..InspectReport::default()
    })
}

/// Writes an index for each tar that has none, and returns the number written.
fn write_indices(set: &DataSet) -> Result<u64> {
    let first = set.shards()[0].name();
    let folder = first.rsplit_once('/').map_or("", |(folder, _)| folder);
    let store = Store::open(if folder.is_empty() { "/" } else { folder })?;
    if !store.can_list() {
        return Err(Error::usage(format!("{folder}: a web server cannot be written to; give the URL of its store")));
    }
    let bar = progress_bar("hashing {bar:40} {bytes}/{total_bytes}, eta {eta}", total_bytes(set));
    let next = AtomicUsize::new(0);
    let written = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(shard) = set.shards().get(next.fetch_add(1, Ordering::Relaxed)) {
            let name = shard.name();
            let file = name.rsplit_once('/').map_or(&name[..], |(_, file)| file);
            let index_name = ShardInfo::index_name(file);
            if store.size(&index_name)?.is_none() {
                let hashed = scan::hash_members(&store, file, shard.open()?.index(), |bytes| bar.inc(bytes));
                store.put(&index_name, hashed.map_err(|error| error.with_context(&name))?.as_bytes())?;
                written.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    run_on_all_cores(work)?;
    bar.finish_and_clear();
    Ok(written.into_inner() as u64)
}

/// Runs `work` on one thread per core, and returns the results or the first error once all threads have ended.
fn run_on_all_cores<T: Send>(work: impl Fn() -> Result<T> + Sync) -> Result<Vec<T>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic at work")).collect()
    })
}

/// Creates a progress bar, which is only drawn on a terminal.
fn progress_bar(template: &str, length: u64) -> ProgressBar {
    ProgressBar::new(length).with_style(ProgressStyle::with_template(template).expect("a valid template"))
}
