//! What stands at the destination already: a finished pack, what a killed one left, or somebody else's files.

use super::super::index::Index;
use super::super::set::{Listed, Manifest};
use super::super::shard::Found;
use super::super::store::Store;
use super::super::write::{commit, is_partial};
use super::plan::{Part, Plan, Shard};
use super::source::Picture;
use crate::fault::{Fault, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;

/// The file that stands beside shards until all are there, and says what they are made from.
const UNFINISHED: &str = "pack.json";

#[derive(Serialize, Deserialize)]
struct Unfinished {
    source: String,
}

/// Names of files and their bytes, and of folders.
type There = BTreeMap<String, u64>;

/// A shard that stands: what `dataset.json` says of it, and the planned pictures that it lacks.
pub struct Kept {
    pub listed: Listed,
    pub lacks: Vec<usize>,
}

/// The manifests, where all data sets of the plan stand whole.
pub fn finished(plan: &Plan) -> Result<Option<Vec<Manifest>>> {
    let mut manifests = Vec::new();
    for part in &plan.parts {
        let there = there(&part.store)?;
        match mine(part, &there, &plan.made_from)? {
            Some(manifest) if manifest.shards.iter().all(|shard| has(&there, shard)) => manifests.push(manifest),
            _ => return Ok(None),
        }
    }
    Ok(Some(manifests))
}

fn has(there: &There, shard: &Listed) -> bool {
    there.get(&shard.file) == Some(&shard.bytes) && there.contains_key(&Found::index_of(&shard.file))
}

/// Makes the destination of a part ready: refuses what is not a pack's, keeps the shards that are whole and planned so,
/// removes the others. What is kept, for each shard of the plan.
pub fn prepare(part: &Part, pictures: &[Picture], made_from: &str) -> Result<Vec<Option<Kept>>> {
    let there = there(&part.store)?;
    let manifest = mine(part, &there, made_from)?;
    let begun = part.store.get_if_there(UNFINISHED)?;
    let begun = begun.and_then(|bytes| serde_json::from_slice::<Unfinished>(&bytes).ok());
    let same = manifest.is_some() || begun.is_some_and(|begun| begun.source == made_from);
    let kept = |shard| if same { whole(&part.store, &there, shard, pictures) } else { Ok(None) };
    let kept: Vec<Option<Kept>> = part.shards.iter().map(kept).collect::<Result<_>>()?;
    let mut stay = vec![Manifest::FILE.to_owned()];
    for listed in kept.iter().flatten().map(|kept| &kept.listed) {
        stay.extend([listed.file.clone(), Found::index_of(&listed.file)]);
    }
    stay.sort();
    for file in there.keys().filter(|file| stay.binary_search(file).is_err()) {
        remove(&part.store, file)?;
    }
    if let Some(folder) = part.store.local() {
        fs::create_dir_all(&folder).map_err(|error| Fault::disk(folder.display(), error))?;
    }
    let text = serde_json::to_string(&Unfinished { source: made_from.to_owned() }).expect("JSON");
    commit(&part.store, UNFINISHED, text.as_bytes())?;
    Ok(kept)
}

/// Takes away the mark of an unfinished pack.
pub fn done(part: &Part) -> Result<()> {
    remove(&part.store, UNFINISHED)
}

fn remove(store: &Store, file: &str) -> Result<()> {
    let Some(folder) = store.local() else {
        return store.delete(file);
    };
    match fs::remove_file(folder.join(file)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Fault::disk(folder.join(file).display(), error))
        }
        _ => Ok(()),
    }
}

/// What lies in a folder; nothing where there is no folder.
fn there(store: &Store) -> Result<There> {
    let Some(folder) = store.local() else {
        let top = |(path, bytes): (String, u64)| match path.split_once('/') {
            Some((folder, _)) => (folder.to_owned(), 0),
            None => (path, bytes),
        };
        return Ok(store.list("")?.into_iter().map(top).collect());
    };
    let disk = |error| Fault::disk(folder.display(), error);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(There::new()),
        entries => entries.map_err(disk)?,
    };
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len()))
    };
    entries.map(entry).collect::<std::io::Result<_>>().map_err(disk)
}

/// The manifest of this very pack, if it stands; a fault where anything else stands there than a pack's files.
fn mine(part: &Part, there: &There, made_from: &str) -> Result<Option<Manifest>> {
    let taken = |what: String| {
        let remedy = "choose another output, or remove it";
        Fault::usage(format!("{} holds {what}; {remedy}", part.store.name("").trim_end_matches('/')))
    };
    if there.contains_key(Manifest::FILE)
        && let Some(manifest) = Manifest::read(&part.store)?
    {
        return match manifest.source.as_deref() == Some(made_from) {
            true => Ok(Some(manifest)),
            false => Err(taken(format!("the data set {} already, from other pictures or settings", manifest.name))),
        };
    }
    let ours = |file: &str| file.starts_with(&format!("{}-", part.name)) || is_partial(file) || file == UNFINISHED;
    match there.keys().find(|file| !ours(file)) {
        Some(file) => Err(taken(format!("{file}, which no pack of {} left there", part.name))),
        None => Ok(None),
    }
}

/// The shard as it stands, where tar and index are whole and of planned pictures.
fn whole(store: &Store, there: &There, shard: &Shard, pictures: &[Picture]) -> Result<Option<Kept>> {
    let beside = Found::index_of(&shard.file);
    let Some(&bytes) = there.get(&shard.file).filter(|_| there.contains_key(&beside)) else {
        return Ok(None);
    };
    let Ok(index) = Index::from_bytes(store.get(&beside)?) else {
        return Ok(None);
    };
    let mut found = (0..index.samples()).map(|row| index.sample(row).next().expect("a member").split().0).peekable();
    let lacks = shard.pictures.clone().filter(|&at| found.next_if_eq(&pictures[at].key.as_str()).is_none()).collect();
    let planned = found.next().is_none() && index.samples() > 0;
    let listed = Listed { file: shard.file.clone(), samples: index.samples() as u64, bytes };
    Ok((planned && index.header().shard_bytes == bytes).then_some(Kept { listed, lacks }))
}
