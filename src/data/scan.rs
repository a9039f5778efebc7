//! The strict reading of a tar that has no index.
//!
//! A tar has no end-to-end check of its own: cut at a member's boundary, or with one header zeroed, it reads as a
//! shorter tar without an error. Here every block from the first to the last is accounted for: headers follow each
//! other without a gap, every member ends inside the file, and the last is followed by at least two blocks of zeros
//! and by nothing else. Names are keys, never paths, and nothing is unpacked.

use super::index::{Index, Member};
use crate::fault::{Code, Fault, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use tar::{Archive, Entry, PaxExtensions};

const BLOCK: u64 = 512;
/// The longest name of a member, in bytes.
pub const NAME_MAX: usize = 255;
/// The longest GNU or PAX header that describes a member, in bytes.
const DESCRIPTION_MAX: u64 = 64 << 10;

/// The members of the tar at `path`, without digests.
pub fn scan(path: &Path) -> Result<Index> {
    let open = || File::open(path).map_err(|error| Fault::disk(path.display(), error));
    let shard_bytes = open()?.metadata().map_err(|error| Fault::disk(path.display(), error))?.len();
    let mut archive = Archive::new(open()?);
    let (members, end) = members(&mut archive, shard_bytes).map_err(|fault| fault.at(path.display()))?;
    tail(&mut open()?, end, shard_bytes).map_err(|fault| fault.at(path.display()))?;
    Ok(Index { shard_bytes, members })
}

/// Every member that belongs to a sample, and where the last one ends.
fn members(archive: &mut Archive<File>, shard_bytes: u64) -> Result<(Vec<Member>, u64)> {
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
fn description(entry: &mut Entry<'_, File>) -> Result<Option<Vec<u8>>> {
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
fn tail(file: &mut File, end: u64, shard_bytes: u64) -> Result<()> {
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

fn unreadable(error: std::io::Error) -> Fault {
    corrupt(error.to_string())
}

fn corrupt(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Corrupt, format!("the tar is damaged: {why}; fetch or pack it again"))
}
