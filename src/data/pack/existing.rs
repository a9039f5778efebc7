//! Checks what the destination holds: a finished pack, the shards of a killed one, or other files.

use super::super::index::Index;
use super::super::set::{DataSetManifest, ShardRecord};
use super::super::shard::ShardInfo;
use super::super::shard_writer::{is_partial, write_atomically};
use super::super::store::Store;
use super::plan::{PackPlan, PlannedShard, PlannedSplit};
use super::source::SourceSample;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;

/// The file that marks an unfinished pack.
const MARKER_FILE: &str = "pack.json";

/// The content of the marker.
#[derive(Serialize, Deserialize)]
struct Marker {
    /// The plan's fingerprint.
    source: String,
}

/// Names of files with their bytes, and of folders.
type Listing = BTreeMap<String, u64>;

/// A complete shard at the destination.
pub struct ExistingShard {
    pub record: ShardRecord,
    /// Indices of planned samples that it does not hold.
    pub missing: Vec<usize>,
}

/// Returns the manifests if all data sets of the plan are complete.
pub fn read_finished(plan: &PackPlan) -> Result<Option<Vec<DataSetManifest>>> {
    let mut manifests = Vec::new();
    for split in &plan.splits {
        let listing = list_folder(&split.store)?;
        match read_manifest(split, &listing, &plan.fingerprint)? {
            Some(manifest) if manifest.shards.iter().all(|shard| has_shard(&listing, shard)) => {
                manifests.push(manifest);
            }
            _ => return Ok(None),
        }
    }
    Ok(Some(manifests))
}

fn has_shard(listing: &Listing, shard: &ShardRecord) -> bool {
    listing.get(&shard.file) == Some(&shard.bytes) && listing.contains_key(&ShardInfo::index_name(&shard.file))
}

/// Prepares the destination of a data set: refuses files that are not a pack's, keeps planned shards that are complete,
/// removes the others. Returns what is kept of each planned shard.
pub fn prepare_split(
    split: &PlannedSplit,
    samples: &[SourceSample],
    fingerprint: &str,
) -> Result<Vec<Option<ExistingShard>>> {
    let listing = list_folder(&split.store)?;
    let manifest = read_manifest(split, &listing, fingerprint)?;
    let marker = split.store.get_optional(MARKER_FILE)?;
    let marker = marker.and_then(|bytes| serde_json::from_slice::<Marker>(&bytes).ok());
    let is_same = manifest.is_some() || marker.is_some_and(|marker| marker.source == fingerprint);
    let find = |shard| if is_same { find_shard(&split.store, &listing, shard, samples) } else { Ok(None) };
    let existing: Vec<Option<ExistingShard>> = split.shards.iter().map(find).collect::<Result<_>>()?;
    let mut kept_files = vec![DataSetManifest::FILE.to_owned()];
    for record in existing.iter().flatten().map(|shard| &shard.record) {
        kept_files.extend([record.file.clone(), ShardInfo::index_name(&record.file)]);
    }
    kept_files.sort();
    for file in listing.keys().filter(|file| kept_files.binary_search(file).is_err()) {
        remove_file(&split.store, file)?;
    }
    if let Some(folder) = split.store.local_path() {
        fs::create_dir_all(&folder).map_err(|error| Error::disk(folder.display(), error))?;
    }
    let text = serde_json::to_string(&Marker { source: fingerprint.to_owned() }).expect("JSON");
    write_atomically(&split.store, MARKER_FILE, text.as_bytes())?;
    Ok(existing)
}

/// Removes the marker of an unfinished pack.
pub fn remove_marker(split: &PlannedSplit) -> Result<()> {
    remove_file(&split.store, MARKER_FILE)
}

fn remove_file(store: &Store, file: &str) -> Result<()> {
    let Some(folder) = store.local_path() else {
        return store.delete(file);
    };
    match fs::remove_file(folder.join(file)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::disk(folder.join(file).display(), error))
        }
        _ => Ok(()),
    }
}

/// Lists a folder; empty where it does not exist.
fn list_folder(store: &Store) -> Result<Listing> {
    let Some(folder) = store.local_path() else {
        let top_level = |(path, bytes): (String, u64)| match path.split_once('/') {
            Some((folder, _)) => (folder.to_owned(), 0),
            None => (path, bytes),
        };
        return Ok(store.list("")?.into_iter().map(top_level).collect());
    };
    let disk = |error| Error::disk(folder.display(), error);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Listing::new()),
        entries => entries.map_err(disk)?,
    };
    let name_and_bytes = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len()))
    };
    entries.map(name_and_bytes).collect::<std::io::Result<_>>().map_err(disk)
}

/// Returns the manifest of this very pack, if it exists; an error where the destination holds other files than a
/// pack's.
fn read_manifest(split: &PlannedSplit, listing: &Listing, fingerprint: &str) -> Result<Option<DataSetManifest>> {
    let occupied = |content: String| {
        let destination = split.store.display_name("");
        let destination = destination.trim_end_matches('/');
        Error::usage(format!("{destination} holds {content}; choose another output, or remove it"))
    };
    if listing.contains_key(DataSetManifest::FILE)
        && let Some(manifest) = DataSetManifest::read(&split.store)?
    {
        if manifest.source.as_deref() == Some(fingerprint) {
            return Ok(Some(manifest));
        }
        return Err(occupied(format!("the data set {} already, from other samples or settings", manifest.name)));
    }
    let prefix = format!("{}-", split.name);
    let is_pack_file = |file: &str| file.starts_with(&prefix) || is_partial(file) || file == MARKER_FILE;
    match listing.keys().find(|file| !is_pack_file(file)) {
        Some(file) => Err(occupied(format!("{file}, which is not from a pack of {}", split.name))),
        None => Ok(None),
    }
}

/// Returns a planned shard from the destination, if its tar and index are complete and hold planned samples only.
fn find_shard(
    store: &Store,
    listing: &Listing,
    shard: &PlannedShard,
    samples: &[SourceSample],
) -> Result<Option<ExistingShard>> {
    let index_name = ShardInfo::index_name(&shard.file);
    let Some(&bytes) = listing.get(&shard.file).filter(|_| listing.contains_key(&index_name)) else {
        return Ok(None);
    };
    let Ok(index) = Index::from_bytes(store.get(&index_name)?) else {
        return Ok(None);
    };
    let key = |sample| index.sample_members(sample).next().expect("a member").split_name().0;
    let mut keys = (0..index.sample_count()).map(key).peekable();
    let is_missing = |&planned: &usize| keys.next_if_eq(&samples[planned].key.as_str()).is_none();
    let missing = shard.samples.clone().filter(is_missing).collect();
    let is_planned = keys.next().is_none() && index.sample_count() > 0;
    if !is_planned || index.header().shard_bytes != bytes {
        return Ok(None);
    }
    let record = ShardRecord { file: shard.file.clone(), samples: index.sample_count() as u64, bytes };
    Ok(Some(ExistingShard { record, missing }))
}
