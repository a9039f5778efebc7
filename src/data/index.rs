//! The index of a shard: where each member of the tar lies, and what its bytes must hash to.
//!
//! `name-000000.tar.idx` lies beside `name-000000.tar`. Everything is little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `occl-idx` |
//! | 8 | 4 | version, u32 = 2 |
//! | 12 | 4 | members M, u32 |
//! | 16 | 8 | length of the tar in bytes, u64 |
//! | 24 | 8 | samples, u64 |
//! | 32 | 16 | first 128 bits of BLAKE3 over bytes 0..32 and 48.. of this file |
//! | 48 | 32·M | rows, in the order of the tar |
//! | 48 + 32·M | to the end | names |
//!
//! A row is {offset of the member's bytes in the tar u64, their length u32, offset of the name in the names u32, first
//! 128 bits of BLAKE3 over the member's bytes}; a digest of zeros means "not known" (a tar that was only scanned).
//! A name is its length in bytes (u16) and UTF-8. Only members that belong to samples have a row; adjacent rows with
//! one key are a sample. The header alone says how many samples there are, so that a data set of many shards opens by
//! their headers.

use super::scan::split;
use crate::fault::{Code, Fault, Result};
use std::collections::HashSet;

const MAGIC: &[u8; 8] = b"occl-idx";
const VERSION: u32 = 2;
/// Bytes of the header.
pub const HEADER: usize = 48;
const OWN: std::ops::Range<usize> = 32..HEADER;
const ROW: usize = 32;

/// The first 128 bits of BLAKE3.
pub type Digest = [u8; 16];

/// BLAKE3-128 of `bytes`.
pub fn digest(bytes: &[u8]) -> Digest {
    blake3::hash(bytes).as_bytes()[..16].try_into().expect("sixteen bytes")
}

/// A digest as people read it.
pub fn hex(digest: &Digest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One member of a tar, to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The name in the tar: key, dot, extension.
    pub name: String,
    /// Where its bytes begin in the tar.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u32,
    /// BLAKE3-128 of its bytes, where known.
    pub digest: Option<Digest>,
}

/// One member of a tar, as an index holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    pub name: &'a str,
    pub offset: u64,
    pub length: u32,
    pub digest: Option<Digest>,
}

impl<'a> Row<'a> {
    /// WebDataset's key and extension.
    pub fn split(&self) -> (&'a str, &'a str) {
        split(self.name).expect("checked when the index was read")
    }

    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }
}

/// What the first bytes of an index say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub members: u32,
    /// Length of the tar in bytes.
    pub shard_bytes: u64,
    pub samples: u64,
    /// The digest of the whole index: what ranks compare.
    pub digest: Digest,
}

impl Header {
    /// Reads the first [`HEADER`] bytes of an index. Their digest cannot be checked without the rest.
    pub fn read(bytes: &[u8]) -> Result<Header> {
        if bytes.len() < HEADER || &bytes[..8] != MAGIC {
            return Err(corrupt("it does not begin as an index does"));
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(Fault::usage(format!(
                "the index has version {version}, this program reads version {VERSION}; \
                 delete it (the tar is then scanned) or pack again"
            )));
        }
        Ok(Header {
            members: u32_at(bytes, 12),
            shard_bytes: u64_at(bytes, 16),
            samples: u64_at(bytes, 24),
            digest: bytes[OWN].try_into().expect("sixteen bytes"),
        })
    }
}

/// The members of one tar, grouped into samples. Rows stay as they lie in the file: 32 bytes and the name.
#[derive(Clone, PartialEq, Eq)]
pub struct Index {
    bytes: Vec<u8>,
    header: Header,
    /// The first member of each sample, and at the end all of them.
    starts: Vec<u32>,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Index({:?})", self.header)
    }
}

impl Index {
    /// The index of a tar of `shard_bytes` bytes with these members. Faults with Code::Corrupt where they are no
    /// samples: a key that comes again later, or an extension twice in one sample.
    pub fn new(shard_bytes: u64, members: &[Member]) -> Result<Index> {
        let mut bytes = vec![0; HEADER];
        let mut names = Vec::new();
        for member in members {
            bytes.extend_from_slice(&member.offset.to_le_bytes());
            bytes.extend_from_slice(&member.length.to_le_bytes());
            bytes.extend_from_slice(&(names.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&member.digest.unwrap_or_default());
            names.extend_from_slice(&(member.name.len() as u16).to_le_bytes());
            names.extend_from_slice(member.name.as_bytes());
        }
        bytes.extend_from_slice(&names);
        let starts = group(members.iter().map(|member| member.name.as_str()))?;
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(members.len() as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&shard_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&(starts.len() as u64 - 1).to_le_bytes());
        let own = own_digest(&bytes);
        bytes[OWN].copy_from_slice(&own);
        let header = Header::read(&bytes)?;
        Ok(Index { bytes, header, starts })
    }

    /// What [`Index::bytes`] gave. Every length is checked before anything is allocated; a flipped bit anywhere, or
    /// rows that are no samples of a tar of the length that the header names, are Code::Corrupt.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Index> {
        let header = Header::read(&bytes)?;
        if own_digest(&bytes) != header.digest {
            return Err(corrupt("its bytes do not match its digest"));
        }
        let count = header.members as usize;
        if count > (bytes.len() - HEADER) / ROW {
            return Err(corrupt("it is shorter than its rows"));
        }
        let mut names = Vec::with_capacity(count);
        for at in 0..count {
            let row = row(&bytes, count, at).ok_or_else(|| corrupt("a name lies outside the file or is not UTF-8"))?;
            let outside = u64::from(row.length) > header.shard_bytes.saturating_sub(row.offset);
            if outside || split(row.name).is_none() {
                return Err(corrupt(&format!("the row of {} points outside the tar", row.name)));
            }
            names.push(row.name);
        }
        let starts = group(names.into_iter())?;
        if starts.len() as u64 - 1 != header.samples {
            return Err(corrupt("its header counts other samples than its rows"));
        }
        Ok(Index { bytes, header, starts })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many samples there are.
    pub fn samples(&self) -> usize {
        self.starts.len() - 1
    }

    /// The members of a sample.
    pub fn sample(&self, sample: usize) -> impl Iterator<Item = Row<'_>> {
        (self.starts[sample]..self.starts[sample + 1]).map(|at| self.row(at as usize))
    }

    /// Every member.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        (0..self.header.members as usize).map(|at| self.row(at))
    }

    fn row(&self, at: usize) -> Row<'_> {
        row(&self.bytes, self.header.members as usize, at).expect("checked when the index was read")
    }
}

/// Row `at` of `count`; none where its name lies outside the file or is not UTF-8.
fn row(bytes: &[u8], count: usize, at: usize) -> Option<Row<'_>> {
    let (rows, names) = bytes[HEADER..].split_at(count * ROW);
    let row = &rows[at * ROW..(at + 1) * ROW];
    let from = u32_at(row, 12) as usize;
    let length = names.get(from..from + 2).map(|n| u16::from_le_bytes([n[0], n[1]]) as usize)?;
    let name = std::str::from_utf8(names.get(from + 2..from + 2 + length)?).ok()?;
    let digest: Digest = row[16..32].try_into().expect("sixteen bytes");
    let digest = (digest != Digest::default()).then_some(digest);
    Some(Row { name, offset: u64_at(row, 0), length: u32_at(row, 8), digest })
}

/// Where runs of members with one key begin, and at the end all members. A key that comes again later, or an
/// extension twice in one sample, is damage.
fn group<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> Result<Vec<u32>> {
    let damaged = |what: String| Fault::new(Code::Corrupt, format!("{what}; pack the samples again"));
    let all = names.len() as u32;
    let mut keys: HashSet<&str> = HashSet::new();
    let mut extensions: Vec<String> = Vec::new();
    let mut starts = Vec::new();
    let mut current = None;
    for (at, name) in (0u32..).zip(names) {
        let (key, extension) = split(name).expect("checked when indexed");
        if current != Some(key) {
            if !keys.insert(key) {
                return Err(damaged(format!("the members of sample {key} are not adjacent, or it comes twice")));
            }
            extensions.clear();
            starts.push(at);
            current = Some(key);
        }
        let extension = extension.to_ascii_lowercase();
        if extensions.contains(&extension) {
            return Err(damaged(format!("sample {key} has the extension .{extension} twice")));
        }
        extensions.push(extension);
    }
    starts.push(all);
    Ok(starts)
}

fn own_digest(bytes: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..OWN.start]);
    hasher.update(&bytes[HEADER..]);
    hasher.finalize().as_bytes()[..16].try_into().expect("sixteen bytes")
}

fn corrupt(why: &str) -> Fault {
    Fault::new(Code::Corrupt, format!("the index is damaged: {why}; delete it (the tar is then scanned) or pack again"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
