//! One shard: a WebDataset tar in a store, and its index (`index.rs`), which is stored next to the tar or was made by a
//! scan (`scan.rs`) when the tar was first opened.
//!
//! Bytes are fetched at each call and checked against the digest in the index. No file stays open between calls: a data
//! set may have more shards than a process may have open files.

use super::index::{self, HEADER_BYTES, Index, IndexHeader, MemberRef};
use super::scan;
use super::store::{self, Store};
use crate::error::{Error, ExitCode, Result};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Maximum number of times that a damaged index is fetched again.
const MAX_RETRIES: usize = 3;

/// Extensions of image and video files.
pub const IMAGE_EXTENSIONS: &[&str] = &["jpg", "jpeg", "png", "webp", "mp4", "webm", "mkv", "avi", "mov", "m4v"];
/// Extensions of video files.
pub const VIDEO_EXTENSIONS: &[&str] = &["mp4", "webm", "mkv", "avi", "mov", "m4v"];
/// Extensions of audio files.
pub const AUDIO_EXTENSIONS: &[&str] = &["wav", "flac", "mp3", "ogg", "opus"];

/// The location of a tar's index.
#[derive(Clone, Debug)]
enum IndexLocation {
    /// Next to the tar.
    Sidecar,
    /// In this machine's cache of scans.
    ScanCache(PathBuf),
    /// In memory: the tar was scanned, and the cache is not used or cannot be written.
    Memory(Arc<Index>),
}

/// A tar of which only the header of the index has been read: the number of samples is known, their keys are not.
#[derive(Clone, Debug)]
pub struct ShardInfo {
    store: Store,
    file: String,
    header: IndexHeader,
    location: IndexLocation,
}

impl ShardInfo {
    /// Returns the file name of the index of a tar.
    pub fn index_name(file: &str) -> String {
        format!("{file}.idx")
    }

    /// Reads the header of the index of `file`, a tar of `bytes` bytes, or scans the tar if it has no index.
    ///
    /// # Errors
    /// ExitCode::Usage where the index belongs to another tar, ExitCode::Corrupt where index or tar is damaged.
    pub fn read(store: &Store, file: &str, bytes: u64, indexed: bool) -> Result<ShardInfo> {
        let (header, location) = if indexed {
            (read_header(store, file, bytes)?, IndexLocation::Sidecar)
        } else {
            let scanned = load_or_scan(store, file, bytes);
            let (index, location) = scanned.map_err(|error| error.with_context(store.display_name(file)))?;
            (*index.header(), location)
        };
        Ok(ShardInfo { store: store.clone(), file: file.to_owned(), header, location })
    }

    /// Returns the header of the index.
    pub fn header(&self) -> &IndexHeader {
        &self.header
    }

    /// Returns the tar's name, for messages.
    pub fn name(&self) -> String {
        self.store.display_name(&self.file)
    }

    /// Returns whether the tar is read over a network.
    pub fn is_remote(&self) -> bool {
        self.store.is_remote()
    }

    /// Reads and checks the whole index.
    pub fn open(&self) -> Result<Shard> {
        let index = match &self.location {
            IndexLocation::Memory(index) => index.clone(),
            IndexLocation::Sidecar => {
                let name = Self::index_name(&self.file);
                let read = with_retries(&self.store, || self.store.get(&name).and_then(Index::from_bytes));
                Arc::new(read.map_err(|error| error.with_context(self.store.display_name(&name)))?)
            }
            IndexLocation::ScanCache(path) => {
                let bytes = std::fs::read(path).map_err(|error| Error::disk(path.display(), error))?;
                Arc::new(Index::from_bytes(bytes).map_err(|error| error.with_context(path.display()))?)
            }
        };
        if index.header() != &self.header {
            return Err(Error::new(
                ExitCode::Corrupt,
                format!("{}: its index was replaced while the program ran; start again", self.name()),
            ));
        }
        let path = self.store.local_path().map(|folder| folder.join(&self.file));
        Ok(Shard { store: self.store.clone(), file: self.file.clone(), path, index })
    }
}

/// Reads the header of the index next to a tar of `bytes` bytes.
fn read_header(store: &Store, file: &str, bytes: u64) -> Result<IndexHeader> {
    let name = ShardInfo::index_name(file);
    let header = with_retries(store, || {
        let bytes = store.get_range(&name, 0..HEADER_BYTES as u64)?;
        IndexHeader::parse(&bytes)
    });
    let header = header.map_err(|error| error.with_context(store.display_name(&name)))?;
    if header.shard_bytes != bytes {
        return Err(Error::usage(format!(
            "{} was made for a tar of {} bytes, {} has {bytes}; pack again, or delete the index to have the tar \
             scanned",
            store.display_name(&name),
            header.shard_bytes,
            store.display_name(file),
        )));
    }
    Ok(header)
}

/// Reads part of an index, and again if it arrives damaged: bits may flip in a transfer from a store.
fn with_retries<T>(store: &Store, read: impl Fn() -> Result<T>) -> Result<T> {
    let mut result = read();
    for _ in 0..MAX_RETRIES {
        match result {
            Err(error) if error.code == ExitCode::Corrupt && store.is_remote() => {
                tracing::warn!("{error}; fetching it again");
                result = read();
            }
            done => return done,
        }
    }
    result
}

/// Returns the index of a tar that has none, from the cache of scans or by a scan, which is then cached. The cache key
/// is the tar's URL and length; a file lock makes concurrent processes wait for the first scan.
fn load_or_scan(store: &Store, file: &str, bytes: u64) -> Result<(Arc<Index>, IndexLocation)> {
    let name = store.display_name(file);
    let scan = || {
        tracing::info!("{name} has no index: scanning it");
        scan::scan(store, file, bytes)
    };
    // Local files may change under the same name, and a local scan is fast.
    let (Some(cache), None) = (cache_folder(), store.local_path()) else {
        let index = Arc::new(scan()?);
        return Ok((index.clone(), IndexLocation::Memory(index)));
    };
    let id = index::to_hex(&index::digest(format!("{name}\0{bytes}").as_bytes()));
    let folder = cache.join("occlude/scans");
    let path = folder.join(format!("{id}.idx"));
    let lock = || -> std::io::Result<std::fs::File> {
        std::fs::create_dir_all(&folder)?;
        let lock = std::fs::File::create(path.with_extension("lock"))?;
        lock.lock()?;
        Ok(lock)
    };
    let _lock = lock();
    if let Ok(bytes) = std::fs::read(&path)
        && let Ok(index) = Index::from_bytes(bytes)
    {
        return Ok((Arc::new(index), IndexLocation::ScanCache(path)));
    }
    let index = Arc::new(scan()?);
    let partial = path.with_extension("partial");
    let location = match std::fs::write(&partial, index.as_bytes()).and_then(|()| std::fs::rename(&partial, &path)) {
        Ok(()) => IndexLocation::ScanCache(path),
        Err(_) => IndexLocation::Memory(index.clone()),
    };
    Ok((index, location))
}

/// Returns the user's cache folder (XDG base directory specification).
fn cache_folder() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
}

/// A tar of samples with its index.
#[derive(Debug)]
pub struct Shard {
    store: Store,
    file: String,
    /// Path of a tar on a local disk.
    path: Option<PathBuf>,
    index: Arc<Index>,
}

impl Shard {
    /// Opens one tar, by its index or by a scan.
    pub fn open(store: &Store, file: &str) -> Result<Shard> {
        let not_found = || Error::usage(format!("{}: not found. Check the path.", store.display_name(file)));
        let bytes = store.size(file)?.ok_or_else(not_found)?;
        let indexed = store.size(&ShardInfo::index_name(file))?.is_some();
        ShardInfo::read(store, file, bytes, indexed)?.open()
    }

    /// Returns the number of samples.
    pub fn sample_count(&self) -> usize {
        self.index.sample_count()
    }

    /// Returns the key of sample `row`.
    pub fn key(&self, row: usize) -> &str {
        self.index.sample_members(row).next().expect("a sample has a member").split_name().0
    }

    /// Returns whether sample `row` has a member with the extension.
    pub fn has_member(&self, row: usize, extension: &str) -> bool {
        self.member(row, &[extension]).is_some()
    }

    /// Returns the first member of sample `row` that has one of the extensions.
    pub fn member(&self, row: usize, extensions: &[&str]) -> Option<MemberRef<'_>> {
        self.index.sample_members(row).find(|member| {
            let (_, extension) = member.split_name();
            extensions.iter().any(|wanted| wanted.eq_ignore_ascii_case(extension))
        })
    }

    /// Reads the first member of sample `row` that has one of the extensions.
    ///
    /// # Errors
    /// ExitCode::Corrupt where there is no such member, the tar is shorter than its index says, or the digest differs.
    pub fn read(&self, row: usize, extensions: &[&str]) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let length = self.read_into(row, extensions, &mut bytes)?.len();
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Reads like [`Shard::read`] into a reusable buffer and returns the part that the member fills. The buffer only
    /// grows; reading from a disk allocates nothing else.
    pub fn read_into<'a>(&self, row: usize, extensions: &[&str], buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        let member = self.require_member(row, extensions)?;
        let range = member.offset..member.end();
        let length = member.length as usize;
        match &self.path {
            Some(path) => {
                buffer.resize(buffer.len().max(length), 0);
                store::read_file_range(path, range, &mut buffer[..length])?;
            }
            None => *buffer = self.store.get_range(&self.file, range)?,
        }
        self.verify_digest(&member, &buffer[..length])?;
        Ok(&buffer[..length])
    }

    /// Returns the member like [`Shard::member`].
    ///
    /// # Errors
    /// ExitCode::Corrupt where the sample has no such member.
    pub fn require_member(&self, row: usize, extensions: &[&str]) -> Result<MemberRef<'_>> {
        self.member(row, extensions).ok_or_else(|| {
            let message =
                format!("{}: sample {} has no member .{}", self.name(), self.key(row), extensions.join(", ."));
            Error::new(ExitCode::Corrupt, message)
        })
    }

    /// Checks the bytes of a member against the digest in the index, if the index has one.
    ///
    /// # Errors
    /// ExitCode::Corrupt where the digests differ.
    pub fn verify_digest(&self, member: &MemberRef, bytes: &[u8]) -> Result<()> {
        let Some(expected) = member.digest else {
            return Ok(());
        };
        let actual = index::digest(bytes);
        if actual == expected {
            return Ok(());
        }
        Err(Error::new(
            ExitCode::Corrupt,
            format!(
                "{}: the bytes of {} changed: digest {}, the index says {}; fetch or pack the shard again",
                self.name(),
                member.name,
                index::to_hex(&actual),
                index::to_hex(&expected)
            ),
        ))
    }

    /// Returns the class of sample `row`: its member `.cls`, an integer in ASCII; none where there is no such member.
    pub fn read_label(&self, row: usize) -> Result<Option<i64>> {
        if !self.has_member(row, "cls") {
            return Ok(None);
        }
        self.parse_label(row, &self.read(row, &["cls"])?).map(Some)
    }

    /// Parses the bytes of a `.cls` member.
    pub fn parse_label(&self, row: usize, bytes: &[u8]) -> Result<i64> {
        let label = std::str::from_utf8(bytes).ok().and_then(|text| text.trim().parse().ok());
        label.ok_or_else(|| {
            let message = format!("{}: {}.cls is not a whole number", self.name(), self.key(row));
            Error::new(ExitCode::Corrupt, message)
        })
    }

    /// Fetches a range of the tar's bytes, for many requests in flight.
    pub async fn fetch(&self, range: Range<u64>) -> Result<bytes::Bytes> {
        self.store.fetch(&self.file, range).await
    }

    /// Returns the tar's name, for messages.
    pub fn name(&self) -> String {
        self.store.display_name(&self.file)
    }

    /// Returns the index.
    pub fn index(&self) -> &Index {
        &self.index
    }
}
