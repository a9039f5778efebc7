//! Does a file hold all of its picture? Decoders forgive: half a JPEG decodes without an error into a picture whose
//! lower half is grey. The end of the picture is therefore looked for in the structure of the file, before anything is
//! decoded, and what the picture will cost is read on the way. What was damaged without being cut is found by the
//! decoder or by the digests of the index.

/// The structure of a file that reaches the end of its picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole<'a> {
    Jpeg {
        /// The TIFF structure inside the EXIF segment.
        exif: Option<&'a [u8]>,
        /// Passes over the picture: one for a baseline file, about ten for a progressive one.
        scans: u32,
    },
    Png {
        size: [u32; 2],
    },
    WebP {
        /// Width and height of the largest picture inside, each by itself.
        size: [u32; 2],
    },
}

/// Why a file is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// It is none of the three formats.
    Format,
    /// It ends before its picture does.
    End,
}

/// Walks a JPEG, PNG or WebP file to the end of its picture.
pub fn complete(bytes: &[u8]) -> Result<Whole<'_>, Lack> {
    if bytes.starts_with(&[0xFF, 0xD8]) {
        jpeg(bytes).ok_or(Lack::End)
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        png(bytes).ok_or(Lack::End)
    } else if bytes.len() >= 12 && &bytes[..4] == b"RIFF" && &bytes[8..12] == b"WEBP" {
        webp(bytes).ok_or(Lack::End)
    } else {
        Err(Lack::Format)
    }
}

/// Walks the markers to "end of image" (ITU-T T.81, B.1.1). A thumbnail has such a marker too, inside a segment that
/// is stepped over whole.
fn jpeg(bytes: &[u8]) -> Option<Whole<'_>> {
    let (mut at, mut exif, mut scans) = (2, None, 0);
    loop {
        // Between segments stand fill bytes, or the coded data of a scan; in those, FF 00 is a value and FF D0..D7
        // are restarts.
        at = next_ff(bytes, at)?;
        match *bytes.get(at + 1)? {
            0x00 | 0x01 | 0xD0..=0xD7 => at += 2,
            0xFF => at += 1,
            0xD9 => return (scans > 0).then_some(Whole::Jpeg { exif, scans }),
            marker => {
                let length = u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]);
                let end = at + 2 + usize::from(length.max(2));
                scans += u32::from(marker == 0xDA);
                if marker == 0xE1 && exif.is_none() {
                    exif = bytes.get(at + 4..end)?.strip_prefix(b"Exif\0\0");
                }
                at = end;
            }
        }
    }
}

/// Where the next FF stands, from `at` on. Eight bytes at once: the coded data of a scan hold one in 256.
fn next_ff(bytes: &[u8], mut at: usize) -> Option<usize> {
    const LOW: u64 = 0x0101_0101_0101_0101;
    let rest = bytes.get(at..)?;
    for eight in rest.chunks_exact(8) {
        // A byte FF is a byte 0 of the complement; the lowest one that is found is right (Warren, "Hacker's Delight").
        let zero = !u64::from_le_bytes(eight.try_into().expect("eight bytes"));
        let found = zero.wrapping_sub(LOW) & !zero & (LOW << 7);
        if found != 0 {
            return Some(at + found.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    bytes[at..].iter().position(|&byte| byte == 0xFF).map(|more| at + more)
}

/// Walks the chunks to IEND; IHDR, the first, gives the size (W3C PNG, 11.2.1).
fn png(bytes: &[u8]) -> Option<Whole<'_>> {
    let big = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().expect("four bytes")));
    let size = [big(16)?, big(20)?];
    let mut at = 8;
    loop {
        let length = big(at)? as usize;
        let name = bytes.get(at + 4..at + 8)?;
        at = at.checked_add(length)?.checked_add(12)?;
        bytes.get(at - 1)?;
        if name == b"IEND" {
            return Some(Whole::Png { size });
        }
    }
}

/// Walks the chunks of the RIFF container, and inside the frames of an animation (RFC 9649, 2.3 to 2.7). A file may
/// promise a small canvas and hold a huge frame; every picture inside is therefore looked at.
fn webp(bytes: &[u8]) -> Option<Whole<'_>> {
    let little = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().expect("four bytes")));
    let end = 8 + little(4)? as usize;
    bytes.get(..end)?;
    let (mut at, mut size) = (12, [0, 0]);
    while at + 8 <= end {
        let (name, length, inside) = (&bytes[at..at + 4], little(at + 4)? as usize, at + 8);
        let found = match name {
            // Key frame: start code, then 14 bits of width and of height, each with a scale above (RFC 6386, 9.1).
            b"VP8 " => little(inside + 6).map(|both| [both & 0x3FFF, both >> 16 & 0x3FFF]),
            // Signature, then 14 bits of width − 1 and of height − 1.
            b"VP8L" => little(inside + 1).map(|both| [(both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1]),
            // Flags, then 24 bits of width − 1 and of height − 1.
            b"VP8X" => canvas(bytes, inside + 4),
            // Place, 24 bits of width − 1 and of height − 1, time; then chunks of its own.
            b"ANMF" => canvas(bytes, inside + 6),
            _ => None,
        };
        if let Some([width, height]) = found {
            size = [size[0].max(width), size[1].max(height)];
        }
        at = if name == b"ANMF" { inside + 16 } else { inside.checked_add(length)?.checked_add(length % 2)? };
    }
    Some(Whole::WebP { size })
}

/// Two sides less one, 24 bits each.
fn canvas(bytes: &[u8], at: usize) -> Option<[u32; 2]> {
    let six = bytes.get(at..at + 6)?;
    Some([0, 3].map(|at| u32::from_le_bytes([six[at], six[at + 1], six[at + 2], 0]) + 1))
}
