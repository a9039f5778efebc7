//! A shard being written: the tar and its index, under temporary names until both are whole.

use super::index::{self, Index, Member};
use super::set::Listed;
use super::shard::Found;
use crate::fault::{Fault, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A shard being written.
pub struct Writer {
    path: PathBuf,
    out: BufWriter<File>,
    at: u64,
    /// Samples so far; whoever writes members counts.
    pub samples: u64,
    members: Vec<Member>,
}

impl Writer {
    /// Begins the tar that will stand at `path`.
    pub fn create(path: PathBuf) -> Result<Writer> {
        let temporary = partial(&path);
        let file = File::create(&temporary).map_err(|error| Fault::disk(temporary.display(), error))?;
        Ok(Writer { path, out: BufWriter::with_capacity(1 << 20, file), at: 0, samples: 0, members: Vec::new() })
    }

    /// Bytes written so far, without the end of the tar.
    pub fn bytes(&self) -> u64 {
        self.at
    }

    /// Appends a regular USTAR member, mode 0444, time 0. Names longer than 100 bytes are refused.
    pub fn member(&mut self, name: String, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(&name).map_err(|error| Fault::usage(format!("{name}: {error}")))?;
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        let padding = bytes.len().next_multiple_of(512) - bytes.len();
        for part in [header.as_bytes(), bytes, &[0; 512][..padding]] {
            self.out.write_all(part).map_err(|error| Fault::disk(self.path.display(), error))?;
        }
        let digest = Some(index::digest(bytes));
        self.members.push(Member { name, offset: self.at + 512, length: bytes.len() as u32, digest });
        self.at += (512 + bytes.len() + padding) as u64;
        Ok(())
    }

    /// Ends the tar, writes its index and gives both their names, the tar last.
    pub fn close(mut self) -> Result<Listed> {
        let disk = |error: std::io::Error| Fault::disk(self.path.display(), error);
        self.out.write_all(&[0; 1024]).map_err(disk)?;
        let file = self.out.into_inner().map_err(|error| disk(error.into_error()))?;
        file.sync_all().map_err(disk)?;
        let index = Index::new(self.at + 1024, &self.members)?;
        let beside = Found::index_of(&self.path.to_string_lossy());
        commit(Path::new(&beside), index.bytes())?;
        fs::rename(partial(&self.path), &self.path).map_err(disk)?;
        let file = self.path.file_name().expect("a file").to_string_lossy().into_owned();
        Ok(Listed { file, samples: self.samples, bytes: index.header().shard_bytes })
    }
}

/// Writes a file whole or not at all.
pub fn commit(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = partial(path);
    let disk = |error| Fault::disk(path.display(), error);
    let mut file = File::create(&temporary).map_err(disk)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(disk)?;
    fs::rename(&temporary, path).map_err(disk)
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}
