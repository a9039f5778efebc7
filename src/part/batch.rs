//! Samples on their way through a model.

use crate::fault::{Fault, Result};
use crate::op::shuffle::Origin;
use crate::part::view::log_mel::LogMel;
use std::ops::Range;
use tch::Tensor;

/// Those that go through it at a time, on one rank.
#[derive(Debug)]
pub struct Batch {
    /// uint8 as decoded, or fp32 already normalised: [B, C, T, Y, X]. Before [`Batch::heard`], sounds may be fp32 samples
    /// [B, 1, 1, 1, S].
    pub pixels: Tensor,
    /// Where each sample's randomness comes from, int64 [3, B] beside the pixels (see [`Origin::table`]).
    pub origins: Tensor,
    /// Token ids of the samples' captions, int64 [B, L] beside the pixels, where the config reads captions.
    pub text: Option<Tensor>,
    /// Of each sample, how many of its Y rows show it, where the feed says so; the rest is padding.
    pub valid: Option<Vec<u32>>,
    /// The run's seed.
    pub seed: u64,
}

impl Batch {
    /// Without captions; nothing is padding. The samples' origins are copied to where their pixels are.
    pub fn new(pixels: Tensor, origins: &[Origin], seed: u64) -> Batch {
        Batch { origins: Origin::table(origins, pixels.device()), pixels, text: None, valid: None, seed }
    }

    /// With as many rows of each sample to read.
    pub fn with_valid(self, valid: Option<Vec<u32>>) -> Batch {
        Batch { valid, ..self }
    }

    /// With these captions, if any.
    pub fn with_text(self, text: Option<Tensor>) -> Batch {
        Batch { text, ..self }
    }

    /// With spectrograms where `log_mel` makes some of the samples of sounds; else the same.
    pub fn heard(&self, log_mel: Option<&LogMel>) -> Result<Batch> {
        let all = self.part(0..self.pixels.size()[0] as usize)?;
        Ok(match log_mel {
            Some(log_mel) => Batch { pixels: log_mel.of(&all.pixels)?, ..all },
            None => all,
        })
    }

    /// Some of the samples, as views.
    pub fn part(&self, rows: Range<usize>) -> Result<Batch> {
        let (first, size) = (rows.start as i64, rows.len() as i64);
        Ok(Batch {
            pixels: self.pixels.f_narrow(0, first, size)?,
            origins: self.origins.f_narrow(1, first, size)?,
            text: self.text.as_ref().map(|text| text.f_narrow(0, first, size)).transpose()?,
            valid: self.valid.as_ref().map(|valid| valid[rows].to_vec()),
            seed: self.seed,
        })
    }

    /// The captions, of a method that reads them.
    pub fn captions(&self) -> Result<&Tensor> {
        self.text.as_ref().ok_or_else(|| Fault::failed("a batch without captions came to a method that reads them"))
    }
}
