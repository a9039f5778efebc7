//! Views of audio: a window as a normalized log-mel spectrogram, one row per frame, as in Audio-MAE (Huang et al.,
//! NeurIPS 2022, §4.2 and its `dataset.py`).

use crate::data::audio::Waveform;
use crate::data::audio::filterbank::{Filterbank, FrameLayout};
use crate::data::audio::resample::Resampler;
use crate::error::{Error, ExitCode, Result};
use crate::grid::{Grid, InputConfig};
use crate::rng::Philox;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;

/// The config's `view.audio`: how audio becomes an image of one channel. The image has one row per frame (10 ms) and
/// one column per mel filter; it is padded where the audio is shorter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AudioView {
    /// Sample rate to which all audio is resampled, Hz.
    pub sample_rate: u32,
    /// Maximum length of the audio in a view, in seconds: of longer audio a random window in training, the middle in
    /// evaluation. The samples under the frames when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Mean of the data set's log-mel values (AudioSet at 16 kHz: -4.2677393).
    pub mean: f64,
    /// Their standard deviation; values are divided by twice of it (AudioSet: 4.5689974).
    pub std: f64,
    /// A view is the waveform, from which [`LogMel`](super::log_mel::LogMel) computes the spectrogram.
    #[serde(skip)]
    pub raw_waveform: bool,
}

impl AudioView {
    /// Refuses values out of range, and values of `input` that have no effect with audio.
    pub fn check(&self, input: &InputConfig) -> Result<()> {
        let AudioView { sample_rate, mean, std, .. } = self;
        let refuse = |message: String| Err(Error::usage(message));
        if !(4000..=96_000).contains(sample_rate) {
            return refuse(format!("view.audio.sample_rate is {sample_rate}; it is in Hz, 4000 to 96000"));
        }
        if !(mean.is_finite() && mean.abs() <= 100.0) {
            return refuse(format!("view.audio.mean is {mean}; it is the mean of log-mel values, -100 to 100"));
        }
        if !(*std > 0.0 && *std <= 100.0) {
            return refuse(format!(
                "view.audio.std is {std}; it is the standard deviation of log-mel values, above 0, to 100"
            ));
        }
        if input.channels != 1 || input.frames != 1 {
            return refuse(format!(
                "input.channels is {} and input.frames {}; a spectrogram is one image of one channel: set both to 1",
                input.channels, input.frames
            ));
        }
        if !input.mean.is_empty() || !input.std.is_empty() {
            return refuse("input.mean and input.std are for pixels; leave them out with view.audio".into());
        }
        if !(8..=1024).contains(&input.width) {
            return refuse(format!(
                "input.width is {}; with view.audio it is the number of mel filters, 8 to 1024",
                input.width
            ));
        }
        self.check_seconds(input)
    }

    fn check_seconds(&self, input: &InputConfig) -> Result<()> {
        let Some(seconds) = self.seconds else { return Ok(()) };
        let layout = FrameLayout::from_sample_rate(self.sample_rate);
        let min = layout.samples_spanned(input.patch as usize);
        let max = layout.samples_spanned(input.height as usize + 1) - 1;
        if (min..=max).contains(&self.max_samples(input.height as usize)) {
            return Ok(());
        }
        let rate = f64::from(self.sample_rate);
        Err(Error::usage(format!(
            "view.audio.seconds is {seconds}; it must fill a row of patches and fit into the {} frames of \
             input.height: {:.3} to {:.3}",
            input.height,
            min as f64 / rate,
            (max as f64 / rate * 1000.0).floor() / 1000.0
        )))
    }

    /// Returns the maximum number of samples in a view of `frames` frames.
    fn max_samples(&self, frames: usize) -> usize {
        match self.seconds {
            Some(seconds) => (seconds * f64::from(self.sample_rate)).round() as usize,
            None => FrameLayout::from_sample_rate(self.sample_rate).samples_spanned(frames),
        }
    }

    /// Returns the shape [C, T, Y, X] of a view: a spectrogram [1, 1, frames, mels], or a waveform [1, 1, 1, samples].
    pub fn shape(&self, grid: &Grid) -> [i64; 4] {
        let shape = grid.pixel_shape();
        if !self.raw_waveform {
            return shape;
        }
        let frames = shape[2] as usize;
        [1, 1, 1, FrameLayout::from_sample_rate(self.sample_rate).samples_spanned(frames) as i64]
    }

    /// Writes the training view into `out`, fp32 of [`AudioView::shape`] as bytes: a random window of longer audio.
    /// Returns the number of frames that hold audio; the others are padding, log-mel 0 before normalization. In a
    /// waveform the samples after the end of the audio are NaN.
    ///
    /// # Errors
    /// ExitCode::Corrupt where the audio is shorter than one frame.
    pub fn train_view(&self, grid: &Grid, waveform: &Waveform, rng: &mut Philox, out: &mut [u8]) -> Result<u32> {
        self.write_view(grid, waveform, |slack| rng.uniform_int(slack as u64 + 1) as usize, out)
    }

    /// Writes the evaluation view, as [`AudioView::train_view`], of the middle of the audio.
    pub fn eval_view(&self, grid: &Grid, waveform: &Waveform, out: &mut [u8]) -> Result<u32> {
        self.write_view(grid, waveform, |slack| slack / 2, out)
    }

    fn write_view(
        &self,
        grid: &Grid,
        waveform: &Waveform,
        start: impl FnOnce(usize) -> usize,
        out: &mut [u8],
    ) -> Result<u32> {
        let [_, _, frames, mels] = grid.pixel_shape().map(|side| side as usize);
        let max_samples = self.max_samples(frames);
        let window = (max_samples as u64 * u64::from(waveform.sample_rate)).div_ceil(u64::from(self.sample_rate));
        let window = window as usize;
        let samples = match waveform.samples.len().checked_sub(window) {
            Some(slack) => &waveform.samples[start(slack)..][..window],
            None => waveform.samples,
        };
        BUFFERS.with_borrow_mut(|buffers| {
            let SpectrogramBuffers { resampler, filterbank, centered, rows } = buffers;
            // Subtracts the mean, without which resampling would ring at the ends of the window; the filterbank
            // subtracts each frame's mean anyway.
            let mean = (samples.iter().map(|&sample| f64::from(sample)).sum::<f64>() / samples.len() as f64) as f32;
            centered.clear();
            centered.extend(samples.iter().map(|sample| sample - mean));
            let samples = resampler.resample(centered, [waveform.sample_rate, self.sample_rate])?;
            let samples = &samples[..samples.len().min(max_samples)];
            let valid = self.valid_frames(samples, frames)?;
            let out = out.as_chunks_mut::<4>().0;
            if self.raw_waveform {
                let padding = std::iter::repeat(&f32::NAN);
                for (out, sample) in out.iter_mut().zip(samples.iter().chain(padding)) {
                    *out = sample.to_ne_bytes();
                }
                return Ok(valid);
            }
            if filterbank.as_ref().is_none_or(|made| (made.sample_rate, made.n_mels) != (self.sample_rate, mels)) {
                *filterbank = Some(Filterbank::new(self.sample_rate, mels));
            }
            rows.clear();
            rows.resize(frames * mels, 0.0);
            filterbank.as_mut().expect("made above").log_mel(samples, rows);
            let mean = self.mean as f32;
            let scale = self.scale() as f32;
            for (out, value) in out.iter_mut().zip(rows) {
                *out = ((*value - mean) * scale).to_ne_bytes();
            }
            Ok(valid)
        })
    }

    fn valid_frames(&self, samples: &[f32], max_frames: usize) -> Result<u32> {
        let count = samples.len();
        let frames = FrameLayout::from_sample_rate(self.sample_rate).count(count).min(max_frames);
        if frames == 0 {
            let message = format!("{count} samples at {} Hz are shorter than one frame of 25 ms", self.sample_rate);
            return Err(Error::new(ExitCode::Corrupt, message));
        }
        Ok(frames as u32)
    }

    /// Returns the factor that normalizes values less their mean.
    pub fn scale(&self) -> f64 {
        0.5 / self.std
    }
}

/// Buffers that a thread reuses from view to view.
#[derive(Default)]
struct SpectrogramBuffers {
    resampler: Resampler,
    filterbank: Option<Filterbank>,
    centered: Vec<f32>,
    rows: Vec<f32>,
}

thread_local!(static BUFFERS: RefCell<SpectrogramBuffers> = RefCell::default());
