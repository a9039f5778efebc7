//! Low- and high-pass filters of images, one of both for each sample (masked frequency modeling, Xie et al., 2023,
//! §3.2).

use crate::error::Result;
use crate::op::noise::noise;
use crate::op::sizes;
use crate::part::batch::Batch;
use crate::part::patchify::Patchify;
use crate::rng::Purpose;
use tch::{Device, Kind, Tensor};

/// A disc around the zero frequency that a sample's filter passes or stops.
#[derive(Clone, Copy, Debug)]
pub struct FrequencyFilter {
    /// Radius of the disc in cycles per image.
    pub radius: f64,
    /// Share of samples that see the disc (low-pass); the others see the rest (high-pass).
    pub low_ratio: f64,
}

/// Images as their filters leave them.
pub struct FilteredImages {
    /// The passed frequencies as an image, standardized as the model receives pixels, fp32 [B, C, 1, Y, X].
    pub input: Tensor,
    /// 1 where a frequency is hidden, else 0, fp32 [B, 1, Y, X].
    pub hidden: Tensor,
}

impl FrequencyFilter {
    /// Filters the images of a batch, each by its own coin.
    pub fn filter(&self, patchify: &Patchify, batch: &Batch) -> Result<FilteredImages> {
        let x = batch.view();
        let [_, _, _, height, width] = sizes(x);
        let pass_band = self.pass_band(&self.sample_low_pass(batch)?, height, width);
        let passed = FrequencyFilter::apply(&patchify.to_01(x).squeeze_dim(2), &pass_band);
        Ok(FilteredImages { input: patchify.standardize(&passed.unsqueeze(2)), hidden: 1.0 - pass_band })
    }

    /// Tosses each sample's coin → bool [B, 1, 1, 1], true for low-pass.
    pub fn sample_low_pass(&self, batch: &Batch) -> Result<Tensor> {
        Ok(noise(batch.seed, &batch.keys, Purpose::Filter, 1)?.lt(self.low_ratio).view([-1, 1, 1, 1]))
    }

    /// Returns 1 where a frequency is within the disc, else 0, fp32 [Y, X]; the zero frequency is at (⌊Y/2⌋, ⌊X/2⌋).
    pub fn disc(&self, height: i64, width: i64, device: Device) -> Tensor {
        let squares = |size: i64| (Tensor::arange(size, (Kind::Float, device)) - (size / 2) as f64).square();
        (squares(height).unsqueeze(1) + squares(width)).lt(self.radius * self.radius).to_kind(Kind::Float)
    }

    /// Returns 1 where a sample's filter passes a frequency, else 0, fp32 [B, 1, Y, X].
    pub fn pass_band(&self, low: &Tensor, height: i64, width: i64) -> Tensor {
        let disc = self.disc(height, width, low.device());
        disc.where_self(low, &(1.0 - &disc))
    }

    /// u [B, C, Y, X] as 0..1 → what passes, clamped to 0..1.
    pub fn apply(u: &Tensor, pass_band: &Tensor) -> Tensor {
        let axes = [-2i64, -1];
        let frequencies = u.fft_fft2(None::<&[i64]>, axes.as_slice(), "backward").fft_fftshift(axes.as_slice());
        let passed = (frequencies * pass_band).fft_ifftshift(axes.as_slice());
        passed.fft_ifft2(None::<&[i64]>, axes.as_slice(), "backward").real().clamp(0.0, 1.0)
    }

    /// Counts the frequencies that the filters of a batch hide, of one channel, on the host.
    pub fn count_hidden(&self, batch: &Batch) -> Result<f64> {
        let view = batch.view();
        let [_, _, _, height, width] = sizes(view);
        let disc = f64::try_from(self.disc(height, width, Device::Cpu).sum(Kind::Double))?;
        let [_, samples] = sizes(&batch.keys);
        let low = f64::try_from(self.sample_low_pass(batch)?.sum(Kind::Double))?;
        Ok(low * ((height * width) as f64 - disc) + (samples as f64 - low) * disc)
    }
}
