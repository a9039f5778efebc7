//! A data set: the shards behind one name.

use super::index::Digest;
use super::shard::Shard;
use crate::fault::{Fault, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// `dataset.json`, which `pack` writes last beside the shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub name: String,
    pub samples: u64,
    /// Names of the classes, in the order of their labels; empty where there are none.
    #[serde(default)]
    pub classes: Vec<String>,
    #[serde(default)]
    pub shards: Vec<Listed>,
    /// What the shards were made from and how, so that packing again can tell whether it has anything to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// One shard in `dataset.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    pub file: String,
    pub samples: u64,
    pub bytes: u64,
}

impl Manifest {
    pub const FILE: &str = "dataset.json";

    /// The manifest in `folder`, where there is one.
    pub fn read(folder: &Path) -> Result<Option<Manifest>> {
        let path = folder.join(Self::FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Fault::disk(path.display(), error)),
        };
        let manifest = serde_json::from_str(&text);
        manifest.map(Some).map_err(|error| Fault::usage(format!("{}: {error}; pack again", path.display())))
    }
}

/// All samples behind one name, in the order of the shards.
#[derive(Debug)]
pub struct DataSet {
    /// Part of every sample's id.
    pub name: String,
    /// Names of the classes; empty where they are not known.
    pub classes: Vec<String>,
    pub shards: Vec<Shard>,
    /// The number of samples in front of each shard, and at the end all of them.
    starts: Vec<u64>,
}

impl DataSet {
    /// Opens what `url` names: a folder of tars, one tar, or `dir/name-{000000..000009}.tar`. Faults with Code::Usage
    /// where nothing is there or no sample is in it.
    pub fn open(url: &str) -> Result<DataSet> {
        let path = Path::new(url);
        let (folder, paths) =
            if path.is_dir() { (path, tars(path)?) } else { (path.parent().unwrap_or(Path::new("")), braces(url)?) };
        if paths.is_empty() {
            return Err(Fault::usage(format!("{url} holds no *.tar; make shards with `occlude pack SOURCE {url}`")));
        }
        if let Some(missing) = paths.iter().find(|path| !path.is_file()) {
            let remedy = "check the path, or make shards with `occlude pack`";
            return Err(Fault::usage(format!("there is no data set at {}; {remedy}", missing.display())));
        }
        let manifest = Manifest::read(folder)?;
        let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>>>()?;
        if let (true, Some(manifest)) = (path.is_dir(), &manifest) {
            agree(folder, manifest, &shards)?;
        }
        let name = match &manifest {
            Some(manifest) => manifest.name.clone(),
            None => folder_name(folder)?,
        };
        Self::of(name, manifest.map(|manifest| manifest.classes).unwrap_or_default(), shards)
    }

    fn of(name: String, classes: Vec<String>, shards: Vec<Shard>) -> Result<DataSet> {
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts.last().expect("a start") + shard.samples() as u64);
        }
        if starts.last() == Some(&0) {
            return Err(Fault::usage(format!(
                "data set {name} has {} shards and no sample in them; pack it again",
                shards.len()
            )));
        }
        Ok(DataSet { name, classes, shards, starts })
    }

    /// How many samples there are; at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        *self.starts.last().expect("a start")
    }

    /// How many samples each shard holds.
    pub fn sizes(&self) -> Vec<u64> {
        self.shards.iter().map(|shard| shard.samples() as u64).collect()
    }

    /// Where sample `index` of 0..len lies: its shard, and its row there.
    pub fn sample(&self, index: u64) -> (&Shard, usize) {
        assert!(index < self.len(), "sample {index} of {}", self.len());
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        (&self.shards[shard], (index - self.starts[shard]) as usize)
    }

    /// The key of sample `index`.
    pub fn key(&self, index: u64) -> &str {
        let (shard, row) = self.sample(index);
        shard.key(row)
    }

    /// The id of sample `index`: it depends on the data set's name and the sample's key, on nothing else.
    pub fn id(&self, index: u64) -> u64 {
        crate::rng::id(&[&self.name, self.key(index)])
    }

    /// Whether samples carry a class: whether the first one does.
    pub fn labelled(&self) -> bool {
        let (shard, row) = self.sample(0);
        shard.has(row, "cls")
    }

    /// One digest over the name and every shard's index, for ranks to compare. It depends on whether indices are
    /// there, since only they know what the members must hash to.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.name.as_bytes());
        for shard in &self.shards {
            hasher.update(&shard.index().digest());
        }
        hasher.finalize().as_bytes()[..16].try_into().expect("sixteen bytes")
    }
}

/// The folder's name, whatever it is called from.
fn folder_name(folder: &Path) -> Result<String> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let whole = folder.canonicalize().map_err(|error| Fault::disk(folder.display(), error))?;
    Ok(whole.file_name().map_or("data".into(), |name| name.to_string_lossy().into_owned()))
}

/// The tars of a folder, by name.
fn tars(folder: &Path) -> Result<Vec<PathBuf>> {
    let disk = |error| Fault::disk(folder.display(), error);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(disk)? {
        let path = entry.map_err(disk)?.path();
        if path.extension().is_some_and(|extension| extension == "tar") && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// `a{000..002}b` → `a000b`, `a001b`, `a002b`; a text without braces is itself.
fn braces(url: &str) -> Result<Vec<PathBuf>> {
    let Some((before, rest)) = url.split_once('{') else {
        return Ok(vec![PathBuf::from(url)]);
    };
    let wrong = || Fault::usage(format!("{url}: a range of shards is written {{000000..000009}}, once"));
    let (range, after) = rest.split_once('}').ok_or_else(wrong)?;
    let (first, last) = range.split_once("..").ok_or_else(wrong)?;
    let (from, to): (u32, u32) = first
        .parse()
        .ok()
        .zip(last.parse().ok())
        .filter(|(from, to)| from <= to && to - from < 1 << 20)
        .ok_or_else(wrong)?;
    if after.contains('{') {
        return Err(wrong());
    }
    let width = first.len();
    Ok((from..=to).map(|n| PathBuf::from(format!("{before}{n:0width$}{after}"))).collect())
}

/// A folder must hold the shards that its manifest lists, no more and no fewer.
fn agree(folder: &Path, manifest: &Manifest, shards: &[Shard]) -> Result<()> {
    let got: u64 = shards.iter().map(|shard| shard.samples() as u64).sum();
    if got == manifest.samples && (manifest.shards.is_empty() || manifest.shards.len() == shards.len()) {
        return Ok(());
    }
    Err(Fault::usage(format!(
        "{} holds {got} samples in {} shards, its {} says {} in {}; fetch what is missing, or pack again",
        folder.display(),
        shards.len(),
        Manifest::FILE,
        manifest.samples,
        manifest.shards.len(),
    )))
}
