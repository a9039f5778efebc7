//! A data set: the shards behind one name, in any store. Opening reads the header of each shard's index; the rest of an
//! index is read when a sample of the shard is first asked for, and forgotten again when other shards are open.

use super::index::Digest;
use super::shard::{Found, IMAGE, Shard, VIDEO};
use super::store::Store;
use crate::fault::{Code, Fault, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Headers of indices that are read at a time.
const AT_A_TIME: usize = 32;

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

    /// The manifest in a folder, where there is one.
    pub fn read(store: &Store) -> Result<Option<Manifest>> {
        let Some(bytes) = store.get_if_there(Self::FILE)? else {
            return Ok(None);
        };
        let manifest = serde_json::from_slice(&bytes);
        manifest.map(Some).map_err(|error| Fault::usage(format!("{}: {error}; pack again", store.name(Self::FILE))))
    }
}

/// All samples behind one name, in the order of the shards.
pub struct DataSet {
    /// Part of every sample's id.
    pub name: String,
    /// Names of the classes; empty where they are not known.
    pub classes: Vec<String>,
    shards: Vec<Found>,
    /// The number of samples in front of each shard, and at the end all of them.
    starts: Vec<u64>,
    /// Shards whose indices are here; whoever opens one holds its lock meanwhile.
    open: Vec<Mutex<Option<Arc<Shard>>>>,
    /// The open shards, the longest open in front, and how many there may be.
    recent: Mutex<VecDeque<usize>>,
    hold: AtomicUsize,
}

impl std::fmt::Debug for DataSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DataSet({}, {} samples in {} shards)", self.name, self.len(), self.shards.len())
    }
}

impl DataSet {
    /// Opens what `url` names: a folder of tars, one tar, or `dir/name-{000000..000009}.tar`, on a disk or in a store.
    /// Faults with Code::Usage where nothing is there or no sample is in it.
    pub fn open(url: &str) -> Result<DataSet> {
        Self::open_patiently(url, super::store::PATIENCE)
    }

    /// As [`DataSet::open`], over a store that may be away for so long.
    pub fn open_patiently(url: &str, limit: Duration) -> Result<DataSet> {
        let (folder, pattern) = split(url);
        let store = Store::open_patiently(folder, limit)?;
        let manifest = Manifest::read(&store)?;
        let tars = match pattern {
            None => tars(&store, manifest.as_ref(), url)?,
            Some(pattern) => matching(&store, pattern, url)?,
        };
        let shards = side_by_side(&tars, |(file, bytes, indexed)| Found::find(&store, file, *bytes, *indexed))?;
        if let (None, Some(manifest)) = (pattern, &manifest) {
            agree(&store, manifest, &shards)?;
        }
        let name = manifest.as_ref().map_or_else(|| store.folder_name(), |manifest| manifest.name.clone());
        Self::of(name, manifest.map(|manifest| manifest.classes).unwrap_or_default(), shards)
    }

    fn of(name: String, classes: Vec<String>, shards: Vec<Found>) -> Result<DataSet> {
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts.last().expect("a start") + shard.header().samples);
        }
        if starts.last() == Some(&0) {
            return Err(Fault::usage(format!(
                "data set {name} has {} shards and no sample in them; pack it again",
                shards.len()
            )));
        }
        let open = shards.iter().map(|_| Mutex::new(None)).collect();
        Ok(DataSet { name, classes, shards, starts, open, recent: Mutex::default(), hold: AtomicUsize::new(64) })
    }

    /// Keeps the indices of `shards` shards at a time; 64 where nobody says.
    pub fn hold(&self, shards: usize) {
        self.hold.store(shards.max(1), Ordering::Relaxed);
    }

    /// How many samples there are; at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        *self.starts.last().expect("a start")
    }

    /// How many samples each shard holds.
    pub fn sizes(&self) -> Vec<u64> {
        self.shards.iter().map(|shard| shard.header().samples).collect()
    }

    /// Its shards, as they were found.
    pub fn shards(&self) -> &[Found] {
        &self.shards
    }

    /// The shard that sample `index` of 0..len lies in, and its row there.
    pub fn place(&self, index: u64) -> (usize, usize) {
        assert!(index < self.len(), "sample {index} of {}", self.len());
        let shard = self.starts.partition_point(|&start| start <= index) - 1;
        (shard, (index - self.starts[shard]) as usize)
    }

    /// Shard `number`, its index read if it is not here.
    pub fn shard(&self, number: usize) -> Result<Arc<Shard>> {
        let mut slot = self.open[number].lock().expect("no panic while held");
        if let Some(shard) = slot.as_ref() {
            return Ok(shard.clone());
        }
        let shard = Arc::new(self.shards[number].open()?);
        *slot = Some(shard.clone());
        drop(slot);
        let mut recent = self.recent.lock().expect("no panic while held");
        recent.push_back(number);
        while recent.len() > self.hold.load(Ordering::Relaxed) {
            let oldest = recent.pop_front().expect("a shard is open");
            *self.open[oldest].lock().expect("no panic while held") = None;
        }
        Ok(shard)
    }

    /// Shard `number` if its index is here already and nobody is busy with it; never waits.
    pub fn open_shard(&self, number: usize) -> Option<Arc<Shard>> {
        self.open[number].try_lock().ok()?.clone()
    }

    /// Where sample `index` of 0..len lies: its shard, and its row there.
    pub fn sample(&self, index: u64) -> Result<(Arc<Shard>, usize)> {
        let (shard, row) = self.place(index);
        Ok((self.shard(shard)?, row))
    }

    /// The key of sample `index`.
    pub fn key(&self, index: u64) -> Result<String> {
        let (shard, row) = self.sample(index)?;
        Ok(shard.key(row).to_owned())
    }

    /// The id of sample `index`: it depends on the data set's name and the sample's key, on nothing else.
    pub fn id(&self, index: u64) -> Result<u64> {
        let (shard, row) = self.sample(index)?;
        Ok(self.id_of(shard.key(row)))
    }

    /// The id of the sample with this key.
    pub fn id_of(&self, key: &str) -> u64 {
        crate::rng::id(&[&self.name, key])
    }

    /// Whether samples carry a class: whether the first one does.
    pub fn labelled(&self) -> Result<bool> {
        let (shard, row) = self.sample(0)?;
        Ok(shard.has(row, "cls"))
    }

    /// Whether samples are videos: whether the first one is.
    pub fn moving(&self) -> Result<bool> {
        let (shard, row) = self.sample(0)?;
        let moves = |extension: &str| VIDEO.iter().any(|video| extension.eq_ignore_ascii_case(video));
        Ok(shard.member(row, IMAGE).is_some_and(|member| moves(member.split().1)))
    }

    /// Whether its bytes travel over a network.
    pub fn remote(&self) -> bool {
        self.shards[0].remote()
    }

    /// One digest over the name and every shard's index, for ranks to compare. It depends on whether indices are
    /// there, since only they know what the members must hash to.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.name.as_bytes());
        for shard in &self.shards {
            hasher.update(&shard.header().digest);
        }
        hasher.finalize().as_bytes()[..16].try_into().expect("sixteen bytes")
    }
}

/// A URL's folder, and what follows it where that is one tar or a pattern of tars.
fn split(url: &str) -> (&str, Option<&str>) {
    let before = url.split('{').next().unwrap_or(url);
    if before.len() == url.len() && !url.ends_with(".tar") {
        return (url, None);
    }
    match before.rsplit_once('/') {
        Some((folder, _)) => (if folder.is_empty() { "/" } else { folder }, Some(&url[folder.len() + 1..])),
        None => (".", Some(url)),
    }
}

/// A tar, its bytes, and whether its index lies beside it.
type Tar = (String, u64, bool);

/// The tars of a folder, by name. Where a store cannot list (a web server), `dataset.json` says what there is.
fn tars(store: &Store, manifest: Option<&Manifest>, url: &str) -> Result<Vec<Tar>> {
    if !store.lists() {
        let Some(manifest) = manifest else {
            return Err(Fault::usage(format!(
                "{}: a web server cannot be asked what it holds, and there is no {}; name the shards, as in \
                 {}/name-{{000000..000009}}.tar",
                store.url(),
                Manifest::FILE,
                store.url()
            )));
        };
        return Ok(manifest.shards.iter().map(|shard| (shard.file.clone(), shard.bytes, true)).collect());
    }
    let there: BTreeMap<String, u64> = store.list("")?.into_iter().filter(|(file, _)| !file.contains('/')).collect();
    let tar = |(file, bytes): (&String, &u64)| {
        let indexed = there.contains_key(&Found::index_of(file));
        file.ends_with(".tar").then(|| (file.clone(), *bytes, indexed))
    };
    let tars: Vec<Tar> = there.iter().filter_map(tar).collect();
    if tars.is_empty() {
        return Err(Fault::usage(match there.is_empty() && store.local().is_none_or(|folder| !folder.exists()) {
            true => format!("there is no data set at {url}; check the path, or make shards with `occlude pack`"),
            false => format!("{url} holds no *.tar; make shards with `occlude pack SOURCE {url}`"),
        }));
    }
    Ok(tars)
}

/// The tars that a pattern names; all must be there.
fn matching(store: &Store, pattern: &str, url: &str) -> Result<Vec<Tar>> {
    let names = braces(pattern)
        .ok_or_else(|| Fault::usage(format!("{url}: a range of shards is written {{000000..000009}}, once")))?;
    side_by_side(&names, |file| {
        let absent = || {
            let remedy = "check the path, or make shards with `occlude pack`";
            Fault::usage(format!("there is no data set at {}; {remedy}", store.name(file)))
        };
        let bytes = store.size(file)?.ok_or_else(absent)?;
        Ok((file.clone(), bytes, store.size(&Found::index_of(file))?.is_some()))
    })
}

/// `a{000..002}b` → `a000b`, `a001b`, `a002b`; a text without braces is itself.
fn braces(pattern: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = pattern.split_once('{') else {
        return Some(vec![pattern.to_owned()]);
    };
    let (range, after) = rest.split_once('}')?;
    let (first, last) = range.split_once("..")?;
    let (from, to): (u32, u32) =
        first.parse().ok().zip(last.parse().ok()).filter(|(from, to)| from <= to && to - from < 1 << 20)?;
    let width = first.len();
    (!after.contains('{')).then(|| (from..=to).map(|n| format!("{before}{n:0width$}{after}")).collect())
}

/// A folder must hold the shards that its manifest lists, no more and no fewer.
fn agree(store: &Store, manifest: &Manifest, shards: &[Found]) -> Result<()> {
    let got: u64 = shards.iter().map(|shard| shard.header().samples).sum();
    if got == manifest.samples && (manifest.shards.is_empty() || manifest.shards.len() == shards.len()) {
        return Ok(());
    }
    Err(Fault::usage(format!(
        "{} holds {got} samples in {} shards, its {} says {} in {}; fetch what is missing, or pack again",
        store.name(""),
        shards.len(),
        Manifest::FILE,
        manifest.samples,
        manifest.shards.len(),
    )))
}

/// `ask` of every item, several at a time: each asks a store and waits.
fn side_by_side<T: Sync, R: Send>(items: &[T], ask: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let answers: Vec<Mutex<Option<Result<R>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME.min(items.len()) {
            scope.spawn(|| {
                while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&at| at < items.len()) {
                    let answer = ask(&items[at]);
                    if answer.is_err() {
                        // Nobody needs the rest.
                        next.store(items.len(), Ordering::Relaxed);
                    }
                    *answers[at].lock().expect("no panic while held") = Some(answer);
                }
            });
        }
    });
    let mut all = Vec::with_capacity(items.len());
    let mut missing = false;
    for answer in answers {
        match answer.into_inner().expect("no panic while held") {
            Some(answer) => all.push(answer?),
            None => missing = true,
        }
    }
    match missing {
        true => Err(Fault::new(Code::Store, "a shard was not looked at")),
        false => Ok(all),
    }
}
