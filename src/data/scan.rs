//! The strict reading of a tar that has no index, on a disk or in a store.
//!
//! A tar has no end-to-end check of its own: cut at a member's boundary, or with one header zeroed, it reads as a
//! shorter tar without an error. Here every block from the first to the last is accounted for: headers follow each
//! other without a gap, every member ends inside the file, and the last is followed by at least two blocks of zeros
//! and by nothing else. Names are keys, never paths, and nothing is unpacked.

use super::index::{self, Index, Member};
use super::store::Store;
use crate::fault::{Code, Fault, Result};
use std::io::{Read, Seek, SeekFrom};
use tar::{Archive, Entry, PaxExtensions};

const BLOCK: u64 = 512;
/// The longest name of a member, in bytes.
pub const NAME_MAX: usize = 255;
/// The longest GNU or PAX header that describes a member, in bytes.
const DESCRIPTION_MAX: u64 = 64 << 10;

/// The members of the tar `file` of a store, without digests: the headers are read, the bytes between are passed over.
pub fn scan(store: &Store, file: &str, shard_bytes: u64) -> Result<Index> {
    let reader = || Reader::new(store, file, shard_bytes);
    let mut archive = Archive::new(reader());
    let (members, end) = members(&mut archive, shard_bytes)?;
    tail(&mut reader(), end, shard_bytes)?;
    Index::new(shard_bytes, &members)
}

/// The bytes of members, as `scan` found them, hashed: what makes an index out of a scan. `seen` hears of every
/// member's bytes.
pub fn hashed(store: &Store, file: &str, scanned: &Index, mut seen: impl FnMut(u64)) -> Result<Index> {
    let mut reader = Reader::new(store, file, scanned.header().shard_bytes);
    let mut members = Vec::new();
    let mut bytes = Vec::new();
    for row in scanned.rows() {
        bytes.resize(row.length as usize, 0);
        reader.seek(SeekFrom::Start(row.offset)).and_then(|_| reader.read_exact(&mut bytes)).map_err(unreadable)?;
        let digest = Some(index::digest(&bytes));
        members.push(Member { name: row.name.to_owned(), offset: row.offset, length: row.length, digest });
        seen(u64::from(row.length));
    }
    Index::new(scanned.header().shard_bytes, &members)
}

/// An object as a file: read forwards in large pieces, with seeking.
struct Reader<'a> {
    store: &'a Store,
    file: &'a str,
    length: u64,
    at: u64,
    /// A piece of the object, and where it begins.
    piece: (u64, Vec<u8>),
}

impl<'a> Reader<'a> {
    fn new(store: &'a Store, file: &'a str, length: u64) -> Reader<'a> {
        Reader { store, file, length, at: 0, piece: (0, Vec::new()) }
    }

    fn fill(&mut self) -> std::io::Result<()> {
        // On a disk small pieces win: a scan passes over most of the file.
        let most = if self.store.local().is_some() { 32 << 10 } else { 8 << 20 };
        let end = (self.at + most).min(self.length);
        let bytes = self.store.get_range(self.file, self.at..end).map_err(std::io::Error::other)?;
        self.piece = (self.at, bytes);
        Ok(())
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.at >= self.length || out.is_empty() {
            return Ok(0);
        }
        let (begin, bytes) = &self.piece;
        if self.at < *begin || self.at >= begin + bytes.len() as u64 {
            self.fill()?;
        }
        let (begin, bytes) = &self.piece;
        let from = (self.at - begin) as usize;
        let count = out.len().min(bytes.len() - from);
        out[..count].copy_from_slice(&bytes[from..from + count]);
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let (from, by) = match to {
            SeekFrom::Start(at) => (0, at as i128),
            SeekFrom::Current(by) => (self.at, i128::from(by)),
            SeekFrom::End(by) => (self.length, i128::from(by)),
        };
        self.at = u64::try_from(i128::from(from) + by).map_err(std::io::Error::other)?;
        Ok(self.at)
    }
}

/// Every member that belongs to a sample, and where the last one ends.
fn members(archive: &mut Archive<Reader>, shard_bytes: u64) -> Result<(Vec<Member>, u64)> {
    let mut members = Vec::new();
    let mut end = 0;
    let mut described: Option<Vec<u8>> = None;
    for entry in archive.entries_with_seek().map_err(unreadable)?.raw(true) {
        let mut entry = entry.map_err(unreadable)?;
        let (offset, length) = (entry.raw_file_position(), entry.size());
        if entry.raw_header_position() != end || length > shard_bytes.saturating_sub(offset) {
            return Err(corrupt(format!(
                "the member at byte {offset} declares {length} bytes, {} are left",
                shard_bytes.saturating_sub(offset)
            )));
        }
        end = offset + length.div_ceil(BLOCK) * BLOCK;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
            if let Some(name) = description(&mut entry)? {
                described = Some(name);
            }
            continue;
        }
        if kind.is_gnu_longlink() || kind.is_pax_global_extensions() {
            continue;
        }
        let name = described.take().unwrap_or_else(|| entry.header().path_bytes().into_owned());
        if !kind.is_file() {
            continue;
        }
        if let Some(name) = sample_name(name, offset)? {
            let length = u32::try_from(length)
                .map_err(|_| corrupt(format!("member {name} has {length} bytes; the most is {}", u32::MAX)))?;
            members.push(Member { name, offset, length, digest: None });
        }
    }
    Ok((members, end))
}

/// The name that a GNU or PAX header gives the next member. A PAX size is refused: two readers that disagree on a
/// member's size see different members (the flaw behind CVE-2025-62518), and no member here needs one.
fn description(entry: &mut Entry<'_, Reader>) -> Result<Option<Vec<u8>>> {
    let offset = entry.raw_file_position();
    if entry.size() > DESCRIPTION_MAX {
        return Err(corrupt(format!("the extended header at byte {offset} has {} bytes", entry.size())));
    }
    let mut text = Vec::new();
    entry.read_to_end(&mut text).map_err(unreadable)?;
    if entry.header().entry_type().is_gnu_longname() {
        while text.last() == Some(&0) {
            text.pop();
        }
        return Ok(Some(text));
    }
    let mut name = None;
    for record in PaxExtensions::new(&text) {
        let record = record.map_err(unreadable)?;
        match record.key_bytes() {
            b"path" => name = Some(record.value_bytes().to_vec()),
            b"size" => return Err(corrupt(format!("the PAX header at byte {offset} overrides a size"))),
            _ => {}
        }
    }
    Ok(name)
}

/// The name as text, or none where WebDataset skips the member: metadata (`__…__`) and names without key and
/// extension.
fn sample_name(name: Vec<u8>, offset: u64) -> Result<Option<String>> {
    if name.len() > NAME_MAX || name.contains(&0) {
        return Err(corrupt(format!(
            "the member at byte {offset} has a name of {} bytes or with a NUL in it; at most {NAME_MAX} are read",
            name.len()
        )));
    }
    let name = String::from_utf8(name)
        .map_err(|_| corrupt(format!("the name of the member at byte {offset} is not UTF-8")))?;
    let metadata = !name.contains('/') && name.starts_with("__") && name.ends_with("__");
    Ok((!metadata && split(&name).is_some()).then_some(name))
}

/// WebDataset's rule: the key is the name up to the first dot after the last slash, the extension the rest.
/// `a/b/0001.seg.png` → (`a/b/0001`, `seg.png`); the extension is compared in lower case.
pub fn split(name: &str) -> Option<(&str, &str)> {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = file + name[file..].find('.')?;
    (dot > file).then(|| (&name[..dot], &name[dot + 1..]))
}

/// After the last member come two blocks of zeros or more, and nothing else.
fn tail(file: &mut Reader, end: u64, shard_bytes: u64) -> Result<()> {
    let left = shard_bytes.saturating_sub(end);
    if left < 2 * BLOCK {
        return Err(corrupt(format!(
            "{left} bytes follow the last member, two blocks of zeros are wanted: it was cut"
        )));
    }
    file.seek(SeekFrom::Start(end)).map_err(unreadable)?;
    let mut block = [0; BLOCK as usize];
    let mut at = end;
    while at < shard_bytes {
        let read = file.read(&mut block).map_err(unreadable)?;
        if read == 0 || block[..read].iter().any(|&byte| byte != 0) {
            return Err(corrupt(format!("bytes follow its end at byte {at}: a header was damaged there")));
        }
        at += read as u64;
    }
    Ok(())
}

/// A store's own fault comes back out of the tar reader; anything else is the tar's.
fn unreadable(error: std::io::Error) -> Fault {
    match error.get_ref().and_then(|cause| cause.downcast_ref::<Fault>()) {
        Some(fault) => fault.clone(),
        None => corrupt(error.to_string()),
    }
}

fn corrupt(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Corrupt, format!("the tar is damaged: {why}; fetch or pack it again"))
}
