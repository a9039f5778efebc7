//! A data set: the shards under one name, in any store. Opening reads the header of each shard's index. The rest of an
//! index is read at the first access to a sample of the shard, and dropped again when enough other shards are open.

use super::index::Digest;
use super::shard::{IMAGE_EXTENSIONS, Shard, ShardInfo, VIDEO_EXTENSIONS};
use super::store::Store;
use crate::error::{Error, ExitCode, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Number of threads that read headers of indices.
const MAX_CONCURRENT_READS: usize = 32;
/// Default number of open shards.
const DEFAULT_OPEN_SHARDS: usize = 64;
/// Maximum number of shards that a pattern such as `{000000..000009}` may name.
const MAX_PATTERN_SHARDS: u32 = 1 << 20;

/// The content of `dataset.json`, which `pack` writes after the shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSetManifest {
    pub name: String,
    /// Number of samples.
    pub samples: u64,
    /// Class names in the order of their labels; empty for a set without labels.
    #[serde(default)]
    pub classes: Vec<String>,
    #[serde(default)]
    pub shards: Vec<ShardRecord>,
    /// Source and options of the packing, so that packing again can tell whether anything changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// One shard in `dataset.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    pub file: String,
    /// Number of samples.
    pub samples: u64,
    /// Length of the tar.
    pub bytes: u64,
}

impl DataSetManifest {
    /// File name of the manifest.
    pub const FILE: &str = "dataset.json";

    /// Reads the manifest of a folder, if it has one.
    pub fn read(store: &Store) -> Result<Option<DataSetManifest>> {
        let Some(bytes) = store.get_optional(Self::FILE)? else {
            return Ok(None);
        };
        let manifest = serde_json::from_slice(&bytes);
        let name = || store.display_name(Self::FILE);
        manifest.map(Some).map_err(|error| Error::usage(format!("{}: {error}; pack again", name())))
    }
}

/// The samples of a data set, in the order of its shards.
pub struct DataSet {
    /// Name of the set, which is part of every sample's id.
    pub name: String,
    /// Class names; empty where they are unknown.
    pub classes: Vec<String>,
    shards: Vec<ShardInfo>,
    /// Index of the first sample of each shard; the last entry is the total.
    starts: Vec<u64>,
    /// Shards whose index is in memory. A lock is held while its shard is opened.
    open: Vec<Mutex<Option<Arc<Shard>>>>,
    /// Open shards in the order in which they were opened.
    recent: Mutex<VecDeque<usize>>,
    max_open_shards: AtomicUsize,
}

impl std::fmt::Debug for DataSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DataSet({}, {} samples in {} shards)", self.name, self.len(), self.shards.len())
    }
}

impl DataSet {
    /// Opens `url`: a folder of tars, one tar, or `dir/name-{000000..000009}.tar`, on a disk or in a store.
    ///
    /// # Errors
    /// ExitCode::Usage where there is no shard or no sample.
    pub fn open(url: &str) -> Result<DataSet> {
        Self::open_with_timeout(url, super::store::DEFAULT_STORE_TIMEOUT)
    }

    /// Opens a data set like [`DataSet::open`] in a store that may be unavailable for at most `timeout`.
    pub fn open_with_timeout(url: &str, timeout: Duration) -> Result<DataSet> {
        let (folder, pattern) = split_pattern(url);
        let store = Store::open_with_timeout(folder, timeout)?;
        let manifest = DataSetManifest::read(&store)?;
        let tars = match pattern {
            None => list_tars(&store, manifest.as_ref(), url)?,
            Some(pattern) => find_matching(&store, pattern, url)?,
        };
        let shards = map_concurrently(&tars, |tar| ShardInfo::read(&store, &tar.file, tar.bytes, tar.indexed))?;
        if let (None, Some(manifest)) = (pattern, &manifest) {
            check_manifest(&store, manifest, &shards)?;
        }
        let name = manifest.as_ref().map_or_else(|| store.folder_name(), |manifest| manifest.name.clone());
        let classes = manifest.map(|manifest| manifest.classes).unwrap_or_default();
        Self::from_shards(name, classes, shards)
    }

    fn from_shards(name: String, classes: Vec<String>, shards: Vec<ShardInfo>) -> Result<DataSet> {
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts.last().expect("it begins with 0") + shard.header().samples);
        }
        if starts.last() == Some(&0) {
            return Err(Error::usage(format!(
                "data set {name} has {} shards and no sample in them; pack it again",
                shards.len()
            )));
        }
        let open = shards.iter().map(|_| Mutex::new(None)).collect();
        let max_open_shards = AtomicUsize::new(DEFAULT_OPEN_SHARDS);
        Ok(DataSet { name, classes, shards, starts, open, recent: Mutex::default(), max_open_shards })
    }

    /// Keeps the indices of at most `shards` shards in memory (default 64).
    pub fn set_max_open_shards(&self, shards: usize) {
        self.max_open_shards.store(shards.max(1), Ordering::Relaxed);
    }

    /// Returns the number of samples; at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        *self.starts.last().expect("it begins with 0")
    }

    /// Returns the number of samples of each shard.
    pub fn shard_sizes(&self) -> Vec<u64> {
        self.shards.iter().map(|shard| shard.header().samples).collect()
    }

    /// Returns the shards, without their full indices.
    pub fn shards(&self) -> &[ShardInfo] {
        &self.shards
    }

    /// Returns the shard that contains sample `index` of 0..len, and the sample's row in it.
    pub fn locate(&self, index: u64) -> (usize, usize) {
        assert!(index < self.len(), "sample {index} of {}", self.len());
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        (shard, (index - self.starts[shard]) as usize)
    }

    /// Returns a shard; its index is read if it is not in memory.
    pub fn shard(&self, index: usize) -> Result<Arc<Shard>> {
        let mut slot = self.open[index].lock().expect("the lock is not poisoned");
        if let Some(shard) = slot.as_ref() {
            return Ok(shard.clone());
        }
        let shard = Arc::new(self.shards[index].open()?);
        *slot = Some(shard.clone());
        drop(slot);
        let mut recent = self.recent.lock().expect("the lock is not poisoned");
        recent.push_back(index);
        while recent.len() > self.max_open_shards.load(Ordering::Relaxed) {
            let oldest = recent.pop_front().expect("a shard is open");
            *self.open[oldest].lock().expect("the lock is not poisoned") = None;
        }
        Ok(shard)
    }

    /// Returns a shard if its index is in memory and not being read; never blocks.
    pub fn cached_shard(&self, index: usize) -> Option<Arc<Shard>> {
        self.open[index].try_lock().ok()?.clone()
    }

    /// Returns the shard that contains sample `index` of 0..len, opened, and the sample's row in it.
    pub fn find_sample(&self, index: u64) -> Result<(Arc<Shard>, usize)> {
        let (shard, row) = self.locate(index);
        Ok((self.shard(shard)?, row))
    }

    /// Returns the key of sample `index`.
    pub fn key(&self, index: u64) -> Result<String> {
        let (shard, row) = self.find_sample(index)?;
        Ok(shard.key(row).to_owned())
    }

    /// Returns the id of sample `index`; it depends only on the name of the set and the sample's key.
    pub fn id(&self, index: u64) -> Result<u64> {
        let (shard, row) = self.find_sample(index)?;
        Ok(self.id_of_key(shard.key(row)))
    }

    /// Returns the id of the sample with this key.
    pub fn id_of_key(&self, key: &str) -> u64 {
        crate::rng::hash_id(&[&self.name, key])
    }

    /// Returns whether samples have a class, judged by the first sample.
    pub fn has_labels(&self) -> Result<bool> {
        let (shard, row) = self.find_sample(0)?;
        Ok(shard.has_member(row, "cls"))
    }

    /// Returns whether samples are videos, judged by the first sample.
    pub fn is_video(&self) -> Result<bool> {
        let (shard, row) = self.find_sample(0)?;
        let Some(member) = shard.member(row, IMAGE_EXTENSIONS) else {
            return Ok(false);
        };
        let (_, extension) = member.split_name();
        Ok(VIDEO_EXTENSIONS.iter().any(|video| extension.eq_ignore_ascii_case(video)))
    }

    /// Returns whether the set is read over a network.
    pub fn is_remote(&self) -> bool {
        self.shards[0].is_remote()
    }

    /// Returns a digest over the name and every shard's index, which ranks compare. The digest of a shard without an
    /// index file differs from that of the same shard with one, because a scan does not hash the members.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.name.as_bytes());
        for shard in &self.shards {
            hasher.update(&shard.header().digest);
        }
        hasher.finalize().as_bytes()[..16].try_into().expect("sixteen bytes")
    }
}

/// Splits a URL into its folder and, where it names tars, the file name or pattern.
fn split_pattern(url: &str) -> (&str, Option<&str>) {
    let before = url.split('{').next().unwrap_or(url);
    if before.len() == url.len() && !url.ends_with(".tar") {
        return (url, None);
    }
    match before.rsplit_once('/') {
        Some((folder, _)) => (if folder.is_empty() { "/" } else { folder }, Some(&url[folder.len() + 1..])),
        None => (".", Some(url)),
    }
}

/// A tar of a data set, not opened yet.
struct Tar {
    file: String,
    bytes: u64,
    /// True if an index is stored next to it.
    indexed: bool,
}

/// Lists the tars of a folder by name; where a store cannot list (a web server), takes them from `dataset.json`.
fn list_tars(store: &Store, manifest: Option<&DataSetManifest>, url: &str) -> Result<Vec<Tar>> {
    if !store.can_list() {
        let Some(manifest) = manifest else {
            return Err(Error::usage(format!(
                "{}: a web server cannot list its files, and there is no {}; name the shards, as in \
                 {}/name-{{000000..000009}}.tar",
                store.url(),
                DataSetManifest::FILE,
                store.url()
            )));
        };
        let tar = |shard: &ShardRecord| Tar { file: shard.file.clone(), bytes: shard.bytes, indexed: true };
        return Ok(manifest.shards.iter().map(tar).collect());
    }
    let files: BTreeMap<String, u64> = store.list("")?.into_iter().filter(|(file, _)| !file.contains('/')).collect();
    let tars = files.iter().filter(|(file, _)| file.ends_with(".tar")).map(|(file, &bytes)| Tar {
        file: file.clone(),
        bytes,
        indexed: files.contains_key(&ShardInfo::index_name(file)),
    });
    let tars: Vec<Tar> = tars.collect();
    if !tars.is_empty() {
        return Ok(tars);
    }
    let missing = files.is_empty() && store.local_path().is_none_or(|folder| !folder.exists());
    Err(Error::usage(if missing {
        format!("there is no data set at {url}; check the path, or make shards with `occlude pack`")
    } else {
        format!("{url} holds no *.tar; make shards with `occlude pack SOURCE {url}`")
    }))
}

/// Returns the tars that a pattern names; all must exist.
fn find_matching(store: &Store, pattern: &str, url: &str) -> Result<Vec<Tar>> {
    let names = expand_braces(pattern)
        .ok_or_else(|| Error::usage(format!("{url}: a range of shards is written {{000000..000009}}, once")))?;
    map_concurrently(&names, |file| {
        let not_found = || {
            let name = store.display_name(file);
            Error::usage(format!("there is no data set at {name}; check the path, or make shards with `occlude pack`"))
        };
        let bytes = store.size(file)?.ok_or_else(not_found)?;
        let indexed = store.size(&ShardInfo::index_name(file))?.is_some();
        Ok(Tar { file: file.clone(), bytes, indexed })
    })
}

/// Expands `a{000..002}b` to `a000b`, `a001b`, `a002b`; a text without braces to itself.
fn expand_braces(pattern: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = pattern.split_once('{') else {
        return Some(vec![pattern.to_owned()]);
    };
    let (range, after) = rest.split_once('}')?;
    let (first, last) = range.split_once("..")?;
    let start: u32 = first.parse().ok()?;
    let end: u32 = last.parse().ok()?;
    if start > end || end - start >= MAX_PATTERN_SHARDS || after.contains('{') {
        return None;
    }
    let width = first.len();
    Some((start..=end).map(|number| format!("{before}{number:0width$}{after}")).collect())
}

/// Checks that a folder holds exactly the shards that its manifest lists.
fn check_manifest(store: &Store, manifest: &DataSetManifest, shards: &[ShardInfo]) -> Result<()> {
    let samples: u64 = shards.iter().map(|shard| shard.header().samples).sum();
    if samples == manifest.samples && (manifest.shards.is_empty() || manifest.shards.len() == shards.len()) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{} holds {samples} samples in {} shards, its {} says {} in {}; fetch what is missing, or pack again",
        store.display_name(""),
        shards.len(),
        DataSetManifest::FILE,
        manifest.samples,
        manifest.shards.len(),
    )))
}

/// Maps every item on several threads, because `request` waits for a store. The first error stops the rest.
fn map_concurrently<T: Sync, R: Send>(items: &[T], request: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<R>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..MAX_CONCURRENT_READS.min(items.len()) {
            scope.spawn(|| {
                while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&at| at < items.len()) {
                    let result = request(&items[index]);
                    if result.is_err() {
                        next.store(items.len(), Ordering::Relaxed);
                    }
                    *results[index].lock().expect("the lock is not poisoned") = Some(result);
                }
            });
        }
    });
    let mut values = Vec::with_capacity(items.len());
    let mut missing = false;
    for result in results {
        match result.into_inner().expect("the lock is not poisoned") {
            Some(result) => values.push(result?),
            None => missing = true,
        }
    }
    if missing {
        return Err(Error::new(ExitCode::Store, "a shard was not read"));
    }
    Ok(values)
}
