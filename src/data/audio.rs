//! Decodes a member's bytes to audio: WAV, FLAC, MP3, Ogg Vorbis and Ogg Opus, distinguished by their first bytes,
//! mixed down to one channel (the mean of all channels) of samples in −1..1.
//!
//! The structure of a file is read before a decoder sees it (`structure.rs`), so that truncated, oversized and
//! unsupported files are refused first. Symphonia decodes; damage that it finds, or on which it panics, is
//! ExitCode::Corrupt. It has no Opus, which `occlude-decode` decodes, as it does videos.

mod structure; // finds the end of the audio, and reads the header
mod stream; // decodes packets with Symphonia
pub mod resample; // from one sample rate to another
pub mod filterbank; // samples → log-mel spectrogram
pub mod wav; // writes WAV

use super::video::{VideoDecoder, VideoLimits};
use crate::error::{Error, ExitCode, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use structure::{AudioStructure, AudioStructureError, read_structure};

/// A format of audio files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AudioFormat {
    Wav,
    Flac,
    Mp3,
    Vorbis,
    Opus,
}

impl AudioFormat {
    /// Returns the extension of members in this format.
    pub fn extension(self) -> &'static str {
        match self {
            AudioFormat::Wav => "wav",
            AudioFormat::Flac => "flac",
            AudioFormat::Mp3 => "mp3",
            AudioFormat::Vorbis => "ogg",
            AudioFormat::Opus => "opus",
        }
    }
}

/// The header of an audio file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AudioHeader {
    pub format: AudioFormat,
    /// Hz.
    pub sample_rate: u32,
    pub channels: u32,
    /// Samples per channel. For MP3 the samples of all frames, including the encoder's padding; a FLAC may give 0 where
    /// its encoder did not know.
    pub samples: u64,
}

impl AudioHeader {
    /// Returns the duration in seconds.
    pub fn seconds(&self) -> f64 {
        self.samples as f64 / f64::from(self.sample_rate)
    }
}

/// Limits of an audio file; all inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AudioLimits {
    /// Bytes of the file.
    pub max_bytes: usize,
    pub max_channels: u32,
    /// Minimum and maximum sample rate, Hz.
    pub sample_rate: [u32; 2],
    /// Samples per channel; each takes four bytes once decoded.
    pub max_samples: u64,
}

impl Default for AudioLimits {
    /// 256 MiB, 32 channels, 1 to 384 kHz, 2²⁶ samples: 70 minutes at 16 kHz, 23 at 48 kHz.
    fn default() -> Self {
        AudioLimits { max_bytes: 256 << 20, max_channels: 32, sample_rate: [1000, 384_000], max_samples: 1 << 26 }
    }
}

/// Decoded audio of one channel.
#[derive(Clone, Copy, Debug)]
pub struct Waveform<'a> {
    /// Hz.
    pub sample_rate: u32,
    /// In −1..1, or beyond where the file holds floats; all finite.
    pub samples: &'a [f32],
}

/// A decoder of audio files; one per thread. It reuses its buffers, except for room that only an unusually long file
/// needed.
pub struct AudioDecoder {
    limits: AudioLimits,
    /// Samples of one packet, channels interleaved.
    packet: Vec<f32>,
    samples: Vec<f32>,
    /// For Opus.
    opus: VideoDecoder,
}

impl AudioDecoder {
    /// Maximum capacity that is kept between files, in samples: 16 MiB.
    const MAX_KEPT_SAMPLES: usize = 4 << 20;

    /// Makes a decoder.
    pub fn new(limits: AudioLimits) -> AudioDecoder {
        let opus = VideoDecoder::new(VideoLimits::default());
        AudioDecoder { limits, packet: Vec::new(), samples: Vec::new(), opus }
    }

    /// Decodes a file.
    ///
    /// # Errors
    /// ExitCode::Corrupt for a file that is truncated, damaged or beyond the limits, and ExitCode::Usage where the
    /// program that decodes Opus is missing.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Waveform<'_>> {
        let structure = checked_structure(bytes, &self.limits)?;
        let header = structure.header;
        self.samples.clear();
        self.samples.shrink_to(Self::MAX_KEPT_SAMPLES);
        let AudioDecoder { limits, packet, samples, opus } = self;
        if header.format == AudioFormat::Opus {
            opus.decode_opus(bytes, header.samples, samples)?.map_err(corrupt_audio)?;
        } else {
            // A panic in a decoder costs one sample, not the training.
            let decode = AssertUnwindSafe(|| stream::decode(bytes, &structure, limits.max_samples, packet, samples));
            catch_unwind(decode).unwrap_or_else(|_| Err(corrupt_audio("its decoder panicked")))?;
        }
        check_samples(&header, samples)?;
        Ok(Waveform { sample_rate: header.sample_rate, samples: &self.samples })
    }
}

/// Reads the header of a file without decoding samples, once its structure is complete and within the limits. Damage
/// inside a FLAC or an MP3 is mostly found only by decoding.
///
/// # Errors
/// ExitCode::Corrupt.
pub fn probe(bytes: &[u8], limits: &AudioLimits) -> Result<AudioHeader> {
    checked_structure(bytes, limits).map(|structure| structure.header)
}

fn checked_structure(bytes: &[u8], limits: &AudioLimits) -> Result<AudioStructure> {
    if bytes.len() > limits.max_bytes {
        return Err(corrupt_audio(format!("{} bytes, the limit is {}", bytes.len(), limits.max_bytes)));
    }
    let structure = read_structure(bytes).map_err(|error| match error {
        AudioStructureError::UnknownFormat => corrupt_audio("neither WAV, FLAC, MP3, Ogg Vorbis nor Ogg Opus"),
        AudioStructureError::Unsupported(format) => corrupt_audio(format!(
            "it is {format}, which this program does not decode; convert it to WAV, FLAC, MP3, Ogg Vorbis or Ogg Opus"
        )),
        AudioStructureError::Damaged(reason) => corrupt_audio(reason),
        AudioStructureError::Truncated => corrupt_audio("the file is truncated"),
    })?;
    let AudioHeader { sample_rate, channels, samples, .. } = structure.header;
    let [min_rate, max_rate] = limits.sample_rate;
    if !(min_rate..=max_rate).contains(&sample_rate) {
        return Err(corrupt_audio(format!("{sample_rate} samples a second; it must be {min_rate} to {max_rate}")));
    }
    if channels == 0 || channels > limits.max_channels {
        return Err(corrupt_audio(format!("{channels} channels, it may have {}", limits.max_channels)));
    }
    if samples > limits.max_samples {
        return Err(too_long(samples, limits.max_samples));
    }
    Ok(structure)
}

/// Checks decoded samples: their number is that of the header, and all are finite.
fn check_samples(header: &AudioHeader, samples: &[f32]) -> Result<()> {
    let count = samples.len() as u64;
    let is_exact_format = matches!(header.format, AudioFormat::Wav | AudioFormat::Flac | AudioFormat::Opus);
    let is_wrong_count = is_exact_format && header.samples > 0 && count != header.samples;
    if count == 0 || is_wrong_count {
        return Err(corrupt_audio(format!("{count} samples can be decoded, its header says {}", header.samples)));
    }
    if !samples.iter().all(|sample| sample.is_finite()) {
        return Err(corrupt_audio("it holds samples that are not finite"));
    }
    Ok(())
}

fn too_long(samples: u64, limit: u64) -> Error {
    corrupt_audio(format!("{samples} samples or more, the limit is {limit}; split it into shorter files"))
}

fn corrupt_audio(reason: impl std::fmt::Display) -> Error {
    Error::new(ExitCode::Corrupt, format!("not audio that can be decoded: {reason}"))
}
