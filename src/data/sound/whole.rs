//! Does a file hold all of its sound? Decoders forgive what was cut: they give what is there. The end is therefore
//! looked for in the structure of the file before anything is decoded, and what the sound will cost is read on the way.

use super::{Format, Header};
use std::ops::Range;

/// The structure of a file that reaches the end of its sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    pub header: Header,
    /// The bytes that a decoder wants: tags before and behind are left out.
    pub body: Range<usize>,
}

/// Why a file is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// It is none of the formats.
    Format,
    /// It is a format for another program.
    Other(&'static str),
    /// What is wrong inside.
    Damage(&'static str),
    /// It ends before its sound does.
    End,
}

/// Walks a WAV, FLAC, MP3, Ogg Vorbis or Ogg Opus file to the end of its sound.
pub fn whole(bytes: &[u8]) -> Result<Whole, Lack> {
    let start = tag(bytes)?;
    let body = &bytes[start..];
    let found = if body.starts_with(b"RIFF") && body.get(8..12) == Some(b"WAVE") {
        wav(body)
    } else if body.starts_with(b"fLaC") {
        flac(body)
    } else if body.starts_with(b"OggS") {
        ogg(body)
    } else if let Some(other) = other(body) {
        Err(Lack::Other(other))
    } else {
        mp3(body)
    }?;
    Ok(Whole { body: found.body.start + start..found.body.end + start, ..found })
}

/// Formats that are known by name only.
fn other(bytes: &[u8]) -> Option<&'static str> {
    let at = |from: usize, mark: &[u8]| bytes.get(from..from + mark.len()) == Some(mark);
    match () {
        () if at(4, b"ftyp") => Some("an MP4, M4A or MOV container"),
        () if at(0, b"\x1A\x45\xDF\xA3") => Some("a Matroska or WebM container"),
        () if at(0, b"FORM") && (at(8, b"AIFF") || at(8, b"AIFC")) => Some("AIFF"),
        () if at(0, b"RF64") || at(0, b"RIFX") => Some("a WAV variant (RF64, RIFX)"),
        () if at(0, b"RIFF") && at(8, b"AVI ") => Some("an AVI container"),
        () if at(0, b"\x30\x26\xB2\x75\x8E\x66\xCF\x11") => Some("Windows Media"),
        () if matches!(bytes, [0xFF, second, ..] if second & 0xF6 == 0xF0) => Some("AAC"),
        () => None,
    }
}

/// The length of an ID3v2 tag at the front, 0 where there is none.
fn tag(bytes: &[u8]) -> Result<usize, Lack> {
    if !bytes.starts_with(b"ID3") {
        return Ok(0);
    }
    let head = bytes.get(..10).ok_or(Lack::End)?;
    let length = head[6..].iter().fold(0, |sum, byte| sum << 7 | usize::from(byte & 0x7F));
    let footer = if head[5] & 0x10 == 0 { 0 } else { 10 };
    let end = 10 + length + footer;
    if end < bytes.len() { Ok(end) } else { Err(Lack::End) }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Walks the chunks to the end of `data`. A length of 2³² − 1 means "to the end of the file": whoever wrote it could
/// not go back.
fn wav(bytes: &[u8]) -> Result<Whole, Lack> {
    let mut at = 12;
    let mut format = None;
    loop {
        let (Some(name), Some(length)) = (bytes.get(at..at + 4), u32_at(bytes, at + 4)) else {
            return Err(Lack::End);
        };
        let rest = bytes.len() - (at + 8);
        let length = if name == b"data" && length == u32::MAX { rest } else { length as usize };
        if length > rest {
            return Err(Lack::End);
        }
        let chunk = &bytes[at + 8..at + 8 + length];
        match name {
            b"fmt " => format = Some(wav_format(chunk)?),
            b"data" => {
                let (rate, channels, frame) = format.ok_or(Lack::Damage("its data come before their format"))?;
                let header = Header { format: Format::Wav, rate, channels, samples: length as u64 / u64::from(frame) };
                return Ok(Whole { header, body: 0..at + 8 + length });
            }
            _ => {}
        }
        at += 8 + length + length % 2;
    }
}

/// Rate, channels and bytes of a sample of all channels.
fn wav_format(chunk: &[u8]) -> Result<(u32, u32, u32), Lack> {
    let short = Lack::Damage("its format chunk is too short");
    let word = |at| u16_at(chunk, at).ok_or(short);
    let (channels, rate, frame, bits) = (word(2)?, u32_at(chunk, 4).ok_or(short)?, word(12)?, word(14)?);
    let codec = match word(0)? {
        // Extensible: the codec stands in the first word of a GUID.
        0xFFFE => word(24)?,
        codec => codec,
    };
    // PCM, floats, A-law, mu-law.
    if ![1, 3, 6, 7].contains(&codec) {
        return Err(Lack::Other("a WAV of compressed samples"));
    }
    if frame == 0 || frame != channels * bits.div_ceil(8) {
        return Err(Lack::Damage("its samples are of no whole number of bytes"));
    }
    Ok((rate, channels, frame))
}

/// Walks the blocks of metadata. The frames behind them say how long they are only to a decoder, which then compares
/// their number and their digest with what the first block says.
fn flac(bytes: &[u8]) -> Result<Whole, Lack> {
    let mut at = 4;
    let mut header = None;
    loop {
        let head = bytes.get(at..at + 4).ok_or(Lack::End)?;
        let length = usize::from(head[1]) << 16 | usize::from(head[2]) << 8 | usize::from(head[3]);
        let block = bytes.get(at + 4..at + 4 + length).ok_or(Lack::End)?;
        if head[0] & 0x7F == 0 {
            let numbers = block.get(10..18).and_then(|eight| eight.try_into().ok());
            let packed = u64::from_be_bytes(numbers.ok_or(Lack::Damage("its first block is too short"))?);
            let (rate, channels) = ((packed >> 44) as u32, (packed >> 41 & 7) as u32 + 1);
            header = Some(Header { format: Format::Flac, rate, channels, samples: packed & ((1 << 36) - 1) });
        }
        at += 4 + length;
        if head[0] & 0x80 != 0 {
            break;
        }
    }
    let header = header.ok_or(Lack::Damage("it says nothing of its stream"))?;
    if at < bytes.len() { Ok(Whole { header, body: 0..bytes.len() }) } else { Err(Lack::End) }
}

/// Walks the pages to the one that ends the stream, each against its check sum (RFC 3533).
fn ogg(bytes: &[u8]) -> Result<Whole, Lack> {
    let mut at = 0;
    let mut stream: Option<(u32, Header, u64)> = None;
    while at < bytes.len() {
        let head = bytes.get(at..at + 27).ok_or(Lack::End)?;
        if !head.starts_with(b"OggS") {
            return Err(Lack::Damage("a page does not follow another"));
        }
        let table = bytes.get(at + 27..at + 27 + usize::from(head[26])).ok_or(Lack::End)?;
        let start = at + 27 + table.len();
        let end = start + table.iter().map(|&length| usize::from(length)).sum::<usize>();
        let page = bytes.get(start..end).ok_or(Lack::End)?;
        let sum = u32_at(head, 22).expect("27 bytes");
        if crc([&head[..22], &[0; 4], &head[26..], table, page]) != sum {
            return Err(Lack::Damage("a page's check sum is wrong"));
        }
        let serial = u32_at(head, 14).expect("27 bytes");
        let granule = i64::from_le_bytes(head[6..14].try_into().expect("eight bytes"));
        let (_, header, skipped) = match &mut stream {
            None => {
                let (header, skipped) = codec(page)?;
                stream.insert((serial, header, skipped))
            }
            Some(stream) if stream.0 == serial => stream,
            Some(_) => return Err(Lack::Other("an Ogg file of several streams")),
        };
        header.samples = header.samples.max((granule.max(0) as u64).saturating_sub(*skipped));
        at = end;
        if head[5] & 4 != 0 {
            let header = *header;
            return match at == bytes.len() {
                true => Ok(Whole { header, body: 0..at }),
                false => Err(Lack::Other("an Ogg file of several streams")),
            };
        }
    }
    Err(Lack::End)
}

/// The stream's first packet, which is a page of its own; and how many samples come before the sound.
fn codec(packet: &[u8]) -> Result<(Header, u64), Lack> {
    if packet.starts_with(b"OpusHead") {
        return opus(packet);
    }
    if !packet.starts_with(b"\x01vorbis") {
        return Err(Lack::Other("an Ogg file of another codec than Vorbis and Opus"));
    }
    let channels = packet.get(11).copied().ok_or(Lack::Damage("its first packet is too short"))?;
    let rate = u32_at(packet, 12).ok_or(Lack::Damage("its first packet is too short"))?;
    Ok((Header { format: Format::Vorbis, rate, channels: channels.into(), samples: 0 }, 0))
}

/// Whatever its rate was, Opus is decoded at 48 kHz (RFC 7845, section 5.1).
fn opus(packet: &[u8]) -> Result<(Header, u64), Lack> {
    let short = Lack::Damage("its first packet is too short");
    let (channels, skipped) = (packet.get(9).copied().ok_or(short)?, u16_at(packet, 10).ok_or(short)?);
    Ok((Header { format: Format::Opus, rate: 48_000, channels: channels.into(), samples: 0 }, skipped.into()))
}

/// CRC-32 of polynomial 0x04C11DB7, not reflected, from 0.
fn crc(parts: [&[u8]; 5]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            let mut value = (at as u32) << 24;
            let mut bit = 0;
            while bit < 8 {
                value = (value << 1) ^ if value >> 31 == 1 { 0x04C1_1DB7 } else { 0 };
                bit += 1;
            }
            table[at] = value;
            at += 1;
        }
        table
    };
    let next = |crc: u32, byte: &u8| (crc << 8) ^ TABLE[((crc >> 24) as u8 ^ byte) as usize];
    parts.into_iter().flatten().fold(0, next)
}

/// One frame of an MP3: its bytes, its samples, its rate and its channels.
struct Frame {
    length: usize,
    samples: u64,
    rate: u32,
    channels: u32,
}

/// Reads a frame's header (ISO/IEC 11172-3, 2.4.2.3, and 13818-3 for lower rates); none where there is no frame of
/// layer III.
fn frame(bytes: &[u8]) -> Option<Frame> {
    const KBITS: [[usize; 15]; 2] = [
        [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320],
        [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160],
    ];
    let &[first, second, third, fourth] = bytes.get(..4)? else { return None };
    let (version, layer) = (second >> 3 & 3, second >> 1 & 3);
    if first != 0xFF || second >> 5 != 7 || version == 1 || layer != 1 {
        return None;
    }
    let low = usize::from(version != 3);
    let bits = 1000 * KBITS[low].get(usize::from(third >> 4)).copied().filter(|&kbits| kbits > 0)?;
    let rate = *[44_100, 48_000, 32_000].get(usize::from(third >> 2 & 3))?;
    let rate = rate >> [2, 0, 1, 0][usize::from(version)];
    let samples = 1152 >> low;
    let length = samples / 8 * bits / rate + usize::from(third >> 1 & 1);
    let channels = if fourth >> 6 == 3 { 1 } else { 2 };
    Some(Frame { length, samples: samples as u64, rate: rate as u32, channels })
}

/// How many frames of sound the first frame says that follow it: the "Xing" or "Info" tag of encoders that went back
/// to write it.
fn announced(bytes: &[u8], first: &Frame) -> Option<u64> {
    // Behind the header, the check sum and the side information, which is as long as version and channels make it.
    let side = match (first.samples, first.channels) {
        (1152, 2) => 32,
        (1152, _) | (_, 2) => 17,
        _ => 9,
    };
    let at = 4 + if bytes[1] & 1 == 0 { 2 } else { 0 } + side;
    let tag = bytes.get(at..at + 12).filter(|tag| tag.starts_with(b"Xing") || tag.starts_with(b"Info"))?;
    (tag[7] & 1 == 1).then(|| u64::from(u32::from_be_bytes([tag[8], tag[9], tag[10], tag[11]])))
}

/// Walks the frames to the last one. Tags and zeros may stand behind it.
fn mp3(bytes: &[u8]) -> Result<Whole, Lack> {
    let first = frame(bytes).ok_or(Lack::Format)?;
    let mut header = Header { format: Format::Mp3, rate: first.rate, channels: first.channels, samples: 0 };
    let mut at = 0;
    while let Some(frame) = frame(&bytes[at..]) {
        if frame.rate != header.rate {
            return Err(Lack::Damage("its rate changes on the way"));
        }
        at += frame.length;
        if at > bytes.len() {
            return Err(Lack::End);
        }
        header.samples += frame.samples;
    }
    // Some encoders count the tag's own frame.
    if announced(bytes, &first).is_some_and(|frames| header.samples < frames * first.samples) {
        return Err(Lack::End);
    }
    let rest = &bytes[at..];
    let tags: [&[u8]; 4] = [b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3"];
    match rest.iter().all(|&byte| byte == 0) || tags.iter().any(|tag| rest.starts_with(tag)) {
        // Two frames in a row are no accident.
        true if header.samples > first.samples => Ok(Whole { header, body: 0..at }),
        true => Err(Lack::Format),
        false if header.samples > first.samples && rest.len() < 4 => Err(Lack::End),
        false if header.samples > first.samples => Err(Lack::Damage("a frame does not follow another")),
        false => Err(Lack::Format),
    }
}
