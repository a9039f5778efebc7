//! A shard being written: the tar and its index. On a disk under temporary names until both are whole; for a store in
//! memory, since an object is put in one piece.

use super::index::{self, Index, Member};
use super::set::Listed;
use super::shard::Found;
use super::store::Store;
use crate::fault::{Fault, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// The zeros that end a tar.
pub const END: u64 = 1024;
/// What a name ends in until the file is whole.
const PARTIAL: &str = "partial";

/// A shard being written.
pub struct Writer {
    store: Store,
    file: String,
    out: Out,
    at: u64,
    samples: u64,
    members: Vec<Member>,
}

enum Out {
    Disk { path: PathBuf, out: BufWriter<File> },
    Memory(Vec<u8>),
}

impl Writer {
    /// Begins the tar that will stand at `file` of `store` and have about so many bytes. On a disk the folder must be
    /// there.
    pub fn create(store: &Store, file: &str, bytes: u64) -> Result<Writer> {
        let out = match store.local() {
            Some(folder) => {
                let path = folder.join(file);
                let temporary = partial(&path);
                let open = File::create(&temporary).map_err(|error| Fault::disk(temporary.display(), error))?;
                Out::Disk { path, out: BufWriter::with_capacity(1 << 20, open) }
            }
            None => Out::Memory(Vec::with_capacity(bytes as usize)),
        };
        Ok(Writer { store: store.clone(), file: file.to_owned(), out, at: 0, samples: 0, members: Vec::new() })
    }

    /// How many bytes a member of so many takes in a tar: a header, and padding up to whole blocks.
    pub fn cost(bytes: u64) -> u64 {
        512 + bytes.next_multiple_of(512)
    }

    /// Samples so far.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Appends one sample: its members as extension and bytes, in this order.
    pub fn sample(&mut self, key: &str, members: &[(&str, Vec<u8>)]) -> Result<()> {
        members.iter().try_for_each(|(extension, bytes)| self.member(format!("{key}.{extension}"), bytes))?;
        self.samples += 1;
        Ok(())
    }

    /// Appends a regular USTAR member, mode 0444, time 0. Names longer than 100 bytes are refused.
    fn member(&mut self, name: String, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(&name).map_err(|error| Fault::usage(format!("{name}: {error}")))?;
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        let padding = bytes.len().next_multiple_of(512) - bytes.len();
        for part in [header.as_bytes(), bytes, &[0; 512][..padding]] {
            self.out.write(part)?;
        }
        let digest = Some(index::digest(bytes));
        self.members.push(Member { name, offset: self.at + 512, length: bytes.len() as u32, digest });
        self.at += Self::cost(bytes.len() as u64);
        Ok(())
    }

    /// Gives the tar up.
    pub fn discard(self) -> Result<()> {
        match self.out {
            Out::Memory(_) => Ok(()),
            Out::Disk { path, .. } => {
                fs::remove_file(partial(&path)).map_err(|error| Fault::disk(path.display(), error))
            }
        }
    }

    /// Ends the tar and gives it and its index their names; on a disk the index first, in a store the tar.
    pub fn close(mut self) -> Result<Listed> {
        self.out.write(&[0; END as usize])?;
        let bytes = self.at + END;
        let index = Index::new(bytes, &self.members)?;
        let beside = Found::index_of(&self.file);
        match self.out {
            Out::Disk { path, out } => {
                let disk = |error: std::io::Error| Fault::disk(path.display(), error);
                let open = out.into_inner().map_err(|error| disk(error.into_error()))?;
                open.sync_all().map_err(disk)?;
                commit(&self.store, &beside, index.bytes())?;
                fs::rename(partial(&path), &path).map_err(disk)?;
            }
            Out::Memory(tar) => {
                self.store.put_owned(&self.file, tar)?;
                commit(&self.store, &beside, index.bytes())?;
            }
        }
        Ok(Listed { file: self.file, samples: self.samples, bytes })
    }
}

impl Out {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Out::Disk { path, out } => out.write_all(bytes).map_err(|error| Fault::disk(path.display(), error)),
            Out::Memory(tar) => {
                tar.extend_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// Writes a file whole or not at all. On a disk the folder must be there.
pub fn commit(store: &Store, file: &str, bytes: &[u8]) -> Result<()> {
    let Some(folder) = store.local() else {
        return store.put(file, bytes);
    };
    let path = folder.join(file);
    let temporary = partial(&path);
    let disk = |error| Fault::disk(path.display(), error);
    let mut open = File::create(&temporary).map_err(disk)?;
    open.write_all(bytes).and_then(|()| open.sync_all()).map_err(disk)?;
    fs::rename(&temporary, &path).map_err(disk)
}

/// Whether a killed writer may have left a file of this name.
pub fn is_partial(file: &str) -> bool {
    file.rsplit_once('.').is_some_and(|(_, last)| last == PARTIAL)
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(PARTIAL);
    PathBuf::from(name)
}
