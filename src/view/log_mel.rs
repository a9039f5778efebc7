//! Log-mel spectrograms of a batch of waveforms on the model's device: the formula of [`Filterbank`], which serves the
//! CPU. There is no kernel of our own: of the dozen operations before each step, the transform is cuFFT's.

use super::spectrogram::AudioView;
use crate::data::audio::filterbank::{Filterbank, FrameLayout, MIN_ENERGY, PRE_EMPHASIS};
use crate::error::Result;
use crate::grid::Grid;
use crate::op::sizes;
use tch::{Device, Kind, Tensor};

/// Maximum number of waveforms that are transformed at once: at ten seconds, 130 MB for each of a few tensors.
const MAX_WAVEFORMS: i64 = 32;

/// The log-mel transform of one view, on one device.
pub struct LogMel {
    layout: FrameLayout,
    /// Window of a frame's samples but the first, fp64 [L − 1].
    window: Tensor,
    /// fp32 [bins, mels].
    filters: Tensor,
    mean: f64,
    scale: f64,
}

impl LogMel {
    /// Makes the transform of `audio` on `device`.
    pub fn new(audio: &AudioView, grid: &Grid, device: Device) -> Result<LogMel> {
        let [.., mels] = grid.pixel_shape();
        let layout = FrameLayout::from_sample_rate(audio.sample_rate);
        let filters = Filterbank::new(audio.sample_rate, mels as usize).to_dense();
        Ok(LogMel {
            layout,
            window: Tensor::f_from_slice(&layout.window()[1..])?.f_to_device(device)?,
            filters: Tensor::f_from_slice(&filters)?.f_view([-1, mels])?.f_to_device(device)?,
            mean: audio.mean,
            scale: audio.scale(),
        })
    }

    /// Transforms waveforms fp32 [B, 1, 1, 1, S], NaN after the end of the audio, to normalized spectrograms fp32
    /// [B, 1, 1, Y, X]. A frame that the audio does not fill is padding.
    pub fn forward(&self, samples: &Tensor) -> Result<Tensor> {
        let chunks = samples.f_split(MAX_WAVEFORMS, 0)?;
        let spectrograms = chunks.iter().map(|chunk| self.forward_chunk(chunk)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&spectrograms, 0)?)
    }

    fn forward_chunk(&self, samples: &Tensor) -> Result<Tensor> {
        let [batch, .., count] = sizes::<5>(samples);
        let length = self.layout.length as i64;
        let shift = self.layout.shift as i64;
        let frames = samples.f_view([batch, count])?.f_unfold(1, length, shift)?; // [B, Y, L]
        let padding = frames.f_select(2, length - 1)?.f_isnan()?.f_unsqueeze(-1)?;
        // fp64, because a filter far below the loudest one would hold only rounding errors in fp32.
        let frames = frames.f_to_kind(Kind::Double)?;
        let frames = &frames - frames.f_mean_dim(2, true, Kind::Double)?;
        // Drops the first sample, where the window is 0: this changes all phases and no power.
        let previous = frames.narrow(2, 0, length - 1);
        let current = frames.narrow(2, 1, length - 1);
        let frames = (current - previous * f64::from(PRE_EMPHASIS)) * &self.window;
        let bins = self.filters.size()[0];
        let spectrum = frames.f_fft_rfft(2 * bins, -1, "backward")?.f_narrow(2, 0, bins)?.f_view_as_real()?;
        let power = spectrum.f_square()?.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
        let log = power.f_matmul(&self.filters)?.f_clamp_min(f64::from(MIN_ENERGY))?.f_log()?;
        let values = log.f_masked_fill(&padding, 0.0)?;
        Ok(((values - self.mean) * self.scale).f_unsqueeze(1)?.f_unsqueeze(1)?)
    }
}
