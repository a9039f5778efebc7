//! Reads the structure of an audio file: its header, and whether it reaches the end of its audio. Decoders accept
//! truncated files and return what is there, so this is checked before anything is decoded.

use super::{AudioFormat, AudioHeader};
use std::ops::Range;

/// The structure of a complete file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AudioStructure {
    pub header: AudioHeader,
    /// Byte range for the decoder, without tags before and after it.
    pub body: Range<usize>,
}

/// Why a file has no usable structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AudioStructureError {
    /// None of the known formats.
    UnknownFormat,
    /// A known format that is not decoded, by name.
    Unsupported(&'static str),
    /// Damage, described.
    Damaged(&'static str),
    /// The file ends before its audio does.
    Truncated,
}

use AudioStructureError::{Damaged, Truncated, UnknownFormat, Unsupported};

/// Reads a WAV, FLAC, MP3, Ogg Vorbis or Ogg Opus file to the end of its audio.
pub fn read_structure(bytes: &[u8]) -> Result<AudioStructure, AudioStructureError> {
    let start = id3_length(bytes)?;
    let body = &bytes[start..];
    let structure = if body.starts_with(b"RIFF") && body.get(8..12) == Some(b"WAVE") {
        read_wav(body)
    } else if body.starts_with(b"fLaC") {
        read_flac(body)
    } else if body.starts_with(b"OggS") {
        read_ogg(body)
    } else if let Some(format) = unsupported_format(body) {
        Err(Unsupported(format))
    } else {
        read_mp3(body)
    }?;
    let body = structure.body.start + start..structure.body.end + start;
    Ok(AudioStructure { body, ..structure })
}

/// Returns the name of a format that is recognized but not decoded.
fn unsupported_format(bytes: &[u8]) -> Option<&'static str> {
    let has = |offset: usize, magic: &[u8]| bytes.get(offset..offset + magic.len()) == Some(magic);
    let formats = [
        (has(4, b"ftyp"), "an MP4, M4A or MOV container"),
        (has(0, b"\x1A\x45\xDF\xA3"), "a Matroska or WebM container"),
        (has(0, b"FORM") && (has(8, b"AIFF") || has(8, b"AIFC")), "AIFF"),
        (has(0, b"RF64") || has(0, b"RIFX"), "a WAV variant (RF64, RIFX)"),
        (has(0, b"RIFF") && has(8, b"AVI "), "an AVI container"),
        (has(0, b"\x30\x26\xB2\x75\x8E\x66\xCF\x11"), "Windows Media"),
        (matches!(bytes, [0xFF, second, ..] if second & 0xF6 == 0xF0), "AAC"),
    ];
    formats.into_iter().find(|(is_format, _)| *is_format).map(|(_, name)| name)
}

/// Returns the length of an ID3v2 tag at the start, 0 where there is none.
fn id3_length(bytes: &[u8]) -> Result<usize, AudioStructureError> {
    if !bytes.starts_with(b"ID3") {
        return Ok(0);
    }
    let header = bytes.get(..10).ok_or(Truncated)?;
    let length = header[6..].iter().fold(0, |sum, byte| sum << 7 | usize::from(byte & 0x7F));
    let footer = if header[5] & 0x10 == 0 { 0 } else { 10 };
    let end = 10 + length + footer;
    if end < bytes.len() { Ok(end) } else { Err(Truncated) }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from(u16::from_le_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?)))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

/// Reads the chunks to the end of `data`. A length of 2³² − 1 means "to the end of the file": a writer that cannot seek
/// does not know the length.
fn read_wav(bytes: &[u8]) -> Result<AudioStructure, AudioStructureError> {
    let mut offset = 12;
    let mut format = None;
    loop {
        let name = bytes.get(offset..offset + 4).ok_or(Truncated)?;
        let length = u32_at(bytes, offset + 4).ok_or(Truncated)?;
        let rest = bytes.len() - (offset + 8);
        let length = if name == b"data" && length == u32::MAX { rest } else { length as usize };
        if length > rest {
            return Err(Truncated);
        }
        let end = offset + 8 + length;
        match name {
            b"fmt " => format = Some(read_wav_format(&bytes[offset + 8..end])?),
            b"data" => {
                let format = format.ok_or(Damaged("its data come before their format"))?;
                let header = AudioHeader {
                    format: AudioFormat::Wav,
                    sample_rate: format.sample_rate,
                    channels: format.channels,
                    samples: length as u64 / u64::from(format.frame_bytes),
                };
                return Ok(AudioStructure { header, body: 0..end });
            }
            _ => {}
        }
        offset = end + length % 2;
    }
}

/// The format chunk of a WAV.
struct WavFormat {
    sample_rate: u32,
    channels: u32,
    /// Bytes of one sample of all channels.
    frame_bytes: u32,
}

fn read_wav_format(chunk: &[u8]) -> Result<WavFormat, AudioStructureError> {
    const EXTENSIBLE: u32 = 0xFFFE;
    let too_short = Damaged("its format chunk is too short");
    let word = |offset| u16_at(chunk, offset).ok_or(too_short);
    let channels = word(2)?;
    let sample_rate = u32_at(chunk, 4).ok_or(too_short)?;
    let frame_bytes = word(12)?;
    let bits = word(14)?;
    // In an extensible format the codec is the first word of a GUID.
    let codec = match word(0)? {
        EXTENSIBLE => word(24)?,
        codec => codec,
    };
    // PCM, floats, A-law, mu-law.
    if ![1, 3, 6, 7].contains(&codec) {
        return Err(Unsupported("a WAV of compressed samples"));
    }
    if frame_bytes == 0 || frame_bytes != channels * bits.div_ceil(8) {
        return Err(Damaged("its samples have no whole number of bytes"));
    }
    Ok(WavFormat { sample_rate, channels, frame_bytes })
}

/// Reads the metadata blocks. The length of a frame is known only to a decoder, which then compares the number of
/// samples and their digest with the first block.
fn read_flac(bytes: &[u8]) -> Result<AudioStructure, AudioStructureError> {
    let mut offset = 4;
    let mut header = None;
    loop {
        let block_header = bytes.get(offset..offset + 4).ok_or(Truncated)?;
        let [kind, length @ ..] = [block_header[0], block_header[1], block_header[2], block_header[3]];
        let length = length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        let block = bytes.get(offset + 4..offset + 4 + length).ok_or(Truncated)?;
        if kind & 0x7F == 0 {
            let fields = block.get(10..18).and_then(|eight| eight.try_into().ok());
            let fields = u64::from_be_bytes(fields.ok_or(Damaged("its first block is too short"))?);
            header = Some(AudioHeader {
                format: AudioFormat::Flac,
                sample_rate: (fields >> 44) as u32,
                channels: (fields >> 41 & 7) as u32 + 1,
                samples: fields & ((1 << 36) - 1),
            });
        }
        offset += 4 + length;
        if kind & 0x80 != 0 {
            break;
        }
    }
    let header = header.ok_or(Damaged("it has no stream information"))?;
    if offset < bytes.len() { Ok(AudioStructure { header, body: 0..bytes.len() }) } else { Err(Truncated) }
}

/// The logical stream of an Ogg file.
struct OggStream {
    serial: u32,
    header: AudioHeader,
    /// Samples before the start of the audio.
    skipped: u64,
}

/// Reads the pages to the one that ends the stream, and verifies the checksum of each (RFC 3533).
fn read_ogg(bytes: &[u8]) -> Result<AudioStructure, AudioStructureError> {
    let mut offset = 0;
    let mut first: Option<OggStream> = None;
    while offset < bytes.len() {
        let head = bytes.get(offset..offset + 27).ok_or(Truncated)?;
        if !head.starts_with(b"OggS") {
            return Err(Damaged("a page does not follow another"));
        }
        let table = bytes.get(offset + 27..offset + 27 + usize::from(head[26])).ok_or(Truncated)?;
        let start = offset + 27 + table.len();
        let end = start + table.iter().map(|&length| usize::from(length)).sum::<usize>();
        let page = bytes.get(start..end).ok_or(Truncated)?;
        let checksum = u32_at(head, 22).expect("27 bytes");
        if ogg_crc([&head[..22], &[0; 4], &head[26..], table, page]) != checksum {
            return Err(Damaged("the checksum of a page is wrong"));
        }
        let serial = u32_at(head, 14).expect("27 bytes");
        let granule = i64::from_le_bytes(head[6..14].try_into().expect("eight bytes"));
        let stream = match &mut first {
            None => first.insert(read_first_packet(page, serial)?),
            Some(stream) if stream.serial == serial => stream,
            Some(_) => return Err(Unsupported("an Ogg file of several streams")),
        };
        let samples = (granule.max(0) as u64).saturating_sub(stream.skipped);
        stream.header.samples = stream.header.samples.max(samples);
        offset = end;
        let is_last = head[5] & 4 != 0;
        if is_last && offset < bytes.len() {
            return Err(Unsupported("an Ogg file of several streams"));
        }
        if is_last {
            return Ok(AudioStructure { header: stream.header, body: 0..offset });
        }
    }
    Err(Truncated)
}

/// Reads the first packet of a stream, which is a page of its own.
fn read_first_packet(packet: &[u8], serial: u32) -> Result<OggStream, AudioStructureError> {
    let too_short = Damaged("its first packet is too short");
    let header =
        |format, sample_rate, channels: u8| AudioHeader { format, sample_rate, channels: channels.into(), samples: 0 };
    if packet.starts_with(b"OpusHead") {
        let channels = packet.get(9).copied().ok_or(too_short)?;
        let skipped = u16_at(packet, 10).ok_or(too_short)?;
        // Opus is decoded at 48 kHz, whatever the rate of its input was (RFC 7845, section 5.1).
        return Ok(OggStream { serial, header: header(AudioFormat::Opus, 48_000, channels), skipped: skipped.into() });
    }
    if !packet.starts_with(b"\x01vorbis") {
        return Err(Unsupported("an Ogg file of another codec than Vorbis and Opus"));
    }
    let channels = packet.get(11).copied().ok_or(too_short)?;
    let sample_rate = u32_at(packet, 12).ok_or(too_short)?;
    Ok(OggStream { serial, header: header(AudioFormat::Vorbis, sample_rate, channels), skipped: 0 })
}

/// Computes Ogg's CRC-32: polynomial 0x04C11DB7, not reflected, initial value 0.
fn ogg_crc(parts: [&[u8]; 5]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = (index as u32) << 24;
            let mut bit = 0;
            while bit < 8 {
                value = (value << 1) ^ if value >> 31 == 1 { 0x04C1_1DB7 } else { 0 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    let update = |crc: u32, byte: &u8| (crc << 8) ^ TABLE[((crc >> 24) as u8 ^ byte) as usize];
    parts.into_iter().flatten().fold(0, update)
}

/// A frame of an MP3.
struct Mp3Frame {
    /// Bytes.
    length: usize,
    samples: u64,
    sample_rate: u32,
    channels: u32,
}

/// Reads a frame's header (ISO/IEC 11172-3, 2.4.2.3, and 13818-3 for lower sample rates); none where there is no frame
/// of layer III.
fn read_mp3_frame(bytes: &[u8]) -> Option<Mp3Frame> {
    const KBITS: [[usize; 15]; 2] = [
        [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320],
        [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160],
    ];
    let &[first, second, third, fourth] = bytes.get(..4)? else { return None };
    let version = second >> 3 & 3;
    let layer = second >> 1 & 3;
    if first != 0xFF || second >> 5 != 7 || version == 1 || layer != 1 {
        return None;
    }
    let is_low_rate = usize::from(version != 3);
    let kbits = KBITS[is_low_rate].get(usize::from(third >> 4)).copied().filter(|&kbits| kbits > 0)?;
    let sample_rate = *[44_100, 48_000, 32_000].get(usize::from(third >> 2 & 3))?;
    let sample_rate = sample_rate >> [2, 0, 1, 0][usize::from(version)];
    let samples = 1152 >> is_low_rate;
    let padding = usize::from(third >> 1 & 1);
    let length = samples / 8 * (1000 * kbits) / sample_rate + padding;
    let channels = if fourth >> 6 == 3 { 1 } else { 2 };
    Some(Mp3Frame { length, samples: samples as u64, sample_rate: sample_rate as u32, channels })
}

/// Returns the number of frames after the first one according to its "Xing" or "Info" tag, which encoders write last.
fn tagged_frame_count(bytes: &[u8], first: &Mp3Frame) -> Option<u64> {
    // The tag follows the header, the checksum and the side information.
    let side_bytes = match (first.samples, first.channels) {
        (1152, 2) => 32,
        (1152, _) | (_, 2) => 17,
        _ => 9,
    };
    let checksum_bytes = if bytes[1] & 1 == 0 { 2 } else { 0 };
    let offset = 4 + checksum_bytes + side_bytes;
    let tag = bytes.get(offset..offset + 12).filter(|tag| tag.starts_with(b"Xing") || tag.starts_with(b"Info"))?;
    (tag[7] & 1 == 1).then(|| u64::from(u32::from_be_bytes([tag[8], tag[9], tag[10], tag[11]])))
}

/// Reads the frames to the last one, which only tags and zeros may follow.
fn read_mp3(bytes: &[u8]) -> Result<AudioStructure, AudioStructureError> {
    let first = read_mp3_frame(bytes).ok_or(UnknownFormat)?;
    let mut samples = 0;
    let mut offset = 0;
    while let Some(frame) = read_mp3_frame(&bytes[offset..]) {
        if frame.sample_rate != first.sample_rate {
            return Err(Damaged("its sample rate changes within the file"));
        }
        offset += frame.length;
        if offset > bytes.len() {
            return Err(Truncated);
        }
        samples += frame.samples;
    }
    // Some encoders count the tag's own frame.
    if tagged_frame_count(bytes, &first).is_some_and(|frames| samples < frames * first.samples) {
        return Err(Truncated);
    }
    if samples <= first.samples {
        // A single frame may be a coincidence.
        return Err(UnknownFormat);
    }
    let rest = &bytes[offset..];
    let tags: [&[u8]; 4] = [b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3"];
    let is_tag = tags.iter().any(|tag| rest.starts_with(tag));
    if is_tag || rest.iter().all(|&byte| byte == 0) {
        let Mp3Frame { sample_rate, channels, .. } = first;
        let header = AudioHeader { format: AudioFormat::Mp3, sample_rate, channels, samples };
        return Ok(AudioStructure { header, body: 0..offset });
    }
    Err(if rest.len() < 4 { Truncated } else { Damaged("a frame does not follow another") })
}
