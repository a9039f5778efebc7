//! Uploads the growing files of a run to an object store.
//!
//! Object stores cannot append. Metrics, events and images are therefore written to a folder on this machine and
//! uploaded in the background with each checkpoint; checkpoints are written to the store directly. The store holds the
//! metrics as `metrics/part-<first step>.jsonl`, one part for each start of the run.

use crate::data::store::Store;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::SystemTime;

const METRICS_FILE: &str = "metrics.jsonl";

/// Uploaded files by path below the run, with their length and modification time.
type UploadedFiles = Arc<Mutex<BTreeMap<String, (u64, SystemTime)>>>;

/// Uploads rank 0's local folder of a run in a store.
pub struct Uploader {
    job: UploadJob,
    running: Option<JoinHandle<Result<()>>>,
}

/// The source and the destination of an upload.
#[derive(Clone)]
struct UploadJob {
    store: Store,
    folder: PathBuf,
    /// The step after which this process continued the run.
    first_step: u64,
    uploaded: UploadedFiles,
}

/// Returns the folder for the run's growing files: the run itself if it is a local folder, otherwise a folder in this
/// machine's cache.
pub fn local_folder(run: &Store) -> PathBuf {
    run.local_path().unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
        let name = blake3::hash(run.url().as_bytes()).to_hex()[..16].to_string();
        cache.unwrap_or_else(std::env::temp_dir).join("occlude/runs").join(name)
    })
}

impl Uploader {
    /// Prepares the local folder of a run that continues after step `first_step`, with the metrics of the steps before.
    /// Returns `None` if the run is a local folder. Files that an earlier process left there are removed, since the
    /// store has the uploaded ones.
    pub fn open(store: &Store, first_step: u64) -> Result<Option<Uploader>> {
        if store.local_path().is_some() {
            return Ok(None);
        }
        let folder = local_folder(store);
        let disk_error = |error| Error::disk(folder.display(), error);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(disk_error(error)),
            _ => fs::create_dir_all(&folder).map_err(disk_error)?,
        }
        fs::write(folder.join(METRICS_FILE), earlier_metrics(store, first_step)?).map_err(disk_error)?;
        let job = UploadJob { store: store.clone(), folder, first_step, uploaded: UploadedFiles::default() };
        Ok(Some(Uploader { job, running: None }))
    }

    /// Starts an upload of the changed files in the background. If the previous one still runs, does nothing.
    pub fn upload(&mut self) -> Result<()> {
        match self.running.take() {
            Some(thread) if !thread.is_finished() => self.running = Some(thread),
            Some(thread) => {
                join(thread)
                    .unwrap_or_else(|error| tracing::warn!("{error}; it is tried again with the next checkpoint"));
                self.start()?;
            }
            None => self.start()?,
        }
        Ok(())
    }

    /// Uploads the remaining files and waits until all are uploaded.
    pub fn finish(mut self) -> Result<()> {
        if let Some(thread) = self.running.take() {
            join(thread).unwrap_or_else(|error| tracing::warn!("{error}; trying again"));
        }
        self.job.run()
    }

    fn start(&mut self) -> Result<()> {
        let job = self.job.clone();
        let thread = std::thread::Builder::new().name("upload".into()).spawn(move || job.run());
        self.running = Some(thread.map_err(|error| Error::failed(format!("cannot start the thread upload: {error}")))?);
        Ok(())
    }
}

fn join(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| Err(Error::failed("the thread that uploads metrics panicked")))
}

/// Returns the metrics up to step `first_step`: of each part the lines before the next part began.
fn earlier_metrics(store: &Store, first_step: u64) -> Result<Vec<u8>> {
    let parts: Vec<(u64, String)> = store
        .list("metrics")?
        .into_iter()
        .filter_map(|(path, _)| {
            let step = path.strip_prefix("metrics/part-")?.strip_suffix(".jsonl")?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    let mut lines = Vec::new();
    for (index, (_, path)) in parts.iter().enumerate() {
        let end = parts.get(index + 1).map_or(u64::MAX, |(next_step, _)| *next_step).min(first_step + 1);
        for line in store.get(path)?.split_inclusive(|&byte| byte == b'\n') {
            if step_of_line(line).is_some_and(|step| step < end) {
                lines.extend_from_slice(line);
            }
        }
    }
    Ok(lines)
}

fn step_of_line(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<serde_json::Value>(line).ok()?["step"].as_u64()
}

impl UploadJob {
    /// Uploads every changed file below the folder, and of the metrics this process's part.
    fn run(&self) -> Result<()> {
        let mut files = Vec::new();
        list_files(&self.folder, &mut files).map_err(|error| Error::disk(self.folder.display(), error))?;
        for path in files {
            let name = path.strip_prefix(&self.folder).expect("below the folder").to_string_lossy().into_owned();
            let (stamp, bytes) = read_with_stamp(&path).map_err(|error| Error::disk(path.display(), error))?;
            if self.uploaded.lock().expect("no panic while locked").get(&name) == Some(&stamp) {
                continue;
            }
            if name == METRICS_FILE {
                let first_step = self.first_step;
                let new_lines: Vec<u8> = bytes
                    .split_inclusive(|&byte| byte == b'\n')
                    .filter(|line| step_of_line(line).is_some_and(|step| step > first_step))
                    .flatten()
                    .copied()
                    .collect();
                self.store.put_owned(&format!("metrics/part-{:08}.jsonl", first_step + 1), new_lines)?;
            } else {
                self.store.put_owned(&name, bytes)?;
            }
            self.uploaded.lock().expect("no panic while locked").insert(name, stamp);
        }
        Ok(())
    }
}

/// Returns the length and modification time of a file, and its bytes.
fn read_with_stamp(path: &Path) -> std::io::Result<((u64, SystemTime), Vec<u8>)> {
    let metadata = fs::metadata(path)?;
    let stamp = (metadata.len(), metadata.modified()?);
    Ok((stamp, fs::read(path)?))
}

/// Lists the files below a folder, except temporary ones.
fn list_files(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list_files(&path, files)?;
        } else if path.extension().is_none_or(|extension| extension != "new") {
            // A file that is being written has the extension .new.
            files.push(path);
        }
    }
    Ok(())
}
