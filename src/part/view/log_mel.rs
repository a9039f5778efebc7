//! Spectrograms of a whole batch where a model computes, of views of sounds that stayed samples: the formula of
//! [`Filterbank`], which serves a CPU. There is no kernel: of the dozen operations that this takes ahead of a step, the
//! transform is cuFFT's.

use super::spectrogram::Sound;
use crate::data::sound::filterbank::{FLOOR, Filterbank, Frames, PRE_EMPHASIS};
use crate::fault::Result;
use crate::grid::Grid;
use crate::op::sizes;
use tch::{Device, Kind, Tensor};

/// Sounds that are transformed at a time: of ten seconds, 130 MB for each of a few tensors.
const SOUNDS: i64 = 32;

/// For one view, on one device.
pub struct LogMel {
    frames: Frames,
    /// Of all samples of a frame but the first, fp64 [L − 1].
    window: Tensor,
    /// fp32 [bins, mels].
    filters: Tensor,
    mean: f64,
    scale: f64,
}

impl LogMel {
    pub fn new(sound: &Sound, grid: &Grid, device: Device) -> Result<LogMel> {
        let [.., mels] = grid.pixels();
        let (frames, filters) = (Frames::at(sound.rate), Filterbank::new(sound.rate, mels as usize).dense());
        Ok(LogMel {
            frames,
            window: Tensor::f_from_slice(&frames.window()[1..])?.f_to_device(device)?,
            filters: Tensor::f_from_slice(&filters)?.f_view([-1, mels])?.f_to_device(device)?,
            mean: sound.mean,
            scale: sound.scale(),
        })
    }

    /// Samples fp32 [B, 1, 1, 1, S], no numbers behind a sound's end, → spectrograms, normalised, fp32 [B, 1, 1, Y, X].
    /// A frame that a sound does not fill is padding.
    pub fn of(&self, samples: &Tensor) -> Result<Tensor> {
        let parts = samples.f_split(SOUNDS, 0)?;
        let made = parts.iter().map(|part| self.part(part)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&made, 0)?)
    }

    fn part(&self, samples: &Tensor) -> Result<Tensor> {
        let [batch, .., count] = sizes::<5>(samples);
        let [length, shift] = [self.frames.length, self.frames.shift].map(|samples| samples as i64);
        let frames = samples.f_view([batch, count])?.f_unfold(1, length, shift)?; // [B, Y, L]
        let padding = frames.f_select(2, length - 1)?.f_isnan()?.f_unsqueeze(-1)?;
        // In fp64: what a filter far below the loudest one holds would be mere rounding.
        let frames = frames.f_to_kind(Kind::Double)?;
        let frames = &frames - frames.f_mean_dim(2, true, Kind::Double)?;
        // The window is 0 at the first sample; without it all phases turn, and no power changes.
        let [before, now] = [0, 1].map(|first| frames.narrow(2, first, length - 1));
        let frames = (now - before * f64::from(PRE_EMPHASIS)) * &self.window;
        let bins = self.filters.size()[0];
        let spectrum = frames.f_fft_rfft(2 * bins, -1, "backward")?.f_narrow(2, 0, bins)?.f_view_as_real()?;
        let power = spectrum.f_square()?.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
        let log = power.f_matmul(&self.filters)?.f_clamp_min(f64::from(FLOOR))?.f_log()?;
        let shown = log.f_masked_fill(&padding, 0.0)?;
        Ok(((shown - self.mean) * self.scale).f_unsqueeze(1)?.f_unsqueeze(1)?)
    }
}
