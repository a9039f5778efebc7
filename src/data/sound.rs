//! Bytes of a member become sound: WAV, FLAC, MP3, Ogg Vorbis and Ogg Opus, told apart by their first bytes, as one channel
//! of samples in −1..1 (the mean of all channels).
//!
//! The structure of a file is walked before its decoder sees it (`whole.rs`): what was cut, is too large or belongs to
//! another program is refused there. Symphonia decodes; what it finds damaged is Code::Corrupt, and so is a file on
//! which it panics. It has no Opus, which `occlude-decode` decodes, as it does videos.

mod whole; // does a file hold all of its sound, and what does it say of it
mod stream; // packets become samples
pub mod resample; // from one rate to another
pub mod filterbank; // samples become a spectrogram
pub mod wav; // one channel of samples as a WAV file

use super::clip::{self, Videos};
use crate::fault::{Code, Fault, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use whole::{Lack, Whole, whole};

/// A format of sounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Wav,
    Flac,
    Mp3,
    Vorbis,
    Opus,
}

impl Format {
    /// In members' names.
    pub fn extension(self) -> &'static str {
        match self {
            Format::Wav => "wav",
            Format::Flac => "flac",
            Format::Mp3 => "mp3",
            Format::Vorbis => "ogg",
            Format::Opus => "opus",
        }
    }
}

/// What a file says of its sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub format: Format,
    /// Samples a second.
    pub rate: u32,
    pub channels: u32,
    /// Samples of each channel. An MP3 counts whole frames, its encoder's padding among them; a FLAC may say 0 where
    /// its encoder did not know.
    pub samples: u64,
}

impl Header {
    pub fn seconds(&self) -> f64 {
        self.samples as f64 / f64::from(self.rate)
    }
}

/// What a sound may cost; all inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file.
    pub max_bytes: usize,
    pub max_channels: u32,
    /// Samples a second, least and greatest.
    pub rate: [u32; 2],
    /// Samples of one channel; each takes four bytes once decoded.
    pub max_samples: u64,
}

impl Default for Limits {
    /// 256 MiB, 32 channels, 1 to 384 kHz, 2²⁶ samples: 70 minutes at 16 kHz, 23 at 48 kHz.
    fn default() -> Self {
        Limits { max_bytes: 256 << 20, max_channels: 32, rate: [1000, 384_000], max_samples: 1 << 26 }
    }
}

/// One decoded sound.
#[derive(Clone, Copy, Debug)]
pub struct Clip<'a> {
    /// Samples a second.
    pub rate: u32,
    /// In −1..1, or beyond where the file is of floats; all finite.
    pub samples: &'a [f32],
}

/// Decodes sounds one after another; one for each thread. It keeps its buffers, but for those that a single long
/// sound needed.
pub struct Decoder {
    limits: Limits,
    /// Samples of one packet, channels interleaved.
    packet: Vec<f32>,
    samples: Vec<f32>,
    /// For Opus alone.
    child: Videos,
}

impl Decoder {
    /// Samples that are kept room for between sounds: 16 MiB.
    const KEPT: usize = 4 << 20;

    pub fn new(limits: Limits) -> Decoder {
        let child = Videos::new(clip::Limits::default());
        Decoder { limits, packet: Vec::new(), samples: Vec::new(), child }
    }

    /// Faults with Code::Corrupt on anything that is not a whole sound within the limits, and with Code::Usage where the program
    /// that decodes Opus is not there.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Clip<'_>> {
        let whole = checked(bytes, &self.limits)?;
        self.samples.clear();
        self.samples.shrink_to(Self::KEPT);
        let Decoder { limits, packet, samples, child } = self;
        if whole.header.format == Format::Opus {
            child.sound(bytes, whole.header.samples, samples)?.map_err(corrupt)?;
        } else {
            // A defect in a decoder costs one sample, not the training.
            let read = AssertUnwindSafe(|| stream::read(bytes, &whole, limits.max_samples, packet, samples));
            catch_unwind(read).unwrap_or_else(|_| Err(corrupt("its decoder panicked")))?;
        }
        check(&whole.header, samples)?;
        Ok(Clip { rate: whole.header.rate, samples: &self.samples })
    }
}

/// Reads the structure alone, once it is whole and within the limits: no sample is decoded. Of a FLAC or an MP3 it sees
/// less of the damage than decoding does. Faults with Code::Corrupt.
pub fn probe(bytes: &[u8], limits: &Limits) -> Result<Header> {
    checked(bytes, limits).map(|whole| whole.header)
}

fn checked(bytes: &[u8], limits: &Limits) -> Result<Whole> {
    if bytes.len() > limits.max_bytes {
        return Err(corrupt(format!("{} bytes, the limit is {}", bytes.len(), limits.max_bytes)));
    }
    let whole = whole(bytes).map_err(|lack| match lack {
        Lack::Format => corrupt("neither WAV, FLAC, MP3, Ogg Vorbis nor Ogg Opus"),
        Lack::Other(what) => corrupt(format!(
            "it is {what}, which this program does not decode; convert it to WAV, FLAC, MP3, Ogg Vorbis or Ogg Opus"
        )),
        Lack::Damage(what) => corrupt(what),
        Lack::End => corrupt("the file was cut before the end of the sound"),
    })?;
    let Header { rate, channels, samples, .. } = whole.header;
    if !(limits.rate[0]..=limits.rate[1]).contains(&rate) {
        let [least, most] = limits.rate;
        return Err(corrupt(format!("{rate} samples a second; it must be {least} to {most}")));
    }
    if channels == 0 || channels > limits.max_channels {
        return Err(corrupt(format!("{channels} channels, it may have {}", limits.max_channels)));
    }
    if samples > limits.max_samples {
        return Err(long(samples, limits.max_samples));
    }
    Ok(whole)
}

/// As many samples as the file says, all of them numbers.
fn check(header: &Header, samples: &[f32]) -> Result<()> {
    let got = samples.len() as u64;
    let exact = matches!(header.format, Format::Wav | Format::Flac | Format::Opus) && header.samples > 0;
    if got == 0 || exact && got != header.samples {
        return Err(corrupt(format!("{got} samples can be decoded, it says that it has {}", header.samples)));
    }
    if !samples.iter().all(|sample| sample.is_finite()) {
        return Err(corrupt("it holds samples that are not finite"));
    }
    Ok(())
}

fn long(samples: u64, limit: u64) -> Fault {
    corrupt(format!("{samples} samples or more, the limit is {limit}; cut it into shorter sounds"))
}

fn corrupt(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Corrupt, format!("not a sound that can be decoded: {why}"))
}
