//! Finds truncated image files. Decoders tolerate truncation: half a JPEG decodes without an error into an image whose
//! lower half is gray. So the structure of the file is walked to its end before anything is decoded, and what decoding
//! will cost is read on the way. Damage inside a complete file is found by the decoder or by the digests of the index.

/// The structure of a complete image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageStructure<'a> {
    Jpeg {
        /// The TIFF structure inside the EXIF segment.
        exif: Option<&'a [u8]>,
        /// Number of scans: one for a baseline file, about ten for a progressive one.
        scans: u32,
    },
    Png {
        size: [u32; 2],
    },
    WebP {
        /// Maximum width and maximum height of the images inside.
        size: [u32; 2],
    },
}

/// The reason why a file is not a complete image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageStructureError {
    /// The file is neither JPEG, PNG nor WebP.
    UnknownFormat,
    /// The file ends before its image does.
    Truncated,
}

/// Walks a JPEG, PNG or WebP file to the end of its image.
pub fn read_structure(bytes: &[u8]) -> Result<ImageStructure<'_>, ImageStructureError> {
    let structure = if bytes.starts_with(&[0xFF, 0xD8]) {
        walk_jpeg(bytes)
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        walk_png(bytes)
    } else if bytes.len() >= 12 && &bytes[..4] == b"RIFF" && &bytes[8..12] == b"WEBP" {
        walk_webp(bytes)
    } else {
        return Err(ImageStructureError::UnknownFormat);
    };
    structure.ok_or(ImageStructureError::Truncated)
}

/// Walks the markers to "end of image" (ITU-T T.81, B.1.1). The marker of an embedded thumbnail is inside a segment,
/// which is skipped as a whole.
fn walk_jpeg(bytes: &[u8]) -> Option<ImageStructure<'_>> {
    let mut offset = 2;
    let mut exif = None;
    let mut scans = 0;
    loop {
        // Between segments there are fill bytes, or the coded data of a scan, in which FF 00 is a value and FF D0..D7
        // are restart markers.
        offset = find_ff(bytes, offset)?;
        match *bytes.get(offset + 1)? {
            0x00 | 0x01 | 0xD0..=0xD7 => offset += 2,
            0xFF => offset += 1,
            0xD9 => return (scans > 0).then_some(ImageStructure::Jpeg { exif, scans }),
            marker => {
                let length = u16::from_be_bytes([*bytes.get(offset + 2)?, *bytes.get(offset + 3)?]);
                let end = offset + 2 + usize::from(length.max(2));
                scans += u32::from(marker == 0xDA);
                if marker == 0xE1 && exif.is_none() {
                    exif = bytes.get(offset + 4..end)?.strip_prefix(b"Exif\0\0");
                }
                offset = end;
            }
        }
    }
}

/// Returns the offset of the next FF byte. Eight bytes at a time: the coded data of a scan contain one in 256.
fn find_ff(bytes: &[u8], mut offset: usize) -> Option<usize> {
    const LOW_BITS: u64 = 0x0101_0101_0101_0101;
    let rest = bytes.get(offset..)?;
    for eight in rest.chunks_exact(8) {
        // An FF byte is a zero byte of the complement; the lowest zero byte is found exactly (Warren, "Hacker's
        // Delight").
        let complement = !u64::from_le_bytes(eight.try_into().expect("eight bytes"));
        let zero_bytes = complement.wrapping_sub(LOW_BITS) & !complement & (LOW_BITS << 7);
        if zero_bytes != 0 {
            return Some(offset + zero_bytes.trailing_zeros() as usize / 8);
        }
        offset += 8;
    }
    bytes[offset..].iter().position(|&byte| byte == 0xFF).map(|position| offset + position)
}

/// Walks the chunks to IEND; the first one, IHDR, has the size (W3C PNG, 11.2.1).
fn walk_png(bytes: &[u8]) -> Option<ImageStructure<'_>> {
    let u32_at = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().expect("four bytes")));
    let size = [u32_at(16)?, u32_at(20)?];
    let mut offset = 8;
    loop {
        let length = u32_at(offset)? as usize;
        let name = bytes.get(offset + 4..offset + 8)?;
        offset = offset.checked_add(length)?.checked_add(12)?;
        bytes.get(offset - 1)?;
        if name == b"IEND" {
            return Some(ImageStructure::Png { size });
        }
    }
}

/// Walks the chunks of the RIFF container, and those inside the frames of an animation (RFC 9649, 2.3 to 2.7). A file
/// may declare a small canvas and contain a huge frame, so every image inside is visited.
fn walk_webp(bytes: &[u8]) -> Option<ImageStructure<'_>> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().expect("four bytes")));
    let end = 8 + u32_at(4)? as usize;
    bytes.get(..end)?;
    let mut offset = 12;
    let mut size = [0, 0];
    while offset + 8 <= end {
        let name = &bytes[offset..offset + 4];
        let length = u32_at(offset + 4)? as usize;
        let content = offset + 8;
        let image_size = match name {
            // Key frame: start code, then 14 bits of width and of height, each with a scale above (RFC 6386, 9.1).
            b"VP8 " => u32_at(content + 6).map(|both| [both & 0x3FFF, both >> 16 & 0x3FFF]),
            // Signature, then 14 bits of width − 1 and of height − 1.
            b"VP8L" => u32_at(content + 1).map(|both| [(both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1]),
            // Flags, then 24 bits of width − 1 and of height − 1.
            b"VP8X" => read_canvas(bytes, content + 4),
            // Position, 24 bits of width − 1 and of height − 1, duration; then chunks of the frame.
            b"ANMF" => read_canvas(bytes, content + 6),
            _ => None,
        };
        if let Some([width, height]) = image_size {
            size = [size[0].max(width), size[1].max(height)];
        }
        offset = if name == b"ANMF" { content + 16 } else { content.checked_add(length)?.checked_add(length % 2)? };
    }
    Some(ImageStructure::WebP { size })
}

/// Reads width − 1 and height − 1, 24 bits each, and returns width and height.
fn read_canvas(bytes: &[u8], offset: usize) -> Option<[u32; 2]> {
    let six = bytes.get(offset..offset + 6)?;
    Some([0, 3].map(|at| u32::from_le_bytes([six[at], six[at + 1], six[at + 2], 0]) + 1))
}
