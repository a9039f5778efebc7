//! A run in an object store. Stores cannot append, so what grows (metrics, events) and what is drawn is written into a
//! folder on this machine and carried over with each checkpoint, in the background; checkpoints go there directly.
//! Metrics lie in the store as `metrics/part-<first step>.jsonl`, one part for each time the run was started.

use crate::data::store::Store;
use crate::fault::{Code, Fault, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::SystemTime;

const METRICS: &str = "metrics.jsonl";

/// Files that were carried over, by path below the run, with their length and time.
type Sent = Arc<Mutex<BTreeMap<String, (u64, SystemTime)>>>;

/// Rank 0's folder for a run in a store.
pub struct Spool {
    store: Store,
    folder: PathBuf,
    first: u64,
    sent: Sent,
    under_way: Option<JoinHandle<Result<()>>>,
}

/// Where the run's growing files are written: in the run itself where that is a folder, else on this machine.
pub fn folder(run: &Store) -> PathBuf {
    run.local().unwrap_or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
        let name = blake3::hash(run.url().as_bytes()).to_hex()[..16].to_string();
        base.unwrap_or_else(std::env::temp_dir).join("occlude/runs").join(name)
    })
}

impl Spool {
    /// The folder of a run that goes on after step `first`, with the metrics of its earlier steps in it; none where
    /// the run is a folder itself. What an earlier process left there is removed: the store knows better.
    pub fn open(store: &Store, first: u64) -> Result<Option<Spool>> {
        if store.local().is_some() {
            return Ok(None);
        }
        let folder = folder(store);
        let disk = |error| Fault::disk(folder.display(), error);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(disk(error)),
            _ => fs::create_dir_all(&folder).map_err(disk)?,
        }
        fs::write(folder.join(METRICS), earlier(store, first)?).map_err(disk)?;
        Ok(Some(Spool { store: store.clone(), folder, first, sent: Sent::default(), under_way: None }))
    }

    /// Carries over what is new, in the background; what is under way already is not waited for.
    pub fn send(&mut self) -> Result<()> {
        match self.under_way.take() {
            Some(thread) if !thread.is_finished() => self.under_way = Some(thread),
            Some(thread) => {
                joined(thread)
                    .unwrap_or_else(|fault| tracing::warn!("{fault}; it is tried again with the next checkpoint"));
                self.start()?;
            }
            None => self.start()?,
        }
        Ok(())
    }

    /// Carries over the rest, and waits for it.
    pub fn finish(mut self) -> Result<()> {
        if let Some(thread) = self.under_way.take() {
            joined(thread).unwrap_or_else(|fault| tracing::warn!("{fault}; trying again"));
        }
        carry(&self.store, &self.folder, self.first, &self.sent)
    }

    fn start(&mut self) -> Result<()> {
        let (store, folder, first, sent) = (self.store.clone(), self.folder.clone(), self.first, self.sent.clone());
        let thread = std::thread::Builder::new().name("spool".into());
        let thread = thread.spawn(move || carry(&store, &folder, first, &sent));
        self.under_way = Some(thread.map_err(|error| Fault::failed(format!("thread spool does not start: {error}")))?);
        Ok(())
    }
}

fn joined(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| Err(Fault::new(Code::Failed, "the thread that carries metrics over panicked")))
}

/// The lines of the steps up to `first`: of each part those before the next part began.
fn earlier(store: &Store, first: u64) -> Result<Vec<u8>> {
    let parts: Vec<(u64, String)> = store
        .list("metrics")?
        .into_iter()
        .filter_map(|(path, _)| {
            let step = path.strip_prefix("metrics/part-")?.strip_suffix(".jsonl")?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    let mut lines = Vec::new();
    for (at, (_, path)) in parts.iter().enumerate() {
        let end = parts.get(at + 1).map_or(u64::MAX, |next| next.0).min(first + 1);
        for line in store.get(path)?.split_inclusive(|&byte| byte == b'\n') {
            if step_of(line).is_some_and(|step| step < end) {
                lines.extend_from_slice(line);
            }
        }
    }
    Ok(lines)
}

fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<serde_json::Value>(line).ok()?["step"].as_u64()
}

/// Uploads every file below `folder` that changed, and this process's part of the metrics.
fn carry(store: &Store, folder: &Path, first: u64, sent: &Sent) -> Result<()> {
    let mut files = Vec::new();
    walk(folder, &mut files).map_err(|error| Fault::disk(folder.display(), error))?;
    for path in files {
        let name = path.strip_prefix(folder).expect("below the folder").to_string_lossy().into_owned();
        let read = || -> std::io::Result<_> {
            let meta = fs::metadata(&path)?;
            Ok(((meta.len(), meta.modified()?), fs::read(&path)?))
        };
        let (stamp, bytes) = read().map_err(|error| Fault::disk(path.display(), error))?;
        if sent.lock().expect("no panic while held").get(&name) == Some(&stamp) {
            continue;
        }
        match name == METRICS {
            true => {
                let own: Vec<u8> = bytes
                    .split_inclusive(|&byte| byte == b'\n')
                    .filter(|line| step_of(line).is_some_and(|step| step > first))
                    .flatten()
                    .copied()
                    .collect();
                store.put_owned(&format!("metrics/part-{:08}.jsonl", first + 1), own)?;
            }
            false => store.put_owned(&name, bytes)?,
        }
        sent.lock().expect("no panic while held").insert(name, stamp);
    }
    Ok(())
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => walk(&path, files)?,
            // A file being written has another name first.
            false if path.extension().is_none_or(|extension| extension != "new") => files.push(path),
            false => {}
        }
    }
    Ok(())
}
