//! Writes a shard: the tar and its index. On a disk both have temporary names until they are complete; for a store the
//! tar is built in memory, since an object is put in one piece.

use super::index::{self, Index, Member};
use super::set::ShardRecord;
use super::shard::ShardInfo;
use super::store::Store;
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes of zeros at the end of a tar.
pub const TAR_END_BYTES: u64 = 1024;
/// Bytes of a tar block.
const BLOCK_BYTES: usize = 512;
/// Extension of a file that is not complete.
const PARTIAL_EXTENSION: &str = "partial";

/// A writer of one shard.
pub struct ShardWriter {
    store: Store,
    file: String,
    output: Output,
    offset: u64,
    samples: u64,
    members: Vec<Member>,
}

enum Output {
    Disk { path: PathBuf, writer: BufWriter<File> },
    Memory(Vec<u8>),
}

impl ShardWriter {
    /// Starts the tar `file` of `store`, of about `bytes` bytes. On a disk the folder must exist.
    pub fn create(store: &Store, file: &str, bytes: u64) -> Result<ShardWriter> {
        let output = match store.local_path() {
            Some(folder) => {
                let path = folder.join(file);
                let temporary = partial_path(&path);
                let file = File::create(&temporary).map_err(|error| Error::disk(temporary.display(), error))?;
                Output::Disk { path, writer: BufWriter::with_capacity(1 << 20, file) }
            }
            None => Output::Memory(Vec::with_capacity(bytes as usize)),
        };
        Ok(ShardWriter {
            store: store.clone(),
            file: file.to_owned(),
            output,
            offset: 0,
            samples: 0,
            members: Vec::new(),
        })
    }

    /// Returns the bytes that a member of `bytes` bytes takes in a tar: a header, and padding up to whole blocks.
    pub fn member_bytes(bytes: u64) -> u64 {
        BLOCK_BYTES as u64 + bytes.next_multiple_of(BLOCK_BYTES as u64)
    }

    /// Returns the number of samples so far.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Appends one sample: its members as extension and bytes, in this order.
    pub fn append_sample(&mut self, key: &str, members: &[(&str, Vec<u8>)]) -> Result<()> {
        members.iter().try_for_each(|(extension, bytes)| self.append_member(format!("{key}.{extension}"), bytes))?;
        self.samples += 1;
        Ok(())
    }

    /// Appends a regular USTAR member, mode 0444, time 0. Names longer than 100 bytes are refused.
    fn append_member(&mut self, name: String, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(&name).map_err(|error| Error::usage(format!("{name}: {error}")))?;
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        let padding = bytes.len().next_multiple_of(BLOCK_BYTES) - bytes.len();
        self.output.write(header.as_bytes())?;
        self.output.write(bytes)?;
        self.output.write(&[0; BLOCK_BYTES][..padding])?;
        let digest = Some(index::digest(bytes));
        let offset = self.offset + BLOCK_BYTES as u64;
        self.members.push(Member { name, offset, length: bytes.len() as u32, digest });
        self.offset += Self::member_bytes(bytes.len() as u64);
        Ok(())
    }

    /// Discards the tar.
    pub fn discard(self) -> Result<()> {
        match self.output {
            Output::Memory(_) => Ok(()),
            Output::Disk { path, .. } => {
                fs::remove_file(partial_path(&path)).map_err(|error| Error::disk(path.display(), error))
            }
        }
    }

    /// Ends the tar and publishes it and its index under their names; on a disk the index first, in a store the tar.
    pub fn finish(mut self) -> Result<ShardRecord> {
        self.output.write(&[0; TAR_END_BYTES as usize])?;
        let bytes = self.offset + TAR_END_BYTES;
        let index = Index::new(bytes, &self.members)?;
        let index_name = ShardInfo::index_name(&self.file);
        match self.output {
            Output::Disk { path, writer } => {
                let disk = |error: std::io::Error| Error::disk(path.display(), error);
                let file = writer.into_inner().map_err(|error| disk(error.into_error()))?;
                file.sync_all().map_err(disk)?;
                write_atomically(&self.store, &index_name, index.as_bytes())?;
                fs::rename(partial_path(&path), &path).map_err(disk)?;
            }
            Output::Memory(tar) => {
                self.store.put_owned(&self.file, tar)?;
                write_atomically(&self.store, &index_name, index.as_bytes())?;
            }
        }
        Ok(ShardRecord { file: self.file, samples: self.samples, bytes })
    }
}

impl Output {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Output::Disk { path, writer } => {
                writer.write_all(bytes).map_err(|error| Error::disk(path.display(), error))
            }
            Output::Memory(tar) => {
                tar.extend_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// Writes a file completely or not at all. On a disk the folder must exist.
pub fn write_atomically(store: &Store, file: &str, bytes: &[u8]) -> Result<()> {
    let Some(folder) = store.local_path() else {
        return store.put(file, bytes);
    };
    let path = folder.join(file);
    let temporary = partial_path(&path);
    let disk = |error| Error::disk(path.display(), error);
    let mut output = File::create(&temporary).map_err(disk)?;
    output.write_all(bytes).and_then(|()| output.sync_all()).map_err(disk)?;
    fs::rename(&temporary, &path).map_err(disk)
}

/// Returns true for the name of a file that a killed writer may have left incomplete.
pub fn is_partial(file: &str) -> bool {
    file.rsplit_once('.').is_some_and(|(_, extension)| extension == PARTIAL_EXTENSION)
}

fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(PARTIAL_EXTENSION);
    PathBuf::from(name)
}
