//! One shard: a WebDataset tar in a store, and its index (`index.rs`), which lies beside it, or was made by a scan
//! (`scan.rs`) when the tar was first seen.
//!
//! Bytes are fetched at each call, with the member's digest checked where the index knows it, and nothing stays open
//! between calls: a data set may have more shards than a process may have files.

use super::index::{self, HEADER, Header, Index, Row};
use super::scan;
use super::store::{self, Store};
use crate::fault::{Code, Fault, Result};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// How often an index that came damaged is fetched again.
const AGAIN: usize = 3;

/// The extensions of pictures that `decode` reads, still and moving.
pub const IMAGE: &[&str] = &["jpg", "jpeg", "png", "webp", "mp4", "webm", "mkv", "avi", "mov", "m4v"];
/// Those of them that move.
pub const VIDEO: &[&str] = &["mp4", "webm", "mkv", "avi", "mov", "m4v"];
/// The extensions of sounds that `sound` reads.
pub const SOUND: &[&str] = &["wav", "flac", "mp3", "ogg", "opus"];

/// Where the index of a tar is to be had.
#[derive(Clone, Debug)]
enum Place {
    /// Beside the tar.
    Beside,
    /// In this machine's cache of scans.
    Scanned(PathBuf),
    /// Here: the tar was scanned and the cache cannot be written.
    Here(Arc<Index>),
}

/// A tar of which the header of its index has been read: how many samples it holds, not yet which.
#[derive(Clone, Debug)]
pub struct Found {
    store: Store,
    file: String,
    header: Header,
    place: Place,
}

impl Found {
    /// The name of the index of a tar.
    pub fn index_of(file: &str) -> String {
        format!("{file}.idx")
    }

    /// Reads the header of the index of `file`, a tar of `bytes` bytes, or scans the tar where it has none. Faults:
    /// Code::Usage where index and tar do not belong together, Code::Corrupt where one is damaged.
    pub fn find(store: &Store, file: &str, bytes: u64, indexed: bool) -> Result<Found> {
        let listed = |header, place| Found { store: store.clone(), file: file.to_owned(), header, place };
        if !indexed {
            let (index, place) = scanned(store, file, bytes).map_err(|fault| fault.at(store.name(file)))?;
            return Ok(listed(*index.header(), place));
        }
        let beside = Self::index_of(file);
        let at = |fault: Fault| fault.at(store.name(&beside));
        let read = || store.get_range(&beside, 0..HEADER as u64).and_then(|bytes| Header::read(&bytes));
        let header = whole(store, read).map_err(at)?;
        if header.shard_bytes != bytes {
            return Err(Fault::usage(format!(
                "{} was made for a tar of {} bytes, {} has {bytes}; pack again, or delete the index to have the tar \
                 scanned",
                store.name(&beside),
                header.shard_bytes,
                store.name(file),
            )));
        }
        Ok(listed(header, Place::Beside))
    }

    /// What the index's header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The tar's name, for messages.
    pub fn name(&self) -> String {
        self.store.name(&self.file)
    }

    /// Whether its bytes travel over a network.
    pub fn remote(&self) -> bool {
        self.store.remote()
    }

    /// The whole index, checked.
    pub fn open(&self) -> Result<Shard> {
        let index = match &self.place {
            Place::Here(index) => index.clone(),
            Place::Beside => {
                let beside = Self::index_of(&self.file);
                let read = whole(&self.store, || self.store.get(&beside).and_then(Index::from_bytes));
                Arc::new(read.map_err(|fault| fault.at(self.store.name(&beside)))?)
            }
            Place::Scanned(path) => {
                let bytes = std::fs::read(path).map_err(|error| Fault::disk(path.display(), error))?;
                Arc::new(Index::from_bytes(bytes).map_err(|fault| fault.at(path.display()))?)
            }
        };
        if index.header() != &self.header {
            return Err(Fault::new(
                Code::Corrupt,
                format!("{}: its index was replaced while the program ran; start again", self.name()),
            ));
        }
        let path = self.store.local().map(|folder| folder.join(&self.file));
        Ok(Shard { store: self.store.clone(), file: self.file.clone(), path, index })
    }
}

/// What is read of an index. Bits flip on the way from a store: what came damaged is fetched again.
fn whole<T>(store: &Store, read: impl Fn() -> Result<T>) -> Result<T> {
    let mut got = read();
    for _ in 0..AGAIN {
        match got {
            Err(fault) if fault.code == Code::Corrupt && store.remote() => {
                tracing::warn!("{fault}; fetching it again");
                got = read();
            }
            done => return done,
        }
    }
    got
}

/// The index of a tar that has none: from the cache of scans, or by a scan, which is then kept there. A tar's scan is
/// known by its URL and length; several processes wait for the first that scans.
fn scanned(store: &Store, file: &str, bytes: u64) -> Result<(Arc<Index>, Place)> {
    let name = store.name(file);
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let scan = || {
        tracing::info!("{name} has no index: scanning it");
        scan::scan(store, file, bytes)
    };
    // Files on this machine change under their name, and are scanned in no time.
    let (Some(base), None) = (base, store.local()) else {
        let index = Arc::new(scan()?);
        return Ok((index.clone(), Place::Here(index)));
    };
    let id = index::hex(&index::digest(format!("{name}\0{bytes}").as_bytes()));
    let path = base.join("occlude/scans").join(format!("{id}.idx"));
    let locked = || -> std::io::Result<std::fs::File> {
        std::fs::create_dir_all(path.parent().expect("a folder"))?;
        let lock = std::fs::File::create(path.with_extension("lock"))?;
        lock.lock()?;
        Ok(lock)
    };
    let _lock = locked();
    if let Ok(index) = std::fs::read(&path).map_err(|_| ()).and_then(|bytes| Index::from_bytes(bytes).map_err(drop)) {
        return Ok((Arc::new(index), Place::Scanned(path)));
    }
    let index = Arc::new(scan()?);
    let partial = path.with_extension("partial");
    let place = match std::fs::write(&partial, index.bytes()).and_then(|()| std::fs::rename(&partial, &path)) {
        Ok(()) => Place::Scanned(path),
        Err(_) => Place::Here(index.clone()),
    };
    Ok((index, place))
}

/// One tar of samples.
#[derive(Debug)]
pub struct Shard {
    store: Store,
    file: String,
    /// Of a tar on this machine's disk.
    path: Option<PathBuf>,
    index: Arc<Index>,
}

impl Shard {
    /// Opens one tar, by its index or by a scan.
    pub fn open(store: &Store, file: &str) -> Result<Shard> {
        let absent = || Fault::usage(format!("{}: not found. Check the path.", store.name(file)));
        let bytes = store.size(file)?.ok_or_else(absent)?;
        let indexed = store.size(&Found::index_of(file))?.is_some();
        Found::find(store, file, bytes, indexed)?.open()
    }

    /// How many samples it holds.
    pub fn samples(&self) -> usize {
        self.index.samples()
    }

    /// The key of sample `row`.
    pub fn key(&self, row: usize) -> &str {
        self.index.sample(row).next().expect("a sample has a member").split().0
    }

    /// Whether sample `row` has a member with the extension.
    pub fn has(&self, row: usize, extension: &str) -> bool {
        self.member(row, &[extension]).is_some()
    }

    /// The first member of sample `row` that has one of the extensions.
    pub fn member(&self, row: usize, extensions: &[&str]) -> Option<Row<'_>> {
        self.index.sample(row).find(|member| {
            let (_, extension) = member.split();
            extensions.iter().any(|wanted| wanted.eq_ignore_ascii_case(extension))
        })
    }

    /// The bytes of the first member of sample `row` that has one of the extensions. Faults with Code::Corrupt where
    /// there is none, where the tar is shorter than its index says, or where the digest differs.
    pub fn read(&self, row: usize, extensions: &[&str]) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let length = self.read_into(row, extensions, &mut bytes)?.len();
        bytes.truncate(length);
        Ok(bytes)
    }

    /// As [`Shard::read`], into memory that is kept: it grows where the member is longer than it, and its first bytes
    /// are the member. From a disk nothing else is allocated.
    pub fn read_into<'a>(&self, row: usize, extensions: &[&str], into: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        let member = self.wanted(row, extensions)?;
        let range = member.offset..member.end();
        let length = member.length as usize;
        match &self.path {
            Some(path) => {
                into.resize(into.len().max(length), 0);
                store::read_file(path, range, &mut into[..length])?;
            }
            None => *into = self.store.get_range(&self.file, range)?,
        }
        self.whole(&member, &into[..length])?;
        Ok(&into[..length])
    }

    /// As [`Shard::member`]; a sample without it is Code::Corrupt.
    pub fn wanted(&self, row: usize, extensions: &[&str]) -> Result<Row<'_>> {
        self.member(row, extensions).ok_or_else(|| {
            let (name, key) = (self.name(), self.key(row));
            Fault::new(Code::Corrupt, format!("{name}: sample {key} has no member .{}", extensions.join(", .")))
        })
    }

    /// Whether `bytes` are the member's: Code::Corrupt where the index knows their digest and it is another.
    pub fn whole(&self, member: &Row, bytes: &[u8]) -> Result<()> {
        let Some(wanted) = member.digest else {
            return Ok(());
        };
        let got = index::digest(bytes);
        if got == wanted {
            return Ok(());
        }
        Err(Fault::new(
            Code::Corrupt,
            format!(
                "{}: the bytes of {} changed: digest {}, the index says {}; fetch or pack the shard again",
                self.name(),
                member.name,
                index::hex(&got),
                index::hex(&wanted)
            ),
        ))
    }

    /// The class of sample `row`: its member `.cls`, a whole number in ASCII; none where there is no such member.
    pub fn label(&self, row: usize) -> Result<Option<i64>> {
        if !self.has(row, "cls") {
            return Ok(None);
        }
        self.class(row, &self.read(row, &["cls"])?).map(Some)
    }

    /// The class that the bytes of a `.cls` member say.
    pub fn class(&self, row: usize, bytes: &[u8]) -> Result<i64> {
        let label = std::str::from_utf8(bytes).ok().and_then(|text| text.trim().parse().ok());
        label.ok_or_else(|| {
            let message = format!("{}: {}.cls is not a whole number", self.name(), self.key(row));
            Fault::new(Code::Corrupt, message)
        })
    }

    /// A run of the tar's bytes, for many requests in flight.
    pub async fn fetch(&self, range: Range<u64>) -> Result<bytes::Bytes> {
        self.store.fetch(&self.file, range).await
    }

    /// The tar's name, for messages.
    pub fn name(&self) -> String {
        self.store.name(&self.file)
    }

    pub fn index(&self) -> &Index {
        &self.index
    }
}
