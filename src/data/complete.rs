//! Does a file hold all of its picture? Decoders forgive: half a JPEG decodes without an error into a picture whose
//! lower half is grey. The end of the picture is therefore looked for in the structure of the file. What was damaged
//! without being cut is found by the digests of the index.

/// Whether the JPEG, PNG or WebP file reaches the end of its picture; none where it is none of the three.
pub fn complete(bytes: &[u8]) -> Option<bool> {
    if bytes.starts_with(&[0xFF, 0xD8]) {
        Some(jpeg(bytes).is_some())
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        Some(png(bytes).is_some())
    } else if bytes.len() >= 12 && &bytes[..4] == b"RIFF" && &bytes[8..12] == b"WEBP" {
        let declared = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
        Some(bytes.len() as u64 >= 8 + u64::from(declared))
    } else {
        None
    }
}

/// Walks the markers to "end of image" (ITU-T T.81, B.1.1). A thumbnail has such a marker too, inside a segment that
/// is stepped over whole.
fn jpeg(bytes: &[u8]) -> Option<()> {
    let mut at = 2;
    loop {
        // Between segments stand fill bytes, or the coded data of a scan; in those, FF 00 is a value and FF D0..D7
        // are restarts.
        while *bytes.get(at)? != 0xFF || matches!(*bytes.get(at + 1)?, 0x00 | 0x01 | 0xD0..=0xD7 | 0xFF) {
            at += 1;
        }
        if bytes[at + 1] == 0xD9 {
            return Some(());
        }
        let length = u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]);
        at += 2 + usize::from(length.max(2));
    }
}

/// Walks the chunks to IEND.
fn png(bytes: &[u8]) -> Option<()> {
    let mut at = 8;
    loop {
        let head = bytes.get(at..at + 8)?;
        let length = u32::from_be_bytes(head[..4].try_into().expect("four bytes")) as usize;
        at = at.checked_add(length)?.checked_add(12)?;
        bytes.get(at - 1)?;
        if &head[4..] == b"IEND" {
            return Some(());
        }
    }
}
