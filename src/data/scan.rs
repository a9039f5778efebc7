//! Strict reader of a tar that has no index, on a disk or in a store.
//!
//! A tar has no end-to-end checksum: cut at a member's boundary, or with one header zeroed, it reads as a shorter tar
//! without an error. This reader therefore accounts for every block: headers follow each other without a gap, every
//! member ends inside the file, and the last member is followed by at least two blocks of zeros and nothing else. Names
//! are keys, never paths, and nothing is unpacked.

use super::index::{self, Index, Member, split_name};
use super::store::Store;
use crate::error::{Error, ExitCode, Result};
use std::io::{Read, Seek, SeekFrom};
use tar::{Archive, Entry, PaxExtensions};

const BLOCK: u64 = 512;
/// Maximum length of a member's name, in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// Maximum length of a GNU or PAX header that describes a member, in bytes.
const MAX_EXTENDED_HEADER_BYTES: u64 = 64 << 10;
/// Bytes of one read from a disk: small, because a scan skips most of the file.
const DISK_READ_BYTES: u64 = 32 << 10;
/// Bytes of one request to a store.
const STORE_READ_BYTES: u64 = 8 << 20;

/// Indexes the members of the tar `file` of a store, without digests: only headers are parsed.
pub fn scan(store: &Store, file: &str, shard_bytes: u64) -> Result<Index> {
    let mut archive = Archive::new(ObjectReader::new(store, file, shard_bytes));
    let (members, end) = read_members(&mut archive, shard_bytes)?;
    check_tail(&mut ObjectReader::new(store, file, shard_bytes), end, shard_bytes)?;
    Index::new(shard_bytes, &members)
}

/// Hashes the members that `scan` found, which turns its result into a full index. Calls `progress` with the bytes of
/// every member.
pub fn hash_members(store: &Store, file: &str, scanned: &Index, mut progress: impl FnMut(u64)) -> Result<Index> {
    let mut reader = ObjectReader::new(store, file, scanned.header().shard_bytes);
    let mut members = Vec::new();
    let mut bytes = Vec::new();
    for member in scanned.members() {
        bytes.resize(member.length as usize, 0);
        reader.seek(SeekFrom::Start(member.offset)).and_then(|_| reader.read_exact(&mut bytes)).map_err(read_error)?;
        let digest = Some(index::digest(&bytes));
        members.push(Member { name: member.name.to_owned(), offset: member.offset, length: member.length, digest });
        progress(u64::from(member.length));
    }
    Index::new(scanned.header().shard_bytes, &members)
}

/// A seekable reader of an object, buffered in large pieces.
struct ObjectReader<'a> {
    store: &'a Store,
    file: &'a str,
    length: u64,
    position: u64,
    buffer: Vec<u8>,
    /// Offset of the buffer in the object.
    buffer_start: u64,
}

impl<'a> ObjectReader<'a> {
    fn new(store: &'a Store, file: &'a str, length: u64) -> ObjectReader<'a> {
        ObjectReader { store, file, length, position: 0, buffer: Vec::new(), buffer_start: 0 }
    }

    fn fill_buffer(&mut self) -> std::io::Result<()> {
        let max_bytes = if self.store.local_path().is_some() { DISK_READ_BYTES } else { STORE_READ_BYTES };
        let end = (self.position + max_bytes).min(self.length);
        self.buffer = self.store.get_range(self.file, self.position..end).map_err(std::io::Error::other)?;
        self.buffer_start = self.position;
        Ok(())
    }
}

impl Read for ObjectReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.position >= self.length || out.is_empty() {
            return Ok(0);
        }
        let buffered = self.buffer_start..self.buffer_start + self.buffer.len() as u64;
        if !buffered.contains(&self.position) {
            self.fill_buffer()?;
        }
        let start = (self.position - self.buffer_start) as usize;
        let count = out.len().min(self.buffer.len() - start);
        out[..count].copy_from_slice(&self.buffer[start..start + count]);
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for ObjectReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let (origin, offset) = match to {
            SeekFrom::Start(offset) => (0, offset as i128),
            SeekFrom::Current(offset) => (self.position, i128::from(offset)),
            SeekFrom::End(offset) => (self.length, i128::from(offset)),
        };
        self.position = u64::try_from(i128::from(origin) + offset).map_err(std::io::Error::other)?;
        Ok(self.position)
    }
}

/// Reads every member that belongs to a sample, and the offset at which the last member ends.
fn read_members(archive: &mut Archive<ObjectReader>, shard_bytes: u64) -> Result<(Vec<Member>, u64)> {
    let mut members = Vec::new();
    let mut end = 0;
    let mut extended_name: Option<Vec<u8>> = None;
    for entry in archive.entries_with_seek().map_err(read_error)?.raw(true) {
        let mut entry = entry.map_err(read_error)?;
        let offset = entry.raw_file_position();
        let length = entry.size();
        if entry.raw_header_position() != end || length > shard_bytes.saturating_sub(offset) {
            return Err(corrupt(format!(
                "the member at byte {offset} declares {length} bytes, {} are left",
                shard_bytes.saturating_sub(offset)
            )));
        }
        end = offset + length.div_ceil(BLOCK) * BLOCK;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
            if let Some(name) = read_extended_name(&mut entry)? {
                extended_name = Some(name);
            }
            continue;
        }
        if kind.is_gnu_longlink() || kind.is_pax_global_extensions() {
            continue;
        }
        let name = extended_name.take().unwrap_or_else(|| entry.header().path_bytes().into_owned());
        if !kind.is_file() {
            continue;
        }
        if let Some(name) = sample_name(name, offset)? {
            let length = u32::try_from(length)
                .map_err(|_| corrupt(format!("member {name} has {length} bytes, the limit is {}", u32::MAX)))?;
            members.push(Member { name, offset, length, digest: None });
        }
    }
    Ok((members, end))
}

/// Reads the name that a GNU or PAX header gives the next member. A PAX size is refused: two readers that disagree on a
/// member's size see different members (the flaw behind CVE-2025-62518), and no member here needs one.
fn read_extended_name(entry: &mut Entry<'_, ObjectReader>) -> Result<Option<Vec<u8>>> {
    let offset = entry.raw_file_position();
    if entry.size() > MAX_EXTENDED_HEADER_BYTES {
        return Err(corrupt(format!("the extended header at byte {offset} has {} bytes", entry.size())));
    }
    let mut text = Vec::new();
    entry.read_to_end(&mut text).map_err(read_error)?;
    if entry.header().entry_type().is_gnu_longname() {
        while text.last() == Some(&0) {
            text.pop();
        }
        return Ok(Some(text));
    }
    let mut name = None;
    for record in PaxExtensions::new(&text) {
        let record = record.map_err(read_error)?;
        match record.key_bytes() {
            b"path" => name = Some(record.value_bytes().to_vec()),
            b"size" => return Err(corrupt(format!("the PAX header at byte {offset} overrides a size"))),
            _ => {}
        }
    }
    Ok(name)
}

/// Returns the name as text; none where WebDataset skips the member: metadata (`__…__`) and names without key and
/// extension.
fn sample_name(name: Vec<u8>, offset: u64) -> Result<Option<String>> {
    if name.len() > MAX_NAME_BYTES || name.contains(&0) {
        return Err(corrupt(format!(
            "the name of the member at byte {offset} contains a NUL or has more than {MAX_NAME_BYTES} bytes ({} bytes)",
            name.len()
        )));
    }
    let name = String::from_utf8(name)
        .map_err(|_| corrupt(format!("the name of the member at byte {offset} is not UTF-8")))?;
    let metadata = !name.contains('/') && name.starts_with("__") && name.ends_with("__");
    Ok((!metadata && split_name(&name).is_some()).then_some(name))
}

/// Checks that at least two blocks of zeros, and nothing else, follow the last member.
fn check_tail(file: &mut ObjectReader, end: u64, shard_bytes: u64) -> Result<()> {
    let tail_bytes = shard_bytes.saturating_sub(end);
    if tail_bytes < 2 * BLOCK {
        return Err(corrupt(format!(
            "{tail_bytes} bytes follow the last member, at least two blocks of zeros are expected: the file was cut"
        )));
    }
    file.seek(SeekFrom::Start(end)).map_err(read_error)?;
    let mut block = [0; BLOCK as usize];
    let mut position = end;
    while position < shard_bytes {
        let count = file.read(&mut block).map_err(read_error)?;
        if count == 0 || block[..count].iter().any(|&byte| byte != 0) {
            return Err(corrupt(format!(
                "data follow the end of the archive at byte {position}: a header was damaged there"
            )));
        }
        position += count as u64;
    }
    Ok(())
}

/// Recovers an error of the store that passed through the tar reader; any other error means a damaged tar.
fn read_error(error: std::io::Error) -> Error {
    match error.get_ref().and_then(|cause| cause.downcast_ref::<Error>()) {
        Some(error) => error.clone(),
        None => corrupt(error.to_string()),
    }
}

fn corrupt(why: impl std::fmt::Display) -> Error {
    Error::new(ExitCode::Corrupt, format!("the tar is damaged: {why}; fetch or pack it again"))
}
