//! Resampling of audio through rubato: block by block in the frequency domain, with a cut-off below the lower of the
//! two Nyquist frequencies by a squared Blackman-Harris window.
//!
//! Tones below 0.8 of the lower Nyquist frequency are exact to 1e-5. `torchaudio.functional.resample`, whose kernel is
//! six zero crossings wide, differs from them, and so from this module, by 0.1 % up to half of that frequency and by 3
//! % at 0.8 (`tests/data/audio.rs`). Both take the audio as silent beyond its ends.

use crate::error::{Error, Result};
use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler as _, WindowFunction};

/// Minimum samples of a block at the input rate: the filter's transition is 1 to 2 % of the band.
const MIN_BLOCK: u32 = 1024;
/// Maximum number of filters that are kept.
const MAX_FILTERS: usize = 8;

/// A resampler; one per thread. It keeps the filters of the last pairs of sample rates.
#[derive(Default)]
pub struct Resampler {
    filters: Vec<([u32; 2], Fft<f32>)>,
    out: Vec<f32>,
}

impl Resampler {
    /// Resamples from sample rate `from` to `to`: ⌈samples · to / from⌉ samples, the first at the same time.
    pub fn resample<'a>(&'a mut self, samples: &'a [f32], [from, to]: [u32; 2]) -> Result<&'a [f32]> {
        if from == to || samples.is_empty() {
            return Ok(samples);
        }
        let failed = |error: &dyn std::fmt::Display| Error::failed(format!("resampling {from} Hz to {to} Hz: {error}"));
        let index = match self.filters.iter().position(|(rates, _)| *rates == [from, to]) {
            Some(index) => index,
            None => {
                let filter = make_filter(from, to).map_err(|error| failed(&error))?;
                self.filters.truncate(MAX_FILTERS - 1);
                self.filters.insert(0, ([from, to], filter));
                0
            }
        };
        let Resampler { filters, out } = self;
        let filter = &mut filters[index].1;
        filter.reset();
        let capacity = filter.process_all_needed_output_len(samples.len());
        out.resize(capacity, 0.0);
        let input = InterleavedSlice::new(samples, 1, samples.len()).map_err(|error| failed(&error))?;
        let mut output = InterleavedSlice::new_mut(out, 1, capacity).map_err(|error| failed(&error))?;
        let lengths = filter.process_all_into_buffer(&input, &mut output, samples.len(), None);
        let (_, length) = lengths.map_err(|error| failed(&error))?;
        Ok(&self.out[..length])
    }
}

fn make_filter(from: u32, to: u32) -> Result<Fft<f32>, rubato::ResamplerConstructionError> {
    let window = WindowFunction::BlackmanHarris2;
    Fft::new_custom(from as usize, to as usize, block_length(from, to), 1, 1, window, FixedSync::Both)
}

/// Returns an even multiple of the shortest block that is whole at both rates: an odd block's filter, and so the audio,
/// would be shifted by half a sample.
fn block_length(from: u32, to: u32) -> usize {
    let shortest = from / gcd(from, to);
    let count = MIN_BLOCK.div_ceil(shortest).next_multiple_of(2);
    (shortest * count) as usize
}

fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}
