//! Packs one audio file: decodes all of it, so that corrupt files are skipped, and resamples it on request.

use super::super::audio::resample::Resampler;
use super::super::audio::{AudioDecoder, AudioLimits, probe, wav};
use super::source::SourceSample;
use crate::error::Result;

/// A packer of audio files; one per thread.
pub struct AudioPacker {
    decoder: AudioDecoder,
    limits: AudioLimits,
    resampler: Resampler,
    sample_rate: Option<u32>,
}

impl AudioPacker {
    /// Makes a packer that resamples to `sample_rate`, if given.
    pub fn new(sample_rate: Option<u32>) -> AudioPacker {
        let limits = AudioLimits::default();
        AudioPacker { decoder: AudioDecoder::new(limits), limits, resampler: Resampler::default(), sample_rate }
    }

    /// Returns the maximum bytes of a file.
    pub fn max_bytes(&self) -> usize {
        self.limits.max_bytes
    }

    /// Returns the extension and bytes of the member: the file's own, or a 16-bit WAV of one channel at the sample
    /// rate.
    pub fn encode(&mut self, sample: &SourceSample, bytes: Vec<u8>) -> Result<(&'static str, Vec<u8>)> {
        let waveform = self.decoder.decode(&bytes)?;
        if let Some(sample_rate) = self.sample_rate {
            let samples = self.resampler.resample(waveform.samples, [waveform.sample_rate, sample_rate])?;
            return Ok(("wav", wav::encode(sample_rate, samples)));
        }
        let format = probe(&bytes, &self.limits)?.format;
        Ok((sample.extension.unwrap_or(format.extension()), bytes))
    }
}
