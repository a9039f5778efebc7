//! One shard: a WebDataset tar, with its index (`index.rs`) beside it or scanned (`scan.rs`).
//!
//! Adjacent members with one key are a sample; every other repetition of a key is damage. Bytes are read from the
//! file at each call, with the member's digest checked where the index knows it, and nothing stays open between
//! calls: a data set may have more shards than a process may have files.

use super::index::{self, Index, Member};
use super::scan;
use crate::fault::{Code, Fault, Result};
use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The extensions of pictures that `decode` reads.
pub const IMAGE: &[&str] = &["jpg", "jpeg", "png", "webp"];

/// One tar of samples.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    index: Index,
    /// The members of each sample.
    samples: Vec<Range<u32>>,
}

impl Shard {
    /// Opens the tar at `path` by its index, or by a scan where there is none. Faults: Code::Usage where index and
    /// tar do not belong together, Code::Corrupt where one is damaged, Code::Disk where one cannot be read.
    pub fn open(path: &Path) -> Result<Shard> {
        let beside = Index::path(path);
        let index = match std::fs::read(&beside) {
            Ok(bytes) => indexed(path, &beside, &bytes)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                tracing::info!("{} has no index: scanning it", path.display());
                scan::scan(path)?
            }
            Err(error) => return Err(Fault::disk(beside.display(), error)),
        };
        let samples = group(&index.members).map_err(|fault| fault.at(path.display()))?;
        Ok(Shard { path: path.to_owned(), index, samples })
    }

    /// How many samples it holds.
    pub fn samples(&self) -> usize {
        self.samples.len()
    }

    /// The key of sample `row`.
    pub fn key(&self, row: usize) -> &str {
        let name = &self.index.members[self.samples[row].start as usize].name;
        scan::split(name).expect("indexed names have a key").0
    }

    /// Whether sample `row` has a member with the extension.
    pub fn has(&self, row: usize, extension: &str) -> bool {
        self.member(row, &[extension]).is_some()
    }

    /// The bytes of the first member of sample `row` that has one of the extensions. Faults with Code::Corrupt where
    /// there is none, where the tar is shorter than its index says, or where the digest differs.
    pub fn read(&self, row: usize, extensions: &[&str]) -> Result<Vec<u8>> {
        let member = self.member(row, extensions).ok_or_else(|| {
            let message =
                format!("{}: sample {} has no member .{}", self.path.display(), self.key(row), extensions.join(", ."));
            Fault::new(Code::Corrupt, message)
        })?;
        let bytes = bytes(&self.path, member.offset, member.length)?;
        let Some(wanted) = member.digest else {
            return Ok(bytes);
        };
        let got = index::digest(&bytes);
        if got == wanted {
            return Ok(bytes);
        }
        Err(Fault::new(
            Code::Corrupt,
            format!(
                "{}: the bytes of {} changed: digest {}, the index says {}; fetch or pack the shard again",
                self.path.display(),
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
        let text = self.read(row, &["cls"])?;
        let label = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
        label.map(Some).ok_or_else(|| {
            let message = format!("{}: {}.cls is not a whole number", self.path.display(), self.key(row));
            Fault::new(Code::Corrupt, message)
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn index(&self) -> &Index {
        &self.index
    }

    fn member(&self, row: usize, extensions: &[&str]) -> Option<&Member> {
        let members = &self.index.members[self.samples[row].start as usize..self.samples[row].end as usize];
        members.iter().find(|member| {
            let (_, extension) = scan::split(&member.name).expect("indexed names have a key");
            extensions.iter().any(|wanted| wanted.eq_ignore_ascii_case(extension))
        })
    }
}

/// The index at `beside`, once it fits the tar.
fn indexed(path: &Path, beside: &Path, bytes: &[u8]) -> Result<Index> {
    let index = Index::from_bytes(bytes).map_err(|fault| fault.at(beside.display()))?;
    let length = std::fs::metadata(path).map_err(|error| Fault::disk(path.display(), error))?.len();
    if index.shard_bytes != length {
        return Err(Fault::usage(format!(
            "{} was made for a tar of {} bytes, {} has {length}; pack again, or delete the index to have the tar scanned",
            beside.display(),
            index.shard_bytes,
            path.display(),
        )));
    }
    for member in &index.members {
        if u64::from(member.length) > length.saturating_sub(member.offset) || scan::split(&member.name).is_none() {
            let message = format!("{}: the row of {} points outside the tar", beside.display(), member.name);
            return Err(Fault::new(Code::Corrupt, message));
        }
    }
    Ok(index)
}

/// Runs of members with one key. A key that comes again later, or an extension twice in one sample, is damage.
fn group(members: &[Member]) -> Result<Vec<Range<u32>>> {
    let damaged = |what: String| Fault::new(Code::Corrupt, format!("{what}; pack the samples again"));
    let mut keys: HashSet<&str> = HashSet::new();
    let mut extensions: HashSet<String> = HashSet::new();
    let mut samples: Vec<Range<u32>> = Vec::new();
    let mut current = "";
    for (at, member) in (0u32..).zip(members) {
        let (key, extension) = scan::split(&member.name).expect("checked when indexed");
        if key == current {
            samples.last_mut().expect("a current sample").end = at + 1;
        } else {
            if !keys.insert(key) {
                return Err(damaged(format!("the members of sample {key} are not adjacent, or it comes twice")));
            }
            extensions.clear();
            samples.push(at..at + 1);
            current = key;
        }
        if !extensions.insert(extension.to_ascii_lowercase()) {
            return Err(damaged(format!("sample {key} has the extension .{extension} twice")));
        }
    }
    Ok(samples)
}

/// A run of bytes of a file: the one place where the bytes of samples are fetched.
fn bytes(path: &Path, offset: u64, length: u32) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| Fault::disk(path.display(), error))?;
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, offset).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => {
            Fault::new(Code::Corrupt, format!("{}: it ends before byte {}", path.display(), offset + u64::from(length)))
        }
        _ => Fault::disk(path.display(), error),
    })?;
    Ok(bytes)
}
