//! Tests of MFM against timm's BEiT and torch's FFT: losses, gradients and weights after three AdamW steps; and of its
//! filters and its loss by closed forms.

use crate::support::method_ext::MethodExt;
use crate::support::parity;
use crate::support::vit_mae::{input, keys, shape};
use crate::support::{Outcome, assert_lines_rejected, normal};
use occlude::method::{Batch, Method, mfm};
use occlude::op::spectrum::spectrum;
use occlude::part::encoder::vit::Shape;
use occlude::part::frequency::FrequencyFilter;
use occlude::part::loss::{SpectrumAverage, spectrum_distance};
use serde_json::json;
use tch::{Device, Kind, Tensor};

crate::trials![
    a_grayscale_image_matches_timm,
    an_odd_color_image_matches_timm,
    a_mean_of_each_sample_matches_timm,
    low_and_high_pass_add_up_to_the_image,
    discs_have_the_published_sizes,
    squares_of_the_whole_spectrum_are_the_squared_error,
    the_gradient_of_the_modulus_is_its_closed_form,
    hidden_frequencies_are_counted,
    an_invalid_config_is_rejected,
];

const STEPS: usize = 3;

struct Case {
    batch: i64,
    channels: i64,
    size: [i64; 2],
    patch: i64,
    encoder: Shape,
    radius: f64,
    average: SpectrumAverage,
}

fn gray() -> Case {
    Case {
        batch: 5,
        channels: 1,
        size: [20, 20],
        patch: 4,
        encoder: shape(24, 2, 3),
        radius: 3.0,
        average: SpectrumAverage::Batch,
    }
}

fn a_grayscale_image_matches_timm() -> Outcome {
    gray().check()
}

fn an_odd_color_image_matches_timm() -> Outcome {
    let encoder = shape(60, 3, 5);
    Case { batch: 4, channels: 3, size: [35, 28], patch: 7, encoder, radius: 5.0, ..gray() }.check()
}

fn a_mean_of_each_sample_matches_timm() -> Outcome {
    let encoder = shape(44, 2, 11);
    Case { batch: 6, channels: 3, size: [24, 24], patch: 6, encoder, average: SpectrumAverage::Sample, ..gray() }
        .check()
}

impl Case {
    fn method(&self) -> Result<mfm::Mfm, occlude::error::Error> {
        let input = input(self.channels, self.size, self.patch);
        let Case { encoder, radius, average, .. } = *self;
        mfm::Mfm::new(&mfm::Config { encoder, radius, low_ratio: 0.5, average }, &input)
    }

    /// Pixels as 0..255, so that the filters see an image.
    fn batch(&self, step: u64) -> Batch {
        let pixels = normal(step, &[self.batch, self.channels, 1, self.size[0], self.size[1]]) * 60.0 + 128.0;
        Batch::new(pixels.clamp(0.0, 255.0).to_kind(Kind::Uint8), &keys(self.batch, step), 9)
    }

    fn check(&self) -> Outcome {
        let method = self.method()?;
        let grid = method.grid();
        let flat = parity::perturbed_weights(&method)?;
        let batches: Vec<Batch> = (0..STEPS).map(|step| self.batch(step as u64)).collect();
        let mut request = Vec::new();
        let mut kinds = 0;
        for (step, batch) in batches.iter().enumerate() {
            let low = method.filter.sample_low_pass(batch)?.view(-1);
            kinds += low.sum(Kind::Int64).int64_value(&[]);
            request.push((format!("input.{step}"), batch.view().squeeze_dim(2).to_kind(Kind::Float) / 255.0));
            request.push((format!("low.{step}"), low.to_kind(Kind::Uint8)));
        }
        assert!(kinds > 0 && kinds < STEPS as i64 * self.batch, "both filters occur: {kinds}");
        let naming = |name: &str, tensor: &Tensor| {
            let convolution = |tensor: &Tensor| {
                // Ours are [D, row, column, channel].
                tensor.view([-1, grid.patch, grid.patch, grid.channels]).permute([0, 3, 1, 2]).contiguous()
            };
            match name.strip_prefix("encoder.").unwrap_or(name) {
                "positions" => ("pos_embed".to_owned(), tensor.unsqueeze(0)),
                "embed.weight" => ("patch_embed.proj.weight".to_owned(), convolution(tensor)),
                "embed.bias" => ("patch_embed.proj.bias".to_owned(), tensor.shallow_clone()),
                rest => (rest.to_owned(), tensor.shallow_clone()),
            }
        };
        let (mean, std) = input(self.channels, self.size, self.patch).mean_std()?;
        let numbers = json!({
            "mean": mean, "std": std, "patch": self.patch, "width": self.encoder.width, "depth": self.encoder.depth, "heads": self.encoder.heads,
            "radius": self.radius, "by_sample": self.average == SpectrumAverage::Sample,
        });
        let numbers = parity::training_numbers(STEPS, numbers);
        let reply = parity::oracle_reply(&["mfm.py"], &flat, &naming, request, &numbers)?;
        parity::assert_training_matches(Box::new(method), flat, batches, &reply, &naming)
    }
}

fn filter(radius: f64) -> FrequencyFilter {
    FrequencyFilter { radius, low_ratio: 0.5 }
}

fn low_and_high_pass_add_up_to_the_image() -> Outcome {
    for (height, width) in [(16, 16), (15, 21), (8, 9)] {
        // Far from 0 and 1, so that no part is clamped; the low part holds the mean.
        let image = normal(1, &[2, 3, height, width]).to_kind(Kind::Double) * 0.02 + 0.5;
        let disc = filter(3.0).disc(height, width, Device::Cpu);
        let low = FrequencyFilter::apply(&image, &disc);
        let high = FrequencyFilter::apply(&(&image + 0.0), &(1.0 - &disc));
        let high_of_negative = FrequencyFilter::apply(&(1.0 - &image), &(1.0 - &disc));
        // A high-passed image is around 0, and the clamp keeps its positive part: the rest is that of the negative.
        let difference = (low + high - high_of_negative - &image).abs().max().double_value(&[]);
        assert!(difference < 1e-7, "{height} × {width}: {difference:e}");
    }
    Ok(())
}

fn discs_have_the_published_sizes() -> Outcome {
    for (side, radius, pixels) in [(224, 16.0, 793), (96, 7.0, 145), (64, 5.0, 69), (32, 3.0, 25)] {
        let disc = filter(radius).disc(side, side, Device::Cpu);
        assert_eq!(disc.sum(Kind::Int64).int64_value(&[]), pixels, "{side}");
        assert_eq!(disc.double_value(&[side / 2, side / 2]), 1.0, "the zero frequency passes");
    }
    Ok(())
}

fn squares_of_the_whole_spectrum_are_the_squared_error() -> Outcome {
    let a = normal(1, &[2, 3, 9, 14]).to_kind(Kind::Double);
    let b = normal(2, &[2, 3, 9, 14]).to_kind(Kind::Double);
    let everything = Tensor::ones([2, 1, 9, 14], (Kind::Double, Device::Cpu));
    let distance = spectrum_distance(&a, &b, &everything);
    let spectral = distance.square().sum(Kind::Double).double_value(&[]);
    let squared_error = (a - b).square().sum(Kind::Double).double_value(&[]);
    assert!((spectral - squared_error).abs() < 1e-9 * squared_error, "{spectral} {squared_error}");
    Ok(())
}

fn the_gradient_of_the_modulus_is_its_closed_form() -> Outcome {
    let target = normal(2, &[1, 2, 7, 10]).to_kind(Kind::Double);
    let pred = normal(1, &[1, 2, 7, 10]).to_kind(Kind::Double).set_requires_grad(true);
    let hidden = 1.0 - filter(2.5).disc(7, 10, Device::Cpu).to_kind(Kind::Double).view([1, 1, 7, 10]);
    spectrum_distance(&pred, &target, &hidden).sum(Kind::Double).backward();
    let difference = spectrum(&(pred.detach() - target));
    let modulus = difference.square().sum_dim_intlist([-1i64].as_slice(), true, None).sqrt();
    let unit = (difference / modulus * hidden.unsqueeze(-1)).view_as_complex();
    let axes = [-2i64, -1];
    let closed = unit.fft_ifftshift(axes.as_slice()).fft_ifft2(None::<&[i64]>, axes.as_slice(), "ortho").real();
    let error = (pred.grad() - closed).abs().max().double_value(&[]);
    assert!(error < 1e-9, "{error:e}");
    Ok(())
}

fn hidden_frequencies_are_counted() -> Outcome {
    let case = gray();
    let method = case.method()?;
    let batch = case.batch(4);
    let hidden = method.filter.filter(&method.model.patchify, &batch)?.hidden;
    let counted = hidden.sum(Kind::Double).double_value(&[]);
    assert_eq!(method.denominators(&batch)?.counted, counted);
    assert_eq!(method.denominators(&batch)?.samples, 5.0);
    Ok(())
}

fn an_invalid_config_is_rejected() -> Outcome {
    assert_lines_rejected(
        "mfm",
        &[
            ("method.mfm.radius=0", "method.mfm.radius is 0; it must lie in 1 to 14"),
            ("method.mfm.low_ratio=1.5", "method.mfm.low_ratio is 1.5; it must lie in 0 to 1"),
            ("method.mfm.average=row", "unknown value `row`"),
            ("input.frames=2", "set it to 1, or choose a method for video"),
        ],
    )
}
