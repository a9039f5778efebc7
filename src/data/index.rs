//! The index of a shard: where each member of the tar lies, and what its bytes must hash to.
//!
//! `name-000000.tar.idx` lies beside `name-000000.tar`. Everything is little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `occl-idx` |
//! | 8 | 4 | version, u32 = 1 |
//! | 12 | 4 | members M, u32 |
//! | 16 | 8 | length of the tar in bytes, u64 |
//! | 24 | 16 | first 128 bits of BLAKE3 over bytes 0..24 and 40.. of this file |
//! | 40 | 32·M | rows, in the order of the tar |
//! | 40 + 32·M | to the end | names |
//!
//! A row is {offset of the member's bytes in the tar u64, their length u32, offset of the name in the names u32, first
//! 128 bits of BLAKE3 over the member's bytes}; a digest of zeros means "not known" (a tar that was only scanned).
//! A name is its length in bytes (u16) and UTF-8. Only members that belong to samples have a row.

use crate::fault::{Code, Fault, Result};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"occl-idx";
const VERSION: u32 = 1;
const HEADER: usize = 40;
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

/// One member of a tar.
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

/// The members of one tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Length of the tar in bytes.
    pub shard_bytes: u64,
    pub members: Vec<Member>,
}

impl Index {
    /// Where the index of `shard` lies.
    pub fn path(shard: &Path) -> PathBuf {
        let mut name = shard.as_os_str().to_owned();
        name.push(".idx");
        PathBuf::from(name)
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut rows = Vec::with_capacity(ROW * self.members.len());
        let mut names = Vec::new();
        for member in &self.members {
            rows.extend_from_slice(&member.offset.to_le_bytes());
            rows.extend_from_slice(&member.length.to_le_bytes());
            rows.extend_from_slice(&(names.len() as u32).to_le_bytes());
            rows.extend_from_slice(&member.digest.unwrap_or_default());
            names.extend_from_slice(&(member.name.len() as u16).to_le_bytes());
            names.extend_from_slice(member.name.as_bytes());
        }
        let mut out = Vec::with_capacity(HEADER + rows.len() + names.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.members.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.shard_bytes.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        out.extend_from_slice(&rows);
        out.extend_from_slice(&names);
        let own = own_digest(&out);
        out[24..HEADER].copy_from_slice(&own);
        out
    }

    /// What [`Index::to_bytes`] wrote. Every length is checked before anything is allocated; a flipped bit anywhere
    /// is Code::Corrupt.
    pub fn from_bytes(bytes: &[u8]) -> Result<Index> {
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
        if own_digest(bytes)[..] != bytes[24..HEADER] {
            return Err(corrupt("its bytes do not match its digest"));
        }
        let count = u32_at(bytes, 12) as usize;
        let body = &bytes[HEADER..];
        if count > body.len() / ROW {
            return Err(corrupt("it is shorter than its rows"));
        }
        let (rows, names) = body.split_at(count * ROW);
        let members = rows.chunks_exact(ROW).map(|row| member(row, names)).collect::<Result<_>>()?;
        Ok(Index { shard_bytes: u64_at(bytes, 16), members })
    }

    /// The digest in the header: what ranks compare.
    pub fn digest(&self) -> Digest {
        self.to_bytes()[24..HEADER].try_into().expect("sixteen bytes")
    }
}

fn member(row: &[u8], names: &[u8]) -> Result<Member> {
    let from = u32_at(row, 12) as usize;
    let length = names.get(from..from + 2).map(|n| u16::from_le_bytes([n[0], n[1]]) as usize);
    let name = length.and_then(|length| names.get(from + 2..from + 2 + length));
    let name = name.and_then(|name| std::str::from_utf8(name).ok());
    let name = name.ok_or_else(|| corrupt("a name lies outside the file or is not UTF-8"))?;
    let digest: Digest = row[16..32].try_into().expect("sixteen bytes");
    Ok(Member {
        name: name.to_owned(),
        offset: u64_at(row, 0),
        length: u32_at(row, 8),
        digest: (digest != Digest::default()).then_some(digest),
    })
}

fn own_digest(bytes: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..24]);
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
