//! A view of a sound: a window of it as a normalised log-mel spectrogram, one row a frame, as Audio-MAE has it (Huang et
//! al., NeurIPS 2022, §4.2 and its `dataset.py`).

use crate::data::sound::Clip;
use crate::data::sound::filterbank::{Filterbank, Frames};
use crate::data::sound::resample::Resampler;
use crate::fault::{Code, Fault, Result};
use crate::grid::{Grid, Input};
use crate::rng::Draw;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;

/// How a sound becomes an image of one channel: the config's `view.sound`. The image is as high as it has frames (one
/// every 10 ms) and as wide as it has mel filters; what a short sound leaves of it is padded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sound {
    /// Samples a second that every sound is brought to.
    pub rate: u32,
    /// The most that a view shows of a sound, seconds: a random part of a longer one in training, its middle in
    /// evaluation. As much as the frames reach over when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Mean of the data set's log-mel values (AudioSet at 16 kHz: -4.2677393).
    pub mean: f64,
    /// Their deviation; values are divided by twice of it (AudioSet: 4.5689974).
    pub std: f64,
    /// Whether a view stays samples, of which [`LogMel`](super::log_mel::LogMel) makes the spectrogram.
    #[serde(skip)]
    pub raw: bool,
}

impl Sound {
    /// Refuses what is out of range, and what would do nothing beside `input`.
    pub fn check(&self, input: &Input) -> Result<()> {
        let Sound { rate, seconds, mean, std, .. } = self;
        let refuse = |message: String| Err(Fault::usage(message));
        if !(4000..=96_000).contains(rate) {
            return refuse(format!("view.sound.rate is {rate}; it is samples a second, 4000 to 96000"));
        }
        if !(mean.is_finite() && mean.abs() <= 100.0) {
            return refuse(format!("view.sound.mean is {mean}; it is the mean of log-mel values, -100 to 100"));
        }
        if !(*std > 0.0 && *std <= 100.0) {
            return refuse(format!("view.sound.std is {std}; it is a deviation of log-mel values, above 0, to 100"));
        }
        if input.channels != 1 || input.frames != 1 {
            return refuse(format!(
                "input.channels is {} and input.frames {}; a spectrogram is one image of one channel: set both to 1",
                input.channels, input.frames
            ));
        }
        if !input.mean.is_empty() || !input.std.is_empty() {
            return refuse("input.mean and input.std are for pixels; leave them out beside view.sound".into());
        }
        if !(8..=1024).contains(&input.width) {
            return refuse(format!("input.width is {}; beside view.sound it is mel filters, 8 to 1024", input.width));
        }
        let frames = Frames::at(*rate);
        let shown = self.span(input.height as usize);
        let (least, most) = (frames.samples(input.patch as usize), frames.samples(input.height as usize + 1) - 1);
        match seconds {
            Some(seconds) if !(least..=most).contains(&shown) => refuse(format!(
                "view.sound.seconds is {seconds}; it must fill a row of patches and fit into the {} frames of \
                 input.height: {:.3} to {:.3}",
                input.height,
                least as f64 / f64::from(*rate),
                (most as f64 / f64::from(*rate) * 1000.0).floor() / 1000.0
            )),
            _ => Ok(()),
        }
    }

    /// The most samples that a view of `frames` frames shows.
    fn span(&self, frames: usize) -> usize {
        match self.seconds {
            Some(seconds) => (seconds * f64::from(self.rate)).round() as usize,
            None => Frames::at(self.rate).samples(frames),
        }
    }

    /// [C, T, Y, X] of a view: the spectrogram [1, 1, frames, mels], or the samples under so many frames [1, 1, 1, S].
    pub fn shape(&self, grid: &Grid) -> [i64; 4] {
        match (self.raw, grid.pixels()) {
            (false, pixels) => pixels,
            (true, [_, _, frames, _]) => [1, 1, 1, Frames::at(self.rate).samples(frames as usize) as i64],
        }
    }

    /// Training's view into `out`, fp32 of [`Sound::shape`] as bytes: a window that is drawn where the sound is longer.
    /// How many frames show the sound; the others are padding, at the value that 0 has once normalised, and of samples
    /// those behind the end are no numbers. Faults with Code::Corrupt where the sound is shorter than one frame.
    pub fn train(&self, grid: &Grid, clip: &Clip, draw: &mut Draw, out: &mut [u8]) -> Result<u32> {
        self.view(grid, clip, |slack| draw.below(slack as u64 + 1) as usize, out)
    }

    /// As [`Sound::train`] of the middle of the sound.
    pub fn eval(&self, grid: &Grid, clip: &Clip, out: &mut [u8]) -> Result<u32> {
        self.view(grid, clip, |slack| slack / 2, out)
    }

    fn view(&self, grid: &Grid, clip: &Clip, start: impl FnOnce(usize) -> usize, out: &mut [u8]) -> Result<u32> {
        let [_, _, frames, mels] = grid.pixels().map(|side| side as usize);
        let span = self.span(frames);
        let here = (span as u64 * u64::from(clip.rate)).div_ceil(u64::from(self.rate)) as usize;
        let samples = match clip.samples.len().checked_sub(here) {
            Some(slack) => &clip.samples[start(slack)..][..here],
            None => clip.samples,
        };
        FRONT.with_borrow_mut(|front| {
            let Front { resampler, filters, centred, rows } = front;
            // The frames lose their own means; without this one, resampling would ring at the ends of the window.
            let mean = (samples.iter().map(|&sample| f64::from(sample)).sum::<f64>() / samples.len() as f64) as f32;
            centred.clear();
            centred.extend(samples.iter().map(|sample| sample - mean));
            let samples = resampler.resample(centred, [clip.rate, self.rate])?;
            let samples = &samples[..samples.len().min(span)];
            let shown = Frames::at(self.rate).of(samples.len()).min(frames);
            if shown == 0 {
                let (got, rate) = (samples.len(), self.rate);
                let message = format!("{got} samples at {rate} Hz are shorter than one frame of 25 ms");
                return Err(Fault::new(Code::Corrupt, message));
            }
            let out = out.as_chunks_mut::<4>().0;
            if self.raw {
                let end = std::iter::repeat(&f32::NAN);
                out.iter_mut().zip(samples.iter().chain(end)).for_each(|(out, sample)| *out = sample.to_ne_bytes());
                return Ok(shown as u32);
            }
            if filters.as_ref().is_none_or(|made| (made.rate, made.mels) != (self.rate, mels)) {
                *filters = Some(Filterbank::new(self.rate, mels));
            }
            rows.clear();
            rows.resize(frames * mels, 0.0);
            filters.as_mut().expect("made above").log_mel(samples, rows);
            let (mean, scale) = (self.mean as f32, self.scale() as f32);
            for (out, value) in out.iter_mut().zip(rows) {
                *out = ((*value - mean) * scale).to_ne_bytes();
            }
            Ok(shown as u32)
        })
    }

    /// What values less their mean are multiplied by.
    pub fn scale(&self) -> f64 {
        0.5 / self.std
    }
}

/// What a thread keeps between views.
#[derive(Default)]
struct Front {
    resampler: Resampler,
    filters: Option<Filterbank>,
    centred: Vec<f32>,
    rows: Vec<f32>,
}

thread_local!(static FRONT: RefCell<Front> = RefCell::default());
