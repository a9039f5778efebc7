//! On-disk cache of pieces of remote shards, so that a second epoch, and the other ranks of the host, need not fetch
//! them again.
//!
//! A file is one piece, named by a digest of its origin. It is written under a temporary name, renamed and never
//! changed, so that several processes share a folder without coordination. Past the limit pieces are removed at random:
//! an epoch reads every piece once, so the least recently used piece would be the one needed next. The cache is not
//! trusted: samples are checked against the digests of the index as if they came from the store, and a folder that
//! cannot be written is not used.

use super::index::{digest, to_hex};
use super::shard::Shard;
use crate::error::{Error, Result};
use bytes::{Bytes, BytesMut};
use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a piece; the last piece of a shard may be shorter.
const PIECE_BYTES: u64 = 1 << 20;

/// A folder of pieces with a size limit.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    /// Limit in bytes.
    limit: u64,
    /// Bytes written since this process last listed the folder.
    written: AtomicU64,
    /// Makes the names of temporary files unique.
    counter: AtomicU64,
    /// Serializes eviction, so that no thread skips one while another exceeds the limit.
    eviction: Mutex<()>,
    /// True once the warning that the folder cannot be written was logged.
    warned: AtomicBool,
}

impl Cache {
    /// Opens a cache of at most `limit` bytes in `folder`.
    ///
    /// # Errors
    /// ExitCode::Usage where the folder cannot be made.
    pub fn open(folder: &Path, limit: u64) -> Result<Cache> {
        fs::create_dir_all(folder).map_err(|error| {
            Error::usage(format!("{}: {error}; set data.cache.folder to a writable place", folder.display()))
        })?;
        let cache = Cache {
            folder: folder.to_owned(),
            limit,
            written: AtomicU64::new(0),
            counter: AtomicU64::new(0),
            eviction: Mutex::default(),
            warned: AtomicBool::new(false),
        };
        cache.evict();
        Ok(cache)
    }

    /// Returns a range of a shard's bytes; missing pieces are fetched and cached.
    pub async fn get_range(&self, shard: &Shard, range: Range<u64>) -> Result<Bytes> {
        let mut out = BytesMut::with_capacity((range.end - range.start) as usize);
        for piece in range.start / PIECE_BYTES..range.end.div_ceil(PIECE_BYTES) {
            let start = piece * PIECE_BYTES;
            let end = (start + PIECE_BYTES).min(shard.index().header().shard_bytes);
            let part = range.start.max(start) - start..range.end.min(end).max(start) - start;
            let path = self.path(shard, piece);
            // The read blocks for some microseconds, on a thread that has no other work.
            if append_piece(&path, end - start, &part, &mut out) {
                continue;
            }
            let bytes = shard.fetch(start..end).await?;
            self.store_piece(&path, &bytes);
            out.extend_from_slice(&bytes[part.start as usize..part.end as usize]);
        }
        Ok(out.freeze())
    }

    /// Removes the pieces of a range, after their content failed a digest check.
    pub fn invalidate(&self, shard: &Shard, range: Range<u64>) {
        for piece in range.start / PIECE_BYTES..range.end.div_ceil(PIECE_BYTES) {
            let _ = fs::remove_file(self.path(shard, piece));
        }
    }

    /// Returns the path of a piece. The digest of the shard's index is part of it, so that a tar that was packed again
    /// does not read the old pieces.
    fn path(&self, shard: &Shard, piece: u64) -> PathBuf {
        let index = to_hex(&shard.index().header().digest);
        let name = to_hex(&digest(format!("{}\0{index}\0{piece}", shard.name()).as_bytes()));
        self.folder.join(&name[..2]).join(name)
    }

    /// Writes a piece; a failure is logged once and otherwise ignored.
    fn store_piece(&self, path: &Path, bytes: &[u8]) {
        let name = format!("{}-{}.partial", std::process::id(), self.counter.fetch_add(1, Ordering::Relaxed));
        let partial = self.folder.join(name);
        if let Err(error) = write_and_rename(&partial, path, bytes) {
            let _ = fs::remove_file(&partial);
            if !self.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!("{}: {error}; continuing without this cache", self.folder.display());
            }
            return;
        }
        // Each process counts its own writes only; what the others wrote meanwhile is small compared with the limit.
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if written > self.limit / 32 {
            self.written.store(0, Ordering::Relaxed);
            self.evict();
        }
    }

    /// Removes pieces, in the random order of their names, down to 15/16 of the limit. One process at a time evicts.
    fn evict(&self) {
        let _guard = self.eviction.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(lock) = File::create(self.folder.join("lock")) else { return };
        if lock.try_lock().is_err() {
            return;
        }
        let target = self.limit - self.limit / 16;
        let mut pieces = self.list_pieces();
        let mut total: u64 = pieces.iter().map(|(_, bytes)| bytes).sum();
        if total <= target {
            return;
        }
        // A varying start, so that the same names are not always removed first.
        let start = total as usize % pieces.len().max(1);
        pieces.rotate_left(start);
        for (path, bytes) in pieces {
            if total <= target {
                break;
            }
            if fs::remove_file(path).is_ok() {
                total -= bytes;
            }
        }
    }

    /// Returns the path and the bytes of every piece.
    fn list_pieces(&self) -> Vec<(PathBuf, u64)> {
        let mut pieces = Vec::new();
        let folders = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        for folder in folders.filter(|path| path.is_dir()) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                pieces.push((entry.path(), entry.metadata().map_or(0, |metadata| metadata.len())));
            }
        }
        pieces
    }
}

fn write_and_rename(partial: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().expect("a piece is in a folder"))?;
    File::create(partial)?.write_all(bytes)?;
    fs::rename(partial, path)
}

/// Appends a part of a piece to `out`; false if the piece does not exist or has another length than `length`.
fn append_piece(path: &Path, length: u64, part: &Range<u64>, out: &mut BytesMut) -> bool {
    let Ok(file) = File::open(path) else { return false };
    if file.metadata().map_or(0, |metadata| metadata.len()) != length {
        return false;
    }
    let before = out.len();
    out.resize(before + (part.end - part.start) as usize, 0);
    let complete = file.read_exact_at(&mut out[before..], part.start).is_ok();
    if !complete {
        out.truncate(before);
    }
    complete
}
