//! Sound from one rate to another, through rubato: block by block in the frequency domain, cut off below the lower of
//! the two Nyquist frequencies by a Blackman-Harris window squared.
//!
//! Tones below 0.8 of the lower Nyquist frequency come out exact to 1e-5. `torchaudio.functional.resample`, whose kernel
//! is six zero crossings wide, differs from them, and so from this, by 0.1 % up to half of that frequency and by 3 % at
//! 0.8 (`tests/sound.rs`). Close to the ends of a sound both take what is not there as silence.

use crate::fault::{Fault, Result};
use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler as _};

/// Samples of a block at the rate that a sound has, or some more: its transition is 1 to 2 % of the band.
const BLOCK: u32 = 1024;
/// Pairs of rates that are kept.
const KEPT: usize = 8;

/// Resamples sounds one after another; one for each thread. It keeps the filters of some pairs of rates.
#[derive(Default)]
pub struct Resampler {
    made: Vec<([u32; 2], Fft<f32>)>,
    out: Vec<f32>,
}

impl Resampler {
    /// `samples` at `from` a second as they are at `to` a second: ⌈samples · to / from⌉ of them, the first at the same
    /// moment.
    pub fn resample<'a>(&'a mut self, samples: &'a [f32], [from, to]: [u32; 2]) -> Result<&'a [f32]> {
        if from == to || samples.is_empty() {
            return Ok(samples);
        }
        let wrong = |error: &dyn std::fmt::Display| Fault::failed(format!("resampling {from} Hz to {to} Hz: {error}"));
        let at = match self.made.iter().position(|(rates, _)| *rates == [from, to]) {
            Some(at) => at,
            None => {
                self.made.truncate(KEPT - 1);
                let made = Fft::new_custom(
                    from as usize,
                    to as usize,
                    block(from, to),
                    1,
                    1,
                    rubato::WindowFunction::BlackmanHarris2,
                    FixedSync::Both,
                );
                self.made.insert(0, ([from, to], made.map_err(|error| wrong(&error))?));
                0
            }
        };
        let Resampler { made, out } = self;
        let resampler = &mut made[at].1;
        resampler.reset();
        let room = resampler.process_all_needed_output_len(samples.len());
        out.resize(room, 0.0);
        let given = InterleavedSlice::new(samples, 1, samples.len()).map_err(|error| wrong(&error))?;
        let mut taken = InterleavedSlice::new_mut(out, 1, room).map_err(|error| wrong(&error))?;
        let done = resampler.process_all_into_buffer(&given, &mut taken, samples.len(), None);
        let (_, length) = done.map_err(|error| wrong(&error))?;
        Ok(&self.out[..length])
    }
}

/// A whole even number of the shortest blocks that are whole at both rates: the filter of an odd block lies half a
/// sample beside its middle, and so would the sound.
fn block(from: u32, to: u32) -> usize {
    let gcd = |mut a: u32, mut b: u32| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let shortest = from / gcd(from, to);
    let count = BLOCK.div_ceil(shortest).next_multiple_of(2);
    (shortest * count) as usize
}
