//! Tests of the tiny configs on a CUDA device: compared with the CPU, resumed, and small enough for a sanitizer.

use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, no_cuda_device};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::modality::Modality;
use occlude::dist::World;
use occlude::dist::solo::SoloWorld;
use occlude::method::Batch;
use occlude::op::shuffle::SampleKey;
use occlude::optim::{flat::FlatParams, update::Updater};
use occlude::part::batch::Side;
use occlude::part::encoder::text;
use occlude::train::step::Stepper;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor, no_grad};

crate::trials![
    tiny_configs_learn_in_bf16_as_in_fp32,
    a_resumed_training_matches_bit_for_bit,
    a_small_step_runs_on_a_cpu;
    no_cuda_device:
    tiny_configs_train_on_a_gpu_as_on_a_cpu,
    a_resumed_training_on_a_gpu_matches_bit_for_bit,
    a_small_step_runs,
];

fn a_resumed_training_matches_bit_for_bit() -> Outcome {
    check_resume(Device::Cpu)
}

fn a_resumed_training_on_a_gpu_matches_bit_for_bit() -> Outcome {
    check_resume(Device::Cuda(0))
}

fn a_small_step_runs() -> Outcome {
    check_small_step(Device::Cuda(0))
}

fn a_small_step_runs_on_a_cpu() -> Outcome {
    check_small_step(Device::Cpu)
}

/// FLIP multiplies similarities by 14 before the exponential, which amplifies rounding.
const TINY: [Tiny; 5] = [
    Tiny { text: include_str!("../../configs/tiny/mae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../../configs/tiny/videomae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../../configs/tiny/omnimae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../../configs/tiny/audiomae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../../configs/tiny/flip.json"), within: [1e-4, 5e-2] },
];

/// A config, and how far its losses may be off, relative: in fp32 on another device, and in bf16 anywhere.
struct Tiny {
    text: &'static str,
    within: [f64; 2],
}

const LR: f64 = 1e-3;

/// A training of a config, in a dtype on a device.
struct Training {
    stepper: Stepper,
    device: Device,
    modality: Modality,
    text: Option<text::Config>,
}

impl Training {
    fn new(text: &str, kind: Kind, device: Device) -> Result<Training, Failed> {
        tch::set_num_threads(1);
        let config = Config::parse(text, &[])?;
        let method = config.method.build(&config.input)?;
        let flat = FlatParams::new(method.params(), 7, kind, device)?;
        let updater = Updater::new(&flat, &config.optim);
        let world: Arc<dyn World> = Arc::new(SoloWorld::new(device));
        let stepper = Stepper::new(method, flat, updater, world, 1 << 16, Duration::from_secs(60))?;
        Ok(Training {
            stepper,
            device,
            modality: config.view.modality(),
            text: config.method.requirements().captions.cloned(),
        })
    }

    /// Runs steps of `samples` in two micro-batches and returns their losses.
    fn run_steps(&mut self, steps: std::ops::Range<i64>, samples: i64) -> Result<Vec<f64>, Failed> {
        let step = |step: i64| {
            let half = |first: i64| self.waves(first..first + samples / 2, step);
            let outcome = self.stepper.step(&[half(0), half(samples / 2)], LR, |_, _| Ok(()))?;
            assert!(outcome.bad_ranks.is_empty() && outcome.loss.is_finite() && outcome.grad_norm > 0.0);
            Ok(outcome.loss)
        };
        steps.map(step).collect()
    }

    /// Returns samples of slow waves, different in every step; all audio clips but the last are padded, and token ids
    /// of captions count up from the index of the sample.
    fn waves(&self, samples: std::ops::Range<i64>, step: i64) -> Batch {
        let [c, t, y, x] = self.stepper.method.grid().pixel_shape();
        let along = |size: i64, axis: usize| {
            let mut view = [1; 5];
            view[axis] = size;
            Tensor::arange(size, (Kind::Float, Device::Cpu)).view(view)
        };
        let count = samples.end - samples.start;
        let sample = along(count, 0) + (samples.start + 8 * step) as f64;
        let [across, down] = [0.53, 0.37].map(|round| (&sample * round).sin() * 0.5);
        let phase = along(t, 2) * 0.7 + along(y, 3) * down + along(x, 4) * across;
        let waves = (phase + &sample).sin().expand([count, c, t, y, x], false);
        let pixels = match self.modality {
            Modality::Image => (waves * 100.0 + 128.0).to_kind(Kind::Uint8),
            Modality::Audio => waves,
        };
        let valid = (self.modality == Modality::Audio).then(|| (1..=count).map(|n| (y * n / count) as u32).collect());
        let captions = self.text.as_ref().map(|text| {
            let along = Tensor::arange(text.context_length, (Kind::Int64, Device::Cpu)).view([1, -1]);
            (sample.to_kind(Kind::Int64).view([-1, 1]) * 7 + along * 3)
                .remainder(text.vocab_size)
                .to_device(self.device)
        });
        let keys: Vec<SampleKey> =
            samples.map(|id| SampleKey { id: id as u64, epoch: step as u64, repeat: 0 }).collect();
        Batch::new(pixels.contiguous().to_device(self.device), &keys, 5).with_side(Side {
            captions,
            valid,
            ..Side::default()
        })
    }

    /// Returns the tensors of a checkpoint.
    fn state(&self) -> [Tensor; 4] {
        let flat = &self.stepper.flat;
        [&flat.master, &flat.exp_avg, &flat.exp_avg_sq, &flat.steps].map(Tensor::shallow_clone)
    }
}

fn losses(text: &str, steps: i64, kind: Kind, device: Device) -> Result<Vec<f64>, Failed> {
    Training::new(text, kind, device)?.run_steps(0..steps, 8)
}

fn assert_close(ours: &[f64], reference: &[f64], within: f64, label: &str) {
    for (step, (ours, reference)) in ours.iter().zip(reference).enumerate() {
        let difference = (ours - reference).abs() / reference;
        assert!(difference <= within, "{label}, step {step}: loss {ours} against {reference}, off by {difference:e}");
    }
}

/// fp32 within 1e-5; bf16 rounds every value to 2⁻⁹ of itself, and the effect grows from step to step.
fn tiny_configs_train_on_a_gpu_as_on_a_cpu() -> Outcome {
    for Tiny { text, within: [fp32, bf16] } in TINY {
        let expected = losses(text, 20, Kind::Float, Device::Cpu)?;
        assert_close(&losses(text, 20, Kind::Float, Device::Cuda(0))?, &expected, fp32, "fp32 on a GPU");
        assert_close(&losses(text, 20, Kind::BFloat16, Device::Cuda(0))?, &expected, bf16, "bf16 on a GPU");
    }
    Ok(())
}

fn tiny_configs_learn_in_bf16_as_in_fp32() -> Outcome {
    for Tiny { text, within: [_, bf16] } in TINY {
        let expected = losses(text, 4, Kind::Float, Device::Cpu)?;
        let ours = losses(text, 4, Kind::BFloat16, Device::Cpu)?;
        assert!(ours != expected, "it was computed in fp32");
        assert_close(&ours, &expected, bf16, "bf16");
    }
    Ok(())
}

/// Six steps, compared with three and three, with the contents of a checkpoint handed over to a new training.
fn check_resume(device: Device) -> Outcome {
    for (Tiny { text, .. }, kind) in TINY.into_iter().zip([Kind::Float, Kind::BFloat16].into_iter().cycle()) {
        let [mut full, mut first, mut second] =
            [(); 3].map(|()| Training::new(text, kind, device).expect("a training"));
        let losses = full.run_steps(0..6, 8)?;
        let start = first.run_steps(0..3, 8)?;
        no_grad(|| second.state().iter_mut().zip(first.state()).for_each(|(to, from)| to.copy_(&from)));
        second.stepper.flat.sync_compute_weights();
        let ended = second.run_steps(3..6, 8)?;
        assert_eq!([start, ended].concat(), losses, "{kind:?}: the losses differ");
        for (ours, reference) in second.state().iter().zip(full.state()) {
            assert!(ours.equal(&reference), "{kind:?}: weights or moments differ");
        }
        assert!(!full.state()[0].equal(&first.state()[0]), "{kind:?}: nothing changed");
    }
    Ok(())
}

/// Two steps of two samples, in fp32 and bf16.
fn check_small_step(device: Device) -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        Training::new(TINY[0].text, kind, device)?.run_steps(0..2, 2)?;
    }
    Ok(())
}
