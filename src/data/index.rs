//! The index of a shard: the position and the digest of each member of the tar.
//!
//! `name-000000.tar.idx` is stored next to `name-000000.tar`. Everything is little-endian:
//!
//! | offset | bytes | content |
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
//! 128 bits of BLAKE3 over the member's bytes}; a digest of zeros means "unknown" (a tar that was only scanned).
//! A name is its length in bytes (u16) and UTF-8. Only members that belong to samples have a row; adjacent rows with
//! one key are a sample. The header contains the number of samples, so that a data set of many shards opens by reading
//! headers only.

use crate::error::{Error, ExitCode, Result};
use std::collections::HashSet;
use std::ops::Range;

const MAGIC: &[u8; 8] = b"occl-idx";
const VERSION: u32 = 2;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 48;
/// Position of the index's own digest.
const DIGEST_RANGE: Range<usize> = 32..HEADER_BYTES;
const ROW_BYTES: usize = 32;

/// The first 128 bits of BLAKE3.
pub type Digest = [u8; 16];

/// Returns BLAKE3-128 of `bytes`.
pub fn digest(bytes: &[u8]) -> Digest {
    blake3::hash(bytes).as_bytes()[..16].try_into().expect("sixteen bytes")
}

/// Returns a digest in hexadecimal.
pub fn to_hex(digest: &Digest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Splits a member's name by WebDataset's rule: the key is the name up to the first dot after the last slash, the
/// extension is the rest. `a/b/0001.seg.png` → (`a/b/0001`, `seg.png`); extensions are compared in lower case.
pub fn split_name(name: &str) -> Option<(&str, &str)> {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = file + name[file..].find('.')?;
    (dot > file).then(|| (&name[..dot], &name[dot + 1..]))
}

/// A member of a tar, to be indexed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Name in the tar: key, dot, extension.
    pub name: String,
    /// Offset of its bytes in the tar.
    pub offset: u64,
    /// Number of bytes.
    pub length: u32,
    /// BLAKE3-128 of its bytes, where known.
    pub digest: Option<Digest>,
}

/// A member of a tar, borrowed from an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberRef<'a> {
    pub name: &'a str,
    /// Offset of its bytes in the tar.
    pub offset: u64,
    /// Number of bytes.
    pub length: u32,
    /// BLAKE3-128 of its bytes, where known.
    pub digest: Option<Digest>,
}

impl<'a> MemberRef<'a> {
    /// Returns WebDataset's key and extension.
    pub fn split_name(&self) -> (&'a str, &'a str) {
        split_name(self.name).expect("checked when the index was read")
    }

    /// Returns the offset of the first byte behind the member.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }
}

/// The header of an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexHeader {
    /// Number of members.
    pub members: u32,
    /// Length of the tar in bytes.
    pub shard_bytes: u64,
    /// Number of samples.
    pub samples: u64,
    /// Digest of the whole index, which ranks compare.
    pub digest: Digest,
}

impl IndexHeader {
    /// Parses the first [`HEADER_BYTES`] bytes of an index. The digest cannot be checked without the rest.
    pub fn parse(bytes: &[u8]) -> Result<IndexHeader> {
        if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC {
            return Err(corrupt("it does not begin as an index does"));
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(Error::usage(format!(
                "the index has version {version}, this program reads version {VERSION}; \
                 delete it (the tar is then scanned) or pack again"
            )));
        }
        Ok(IndexHeader {
            members: u32_at(bytes, 12),
            shard_bytes: u64_at(bytes, 16),
            samples: u64_at(bytes, 24),
            digest: bytes[DIGEST_RANGE].try_into().expect("sixteen bytes"),
        })
    }
}

/// The members of one tar, grouped into samples. Rows stay in the layout of the file: 32 bytes and the name.
#[derive(Clone, PartialEq, Eq)]
pub struct Index {
    bytes: Vec<u8>,
    header: IndexHeader,
    /// First member of each sample; the last entry is the number of members.
    starts: Vec<u32>,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Index({:?})", self.header)
    }
}

impl Index {
    /// Makes the index of a tar of `shard_bytes` bytes with these members.
    ///
    /// # Errors
    /// ExitCode::Corrupt where the members of a key are not adjacent or a sample has an extension twice.
    pub fn new(shard_bytes: u64, members: &[Member]) -> Result<Index> {
        let mut bytes = vec![0; HEADER_BYTES];
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
        let starts = group_by_key(members.iter().map(|member| member.name.as_str()))?;
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(members.len() as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&shard_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&(starts.len() as u64 - 1).to_le_bytes());
        let own_digest = index_digest(&bytes);
        bytes[DIGEST_RANGE].copy_from_slice(&own_digest);
        let header = IndexHeader::parse(&bytes)?;
        Ok(Index { bytes, header, starts })
    }

    /// Reads the bytes of an index file. Every length is checked before anything is allocated.
    ///
    /// # Errors
    /// ExitCode::Corrupt where the digest does not match, or rows do not fit a tar of the length in the header.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Index> {
        let header = IndexHeader::parse(&bytes)?;
        if index_digest(&bytes) != header.digest {
            return Err(corrupt("its bytes do not match its digest"));
        }
        let count = header.members as usize;
        if count > (bytes.len() - HEADER_BYTES) / ROW_BYTES {
            return Err(corrupt("it is shorter than its rows"));
        }
        let mut names = Vec::with_capacity(count);
        for index in 0..count {
            let member = parse_row(&bytes, count, index);
            let member = member.ok_or_else(|| corrupt("a name lies outside the file or is not UTF-8"))?;
            let outside = u64::from(member.length) > header.shard_bytes.saturating_sub(member.offset);
            if outside || split_name(member.name).is_none() {
                return Err(corrupt(&format!("the row of {} points outside the tar", member.name)));
            }
            names.push(member.name);
        }
        let starts = group_by_key(names.into_iter())?;
        if starts.len() as u64 - 1 != header.samples {
            return Err(corrupt("the number of samples in its header is not that of its rows"));
        }
        Ok(Index { bytes, header, starts })
    }

    /// Returns the bytes of the index file.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the header.
    pub fn header(&self) -> &IndexHeader {
        &self.header
    }

    /// Returns the number of samples.
    pub fn sample_count(&self) -> usize {
        self.starts.len() - 1
    }

    /// Returns the members of a sample.
    pub fn sample_members(&self, sample: usize) -> impl Iterator<Item = MemberRef<'_>> {
        (self.starts[sample]..self.starts[sample + 1]).map(|index| self.member(index as usize))
    }

    /// Returns every member.
    pub fn members(&self) -> impl Iterator<Item = MemberRef<'_>> {
        (0..self.header.members as usize).map(|index| self.member(index))
    }

    fn member(&self, index: usize) -> MemberRef<'_> {
        parse_row(&self.bytes, self.header.members as usize, index).expect("checked when the index was read")
    }
}

/// Parses row `index` of `count`; none where its name lies outside the file or is not UTF-8.
fn parse_row(bytes: &[u8], count: usize, index: usize) -> Option<MemberRef<'_>> {
    let (rows, names) = bytes[HEADER_BYTES..].split_at(count * ROW_BYTES);
    let row = &rows[index * ROW_BYTES..(index + 1) * ROW_BYTES];
    let start = u32_at(row, 12) as usize;
    let length = names.get(start..start + 2).map(|two| u16::from_le_bytes([two[0], two[1]]) as usize)?;
    let name = std::str::from_utf8(names.get(start + 2..start + 2 + length)?).ok()?;
    let digest: Digest = row[16..32].try_into().expect("sixteen bytes");
    let digest = (digest != Digest::default()).then_some(digest);
    Some(MemberRef { name, offset: u64_at(row, 0), length: u32_at(row, 8), digest })
}

/// Returns the first member of each run of members with one key; the last entry is the number of members. A key in two
/// runs, or an extension twice in one sample, is an error.
fn group_by_key<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> Result<Vec<u32>> {
    let count = names.len() as u32;
    let mut keys: HashSet<&str> = HashSet::new();
    let mut extensions: Vec<String> = Vec::new();
    let mut starts = Vec::new();
    let mut current = None;
    for (index, name) in (0u32..).zip(names) {
        let (key, extension) = split_name(name).expect("members of samples have an extension");
        if current != Some(key) {
            if !keys.insert(key) {
                return Err(malformed(format!("the members of sample {key} are not adjacent, or it comes twice")));
            }
            extensions.clear();
            starts.push(index);
            current = Some(key);
        }
        let extension = extension.to_ascii_lowercase();
        if extensions.contains(&extension) {
            return Err(malformed(format!("sample {key} has the extension .{extension} twice")));
        }
        extensions.push(extension);
    }
    starts.push(count);
    Ok(starts)
}

/// Returns the digest of an index: of everything except the digest itself.
fn index_digest(bytes: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..DIGEST_RANGE.start]);
    hasher.update(&bytes[HEADER_BYTES..]);
    hasher.finalize().as_bytes()[..16].try_into().expect("sixteen bytes")
}

fn corrupt(why: &str) -> Error {
    let message = format!("the index is damaged: {why}; delete it (the tar is then scanned) or pack again");
    Error::new(ExitCode::Corrupt, message)
}

fn malformed(what: String) -> Error {
    Error::new(ExitCode::Corrupt, format!("{what}; pack the samples again"))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}
