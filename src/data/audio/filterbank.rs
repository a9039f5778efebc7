//! Log-mel spectrograms on the CPU: Kaldi's filterbank with the constants of Audio-MAE (Huang et al., "Masked
//! Autoencoders that Listen", NeurIPS 2022, §4.2), as `torchaudio.compliance.kaldi.fbank` computes it: frames of 25 ms
//! every 10 ms, no frame beyond the end, each without its mean, pre-emphasis 0.97, a symmetric Hann window, power
//! spectrum of the next power of two, triangular filters on HTK's mel scale from 20 Hz to the Nyquist frequency, no
//! dither, no energy, natural logarithm.

use realfft::num_complex::Complex;
use realfft::{RealFftPlanner, RealToComplex};
use std::f64::consts::TAU;
use std::sync::Arc;

/// Minimum energy of a filter; its logarithm is −15.94.
pub const MIN_ENERGY: f32 = f32::EPSILON;
/// Coefficient of the pre-emphasis.
pub const PRE_EMPHASIS: f32 = 0.97;
/// Lowest frequency of the lowest filter, Hz.
const MIN_FREQUENCY: f64 = 20.0;

/// Length and shift of frames, in samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLayout {
    pub length: usize,
    pub shift: usize,
}

impl FrameLayout {
    /// Returns frames of 25 ms every 10 ms.
    pub fn from_sample_rate(sample_rate: u32) -> FrameLayout {
        let samples = |milliseconds: f64| (f64::from(sample_rate) * milliseconds * 0.001) as usize;
        FrameLayout { length: samples(25.0), shift: samples(10.0) }
    }

    /// Returns the number of complete frames in `samples` samples.
    pub fn count(&self, samples: usize) -> usize {
        if samples < self.length { 0 } else { 1 + (samples - self.length) / self.shift }
    }

    /// Returns the symmetric Hann window.
    pub fn window(&self) -> Vec<f64> {
        let last = (self.length - 1) as f64;
        (0..self.length).map(|index| 0.5 - 0.5 * (TAU * index as f64 / last).cos()).collect()
    }

    /// Returns the number of samples that `frames` frames span; `frames` is at least 1.
    pub fn samples_spanned(&self, frames: usize) -> usize {
        (frames - 1) * self.shift + self.length
    }
}

/// A triangular filter.
struct Filter {
    /// First bin of the spectrum with a weight.
    first_bin: usize,
    /// Range of its weights in [`Filterbank::weights`].
    weights: std::ops::Range<usize>,
}

/// A mel filterbank with its buffers, for one sample rate and number of filters; one per thread.
pub struct Filterbank {
    pub sample_rate: u32,
    pub n_mels: usize,
    layout: FrameLayout,
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
    /// Makes a filterbank of `n_mels` filters.
    ///
    /// # Panics
    /// If a frame has fewer than two samples (below 100 Hz), or `n_mels` is 0.
    pub fn new(sample_rate: u32, n_mels: usize) -> Filterbank {
        let layout = FrameLayout::from_sample_rate(sample_rate);
        assert!(layout.length > 1 && layout.shift > 0 && n_mels > 0, "{n_mels} filters at {sample_rate} Hz");
        let fft_length = layout.length.next_power_of_two();
        let fft = RealFftPlanner::new().plan_fft_forward(fft_length);
        let (filters, weights) = mel_filters(f64::from(sample_rate), fft_length, n_mels);
        Filterbank {
            sample_rate,
            n_mels,
            layout,
            window: layout.window().into_iter().map(|factor| factor as f32).collect(),
            filters,
            weights,
            frame: fft.make_input_vec(),
            spectrum: fft.make_output_vec(),
            scratch: fft.make_scratch_vec(),
            power: vec![0.0; fft_length / 2],
            fft,
        }
    }

    /// Returns the weights as a dense matrix [bins, mels]; bins are half the FFT length.
    pub fn to_dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.power.len() * self.n_mels];
        for (mel, filter) in self.filters.iter().enumerate() {
            for (bin, weight) in (filter.first_bin..).zip(&self.weights[filter.weights.clone()]) {
                dense[bin * self.n_mels + mel] = *weight;
            }
        }
        dense
    }

    /// Writes the spectrogram [frames, mels] of samples in −1..1 into `out`, at most as many frames as fit, and returns
    /// the number of frames. The rest of `out` does not change.
    pub fn log_mel(&mut self, samples: &[f32], out: &mut [f32]) -> usize {
        let frames = self.layout.count(samples.len()).min(out.len() / self.n_mels);
        for (row, frame) in out.chunks_exact_mut(self.n_mels).zip(0..frames) {
            self.compute_power(&samples[frame * self.layout.shift..][..self.layout.length]);
            for (value, filter) in row.iter_mut().zip(&self.filters) {
                let weights = &self.weights[filter.weights.clone()];
                *value = dot(weights, &self.power[filter.first_bin..][..weights.len()]);
            }
            row.iter_mut().for_each(|value| *value = ln(value.max(MIN_ENERGY)));
        }
        frames
    }

    /// Computes the power spectrum of one frame, without the Nyquist frequency.
    fn compute_power(&mut self, samples: &[f32]) {
        let mean = sum(samples) / samples.len() as f32;
        let (frame, padding) = self.frame.split_at_mut(samples.len());
        // The window is 0 at the first sample.
        frame[0] = 0.0;
        let pairs = samples.iter().zip(&samples[1..]);
        for ((value, (previous, current)), window) in frame[1..].iter_mut().zip(pairs).zip(&self.window[1..]) {
            *value = ((current - mean) - PRE_EMPHASIS * (previous - mean)) * window;
        }
        // The transform uses its input as scratch.
        padding.fill(0.0);
        self.fft
            .process_with_scratch(&mut self.frame, &mut self.spectrum, &mut self.scratch)
            .expect("buffers that the transform made");
        for (power, bin) in self.power.iter_mut().zip(&self.spectrum) {
            *power = bin.re * bin.re + bin.im * bin.im;
        }
    }
}

/// Makes triangular filters, evenly spaced on the mel scale, each over the bins where it is above 0.
fn mel_filters(sample_rate: f64, fft_length: usize, n_mels: usize) -> (Vec<Filter>, Vec<f32>) {
    let low = hertz_to_mel(MIN_FREQUENCY);
    let high = hertz_to_mel(sample_rate / 2.0);
    let step = (high - low) / (n_mels + 1) as f64;
    let bin_mel = |bin: usize| hertz_to_mel(sample_rate / fft_length as f64 * bin as f64);
    let bins: Vec<f64> = (0..fft_length / 2).map(bin_mel).collect();
    let mut weights = Vec::new();
    let make_filter = |index: usize| {
        let left = low + index as f64 * step;
        let weight = |mel: f64| ((mel - left) / step).min((left + 2.0 * step - mel) / step);
        let first_bin = bins.partition_point(|&mel| mel <= left);
        let start = weights.len();
        weights.extend(bins[first_bin..].iter().map(|&mel| weight(mel) as f32).take_while(|&weight| weight > 0.0));
        Filter { first_bin, weights: start..weights.len() }
    };
    ((0..n_mels).map(make_filter).collect(), weights)
}

fn hertz_to_mel(frequency: f64) -> f64 {
    1127.0 * (1.0 + frequency / 700.0).ln()
}

/// Sums in eight lanes, which the compiler keeps in vector registers.
fn sum(values: &[f32]) -> f32 {
    let (eights, rest) = values.as_chunks::<8>();
    let mut sums = [0.0; 8];
    eights.iter().for_each(|eight| sums.iter_mut().zip(eight).for_each(|(sum, value)| *sum += value));
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (fours_a, rest_a) = a.as_chunks::<4>();
    let (fours_b, rest_b) = b.as_chunks::<4>();
    let mut sums = [0.0; 4];
    for (a, b) in fours_a.iter().zip(fours_b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f32>() + rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum::<f32>()
}

/// Returns the natural logarithm of a normal positive number to one or two units in the last place. It has no branch,
/// so that the compiler vectorizes it over a row. The polynomial is that of Moshier's Cephes library.
fn ln(x: f32) -> f32 {
    const SQRT_HALF_BITS: i32 = 0x3F35_04F3;
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
    // x = (1 + z) · 2^exponent with 1 + z between √½ and √2.
    let exponent = (bits - SQRT_HALF_BITS) >> 23;
    let z = f32::from_bits((bits - (exponent << 23)) as u32) - 1.0;
    let exponent = exponent as f32;
    let series = POLYNOMIAL.iter().fold(0.0, |sum, factor| sum * z + factor) * z * z * z;
    // ln 2 in two parts, of which the first is exact in any product with an exponent.
    let low = series - 2.121_944_4e-4 * exponent - 0.5 * z * z;
    z + low + 0.693_359_4 * exponent
}
