//! One sound becomes a sample's member: decoded whole, so that what cannot be heard is left out, and where asked for
//! brought to a rate.

use super::super::sound::resample::Resampler;
use super::super::sound::{Decoder, Limits, probe, wav};
use super::source::Picture;
use crate::fault::Result;

/// Shapes sounds one after another; one for each thread.
pub struct Voice {
    decoder: Decoder,
    limits: Limits,
    resampler: Resampler,
    rate: Option<u32>,
}

impl Voice {
    pub fn new(rate: Option<u32>) -> Voice {
        let limits = Limits::default();
        Voice { decoder: Decoder::new(limits), limits, resampler: Resampler::default(), rate }
    }

    /// Of a file.
    pub fn most_bytes(&self) -> usize {
        self.limits.max_bytes
    }

    /// The sound's bytes and their extension: untouched, or a WAV of 16 bits and one channel at the rate.
    pub fn encoded(&mut self, sound: &Picture, bytes: Vec<u8>) -> Result<(&'static str, Vec<u8>)> {
        let clip = self.decoder.decode(&bytes)?;
        match self.rate {
            Some(rate) => {
                let samples = self.resampler.resample(clip.samples, [clip.rate, rate])?;
                Ok(("wav", wav::encode(rate, samples)))
            }
            None => {
                let extension = probe(&bytes, &self.limits)?.format.extension();
                Ok((sound.extension.unwrap_or(extension), bytes))
            }
        }
    }
}
