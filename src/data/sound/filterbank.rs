//! Samples become a spectrogram: Kaldi's log-mel filterbank with the constants of Audio-MAE (Huang et al., "Masked
//! Autoencoders that Listen", NeurIPS 2022, §4.2), as `torchaudio.compliance.kaldi.fbank` computes it: frames of 25 ms
//! every 10 ms, no frame beyond the end, each without its mean, pre-emphasis 0.97, a symmetric Hann window, power
//! spectrum of the next power of two, triangular filters on HTK's mel scale from 20 Hz to the Nyquist frequency, no
//! dither, no energy, natural logarithm.

use realfft::num_complex::Complex;
use realfft::{RealFftPlanner, RealToComplex};
use std::f64::consts::TAU;
use std::sync::Arc;

/// The least energy: below it the logarithm is taken of it, −15.94.
pub const FLOOR: f32 = f32::EPSILON;
pub const PRE_EMPHASIS: f32 = 0.97;
/// The lowest frequency of the lowest filter, Hz.
const LOWEST: f64 = 20.0;

/// Samples of a frame, and from one frame to the next, at a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    pub length: usize,
    pub shift: usize,
}

impl Frames {
    pub fn at(rate: u32) -> Frames {
        let samples = |milliseconds: f64| (f64::from(rate) * milliseconds * 0.001) as usize;
        Frames { length: samples(25.0), shift: samples(10.0) }
    }

    /// How many whole frames lie in so many samples.
    pub fn of(&self, samples: usize) -> usize {
        if samples < self.length { 0 } else { 1 + (samples - self.length) / self.shift }
    }

    /// What each sample of a frame is multiplied by: Hann's window, symmetric.
    pub fn window(&self) -> Vec<f64> {
        let last = (self.length - 1) as f64;
        (0..self.length).map(|at| 0.5 - 0.5 * (TAU * at as f64 / last).cos()).collect()
    }

    /// The samples under so many frames; at least one frame.
    pub fn samples(&self, frames: usize) -> usize {
        (frames - 1) * self.shift + self.length
    }
}

/// One triangle: the first bin of the spectrum that it weighs, and where its weights lie.
struct Filter {
    first: usize,
    weights: std::ops::Range<usize>,
}

/// Filters, window and buffers for one rate and one number of filters; one for each thread.
pub struct Filterbank {
    pub rate: u32,
    pub mels: usize,
    frames: Frames,
    window: Vec<f32>,
    filters: Vec<Filter>,
    weights: Vec<f32>,
    fft: Arc<dyn RealToComplex<f32>>,
    frame: Vec<f32>,
    spectrum: Vec<Complex<f32>>,
    scratch: Vec<Complex<f32>>,
    power: Vec<f32>,
}

impl Filterbank {
    /// # Panics
    /// Where a frame has fewer than two samples (below 100 Hz), or there is no filter.
    pub fn new(rate: u32, mels: usize) -> Filterbank {
        let frames = Frames::at(rate);
        assert!(frames.length > 1 && frames.shift > 0 && mels > 0, "{mels} filters at {rate} Hz");
        let padded = frames.length.next_power_of_two();
        let fft = RealFftPlanner::new().plan_fft_forward(padded);
        let (filters, weights) = filters(f64::from(rate), padded, mels);
        Filterbank {
            rate,
            mels,
            frames,
            window: frames.window().into_iter().map(|factor| factor as f32).collect(),
            filters,
            weights,
            frame: fft.make_input_vec(),
            spectrum: fft.make_output_vec(),
            scratch: fft.make_scratch_vec(),
            power: vec![0.0; padded / 2],
            fft,
        }
    }

    /// How much of each bin of a frame's spectrum is in each filter, [bins, mels]: as many bins as the padded frame has
    /// samples, halved.
    pub fn dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.power.len() * self.mels];
        for (mel, filter) in self.filters.iter().enumerate() {
            for (bin, weight) in (filter.first..).zip(&self.weights[filter.weights.clone()]) {
                dense[bin * self.mels + mel] = *weight;
            }
        }
        dense
    }

    /// The spectrogram [frames, mels] of samples in −1..1 into `out`, as many frames as there are and as it has room
    /// for; how many those are. What lies behind them in `out` stays as it is.
    pub fn log_mel(&mut self, samples: &[f32], out: &mut [f32]) -> usize {
        let count = self.frames.of(samples.len()).min(out.len() / self.mels);
        for (row, at) in out.chunks_exact_mut(self.mels).zip(0..count) {
            self.power(&samples[at * self.frames.shift..][..self.frames.length]);
            for (value, filter) in row.iter_mut().zip(&self.filters) {
                let weights = &self.weights[filter.weights.clone()];
                *value = dot(weights, &self.power[filter.first..][..weights.len()]);
            }
            row.iter_mut().for_each(|value| *value = ln(value.max(FLOOR)));
        }
        count
    }

    /// The power spectrum of one frame, its Nyquist frequency left out.
    fn power(&mut self, samples: &[f32]) {
        let mean = sum(samples) / samples.len() as f32;
        let (frame, padding) = self.frame.split_at_mut(samples.len());
        // Where the window is 0.
        frame[0] = 0.0;
        let pairs = samples.iter().zip(&samples[1..]);
        for ((value, (before, now)), window) in frame[1..].iter_mut().zip(pairs).zip(&self.window[1..]) {
            *value = ((now - mean) - PRE_EMPHASIS * (before - mean)) * window;
        }
        // The transform uses its input as scratch.
        padding.fill(0.0);
        let done = self.fft.process_with_scratch(&mut self.frame, &mut self.spectrum, &mut self.scratch);
        done.expect("buffers of the transform's own making");
        for (power, bin) in self.power.iter_mut().zip(&self.spectrum) {
            *power = bin.re * bin.re + bin.im * bin.im;
        }
    }
}

/// Triangles that are evenly spread on the mel scale, each over the bins at which it is above 0.
fn filters(rate: f64, padded: usize, mels: usize) -> (Vec<Filter>, Vec<f32>) {
    let mel = |frequency: f64| 1127.0 * (1.0 + frequency / 700.0).ln();
    let (low, high) = (mel(LOWEST), mel(rate / 2.0));
    let step = (high - low) / (mels + 1) as f64;
    let bins: Vec<f64> = (0..padded / 2).map(|bin| mel(rate / padded as f64 * bin as f64)).collect();
    let mut weights = Vec::new();
    let filter = |number: usize| {
        let left = low + number as f64 * step;
        let weight = |mel: f64| ((mel - left) / step).min((left + 2.0 * step - mel) / step);
        let first = bins.partition_point(|&mel| mel <= left);
        let start = weights.len();
        weights.extend(bins[first..].iter().map(|&mel| weight(mel) as f32).take_while(|&weight| weight > 0.0));
        Filter { first, weights: start..weights.len() }
    };
    ((0..mels).map(filter).collect(), weights)
}

/// Eight sums side by side, which the compiler keeps in vectors.
fn sum(values: &[f32]) -> f32 {
    let (eights, rest) = values.as_chunks::<8>();
    let mut sums = [0.0; 8];
    eights.iter().for_each(|eight| sums.iter_mut().zip(eight).for_each(|(sum, value)| *sum += value));
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((fours_a, rest_a), (fours_b, rest_b)) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    let mut sums = [0.0; 4];
    for (a, b) in fours_a.iter().zip(fours_b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f32>() + rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum::<f32>()
}

/// The natural logarithm of a normal positive number to one or two units in the last place, without a branch, so that
/// a row takes it side by side. The polynomial is that of Moshier's Cephes library.
fn ln(x: f32) -> f32 {
    const HALF_ROOT: i32 = 0x3F35_04F3;
    const POLYNOMIAL: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    let bits = x.to_bits() as i32;
    // x = (1 + z) · 2^exponent with 1 + z between the roots of a half and of two.
    let exponent = (bits - HALF_ROOT) >> 23;
    let z = f32::from_bits((bits - (exponent << 23)) as u32) - 1.0;
    let exponent = exponent as f32;
    let series = POLYNOMIAL.iter().fold(0.0, |sum, factor| sum * z + factor) * z * z * z;
    // ln 2 in two parts, the first exact in any product with an exponent.
    let low = series - 2.121_944_4e-4 * exponent - 0.5 * z * z;
    z + low + 0.693_359_4 * exponent
}
