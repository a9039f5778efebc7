//! Pieces of remote shards, kept on this machine's disk so that a second epoch, and the other ranks of the host, need
//! not fetch them again.
//!
//! A file is one piece, named by a digest of what it is a piece of; it appears whole (written aside, renamed) and is
//! never changed, so that several processes share a folder without talking. Past the limit pieces are removed at
//! random: an epoch reads every piece once, which makes the least recently used the one that is wanted next. Nothing
//! here is trusted: samples are checked against the digests of the index as if they came from the store, and a folder
//! that cannot be written is done without.

use super::index::{digest, hex};
use super::shard::Shard;
use crate::fault::{Fault, Result};
use bytes::{Bytes, BytesMut};
use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a piece. A shard's last one is shorter.
const PIECE: u64 = 1 << 20;

/// A folder of pieces with a limit.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    limit: u64,
    /// Bytes written since this process last looked at the whole folder.
    written: AtomicU64,
    /// Names files that are being written.
    count: AtomicU64,
    /// Held by the thread that removes pieces: none may look away while another writes one too many.
    turn: Mutex<()>,
    /// The user has been told that the folder cannot be written.
    told: AtomicBool,
}

impl Cache {
    /// Pieces in `folder`, up to `limit` bytes. Faults with Code::Usage where the folder cannot be made.
    pub fn open(folder: &Path, limit: u64) -> Result<Cache> {
        fs::create_dir_all(folder).map_err(|error| {
            Fault::usage(format!("{}: {error}; give data.cache.folder a place that can be written", folder.display()))
        })?;
        let cache = Cache {
            folder: folder.to_owned(),
            limit,
            written: AtomicU64::new(0),
            count: AtomicU64::new(0),
            turn: Mutex::default(),
            told: AtomicBool::new(false),
        };
        cache.evict();
        Ok(cache)
    }

    /// Bytes `range` of a shard: what is not here yet is fetched, and kept.
    pub async fn range(&self, shard: &Shard, range: Range<u64>) -> Result<Bytes> {
        let mut out = BytesMut::with_capacity((range.end - range.start) as usize);
        for piece in range.start / PIECE..range.end.div_ceil(PIECE) {
            let begin = piece * PIECE;
            let end = (begin + PIECE).min(shard.index().header().shard_bytes);
            let part = range.start.max(begin) - begin..range.end.min(end).max(begin) - begin;
            let path = self.path(shard, piece);
            // Some microseconds of a thread that has nothing else to do.
            if read(&path, end - begin, &part, &mut out) {
                continue;
            }
            let bytes = shard.fetch(begin..end).await?;
            self.keep(&path, &bytes);
            out.extend_from_slice(&bytes[part.start as usize..part.end as usize]);
        }
        Ok(out.freeze())
    }

    /// Removes the pieces of a range: what they hold is not what the index says.
    pub fn forget(&self, shard: &Shard, range: Range<u64>) {
        for piece in range.start / PIECE..range.end.div_ceil(PIECE) {
            let _ = fs::remove_file(self.path(shard, piece));
        }
    }

    /// A tar that was packed again has another index, and so other pieces.
    fn path(&self, shard: &Shard, piece: u64) -> PathBuf {
        let whole = hex(&shard.index().header().digest);
        let name = hex(&digest(format!("{}\0{whole}\0{piece}", shard.name()).as_bytes()));
        self.folder.join(&name[..2]).join(name)
    }

    /// Writes a piece; a cache that cannot is no reason to stop.
    fn keep(&self, path: &Path, bytes: &[u8]) {
        let own = format!("{}-{}.partial", std::process::id(), self.count.fetch_add(1, Ordering::Relaxed));
        let partial = self.folder.join(own);
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(path.parent().expect("a folder"))?;
            File::create(&partial)?.write_all(bytes)?;
            fs::rename(&partial, path)
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&partial);
            if !self.told.swap(true, Ordering::Relaxed) {
                tracing::warn!("{}: {error}; going on without keeping pieces of shards there", self.folder.display());
            }
            return;
        }
        // Several processes each look after so many bytes; what they miss of each other is small beside the limit.
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64;
        if written > self.limit / 32 {
            self.written.store(0, Ordering::Relaxed);
            self.evict();
        }
    }

    /// Removes pieces, in the random order of their names, until 15/16 of the limit are left. One process at a time, of
    /// which one thread after the other.
    fn evict(&self) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(lock) = File::create(self.folder.join("lock")) else { return };
        if lock.try_lock().is_err() {
            return;
        }
        let mut pieces: Vec<(PathBuf, u64)> = Vec::new();
        let folders = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        for folder in folders.filter(|path| path.is_dir()) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                pieces.push((entry.path(), entry.metadata().map_or(0, |meta| meta.len())));
            }
        }
        let mut total: u64 = pieces.iter().map(|(_, bytes)| bytes).sum();
        if total <= self.limit - self.limit / 16 {
            return;
        }
        // Another beginning every time, or the same names would always go.
        let turn = total as usize % pieces.len().max(1);
        pieces.rotate_left(turn);
        for (path, bytes) in pieces {
            if total <= self.limit - self.limit / 16 {
                break;
            }
            if fs::remove_file(path).is_ok() {
                total -= bytes;
            }
        }
    }
}

/// Appends a part of a piece, if the piece is here with the length that it must have.
fn read(path: &Path, length: u64, part: &Range<u64>, out: &mut BytesMut) -> bool {
    let Ok(file) = File::open(path) else { return false };
    if file.metadata().map_or(0, |meta| meta.len()) != length {
        return false;
    }
    let before = out.len();
    out.resize(before + (part.end - part.start) as usize, 0);
    let read = file.read_exact_at(&mut out[before..], part.start).is_ok();
    if !read {
        out.truncate(before);
    }
    read
}
