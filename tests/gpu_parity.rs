//! The tiny configs on a CUDA device: beside the same on the CPU, gone on with, and small enough for a sanitizer.

use crate::support::{Outcome, skipped, trial};
use libtest_mimic::{Failed, Trial};
use occlude::config::Config;
use occlude::data::medium::Medium;
use occlude::device::World;
use occlude::device::solo::Solo;
use occlude::method::Batch;
use occlude::op::shuffle::Origin;
use occlude::optim::{flat::Flat, update::Updater};
use occlude::part::encoder::text;
use occlude::run::step::Stepper;
use std::sync::Arc;
use std::time::Duration;
use tch::{Cuda, Device, Kind, Tensor, no_grad};

type Case = (&'static str, fn() -> Outcome);

pub fn trials() -> Vec<Trial> {
    let on_a_device: [Case; 3] = [
        ("the_tiny_configs_train_on_a_device_as_on_the_cpu", the_tiny_configs_train_on_a_device_as_on_the_cpu),
        ("a_training_gone_on_with_on_a_device_is_the_same_to_the_bit", || gone_on_with(Device::Cuda(0))),
        ("a_small_step_runs", || small(Device::Cuda(0))),
    ];
    let name = |name: &str| format!("gpu_parity::{name}");
    let there = Cuda::is_available();
    let mut trials: Vec<Trial> = on_a_device
        .into_iter()
        .map(|(what, case)| if there { trial(&name(what), case) } else { skipped(&name(what), "no CUDA device here") })
        .collect();
    trials.push(trial(&name("the_tiny_configs_learn_in_bf16_as_in_fp32"), the_tiny_configs_learn_in_bf16_as_in_fp32));
    trials.push(trial(&name("a_training_gone_on_with_is_the_same_to_the_bit"), || gone_on_with(Device::Cpu)));
    trials.push(trial(&name("a_small_step_runs_on_a_cpu"), || small(Device::Cpu)));
    trials
}

/// FLIP multiplies likenesses by 14 ahead of their exponentials, and what rounds with them.
const TINY: [Tiny; 5] = [
    Tiny { text: include_str!("../configs/tiny/mae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../configs/tiny/videomae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../configs/tiny/omnimae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../configs/tiny/audio_mae.json"), within: [1e-5, 2e-2] },
    Tiny { text: include_str!("../configs/tiny/flip.json"), within: [1e-4, 5e-2] },
];

/// A config, and how far its losses may be off elsewhere in fp32 and anywhere in bf16, of themselves.
struct Tiny {
    text: &'static str,
    within: [f64; 2],
}

const LR: f64 = 1e-3;

/// A training of a config, in a dtype on a device.
struct Training {
    stepper: Stepper,
    device: Device,
    medium: Medium,
    text: Option<text::Config>,
}

impl Training {
    fn new(text: &str, kind: Kind, device: Device) -> Result<Training, Failed> {
        tch::set_num_threads(1);
        let config = Config::parse(text, &[])?;
        let method = config.method.build(&config.input)?;
        let flat = Flat::new(method.table(), 7, kind, device)?;
        let updater = Updater::new(&flat, &config.optim);
        let world: Arc<dyn World> = Arc::new(Solo::new(device));
        let stepper = Stepper::new(method, flat, updater, world, 1 << 16, Duration::from_secs(60))?;
        Ok(Training { stepper, device, medium: config.view.medium(), text: config.method.text().copied() })
    }

    /// Steps of `samples` in two micro-batches; their losses.
    fn go(&mut self, steps: std::ops::Range<i64>, samples: i64) -> Result<Vec<f64>, Failed> {
        let step = |step: i64| {
            let half = |first: i64| self.waves(first..first + samples / 2, step);
            let outcome = self.stepper.step(&[half(0), half(samples / 2)], LR, |_, _| Ok(()))?;
            assert!(outcome.bad_ranks.is_empty() && outcome.loss.is_finite() && outcome.grad_norm > 0.0);
            Ok(outcome.loss)
        };
        steps.map(step).collect()
    }

    /// Samples of slow waves, others in every step; of sounds all but the last are padded, and captions count on from the sample's
    /// number.
    fn waves(&self, samples: std::ops::Range<i64>, step: i64) -> Batch {
        let [c, t, y, x] = self.stepper.method.grid().pixels();
        let along = |size: i64, axis: usize| {
            let mut view = [1; 5];
            view[axis] = size;
            Tensor::arange(size, (Kind::Float, Device::Cpu)).view(view)
        };
        let count = samples.end - samples.start;
        let sample = along(count, 0) + (samples.start + 8 * step) as f64;
        let [across, down] = [0.53, 0.37].map(|turn| (&sample * turn).sin() * 0.5);
        let phase = along(t, 2) * 0.7 + along(y, 3) * down + along(x, 4) * across;
        let waves = (phase + &sample).sin().expand([count, c, t, y, x], false);
        let pixels = match self.medium {
            Medium::Picture => (waves * 100.0 + 128.0).to_kind(Kind::Uint8),
            Medium::Sound => waves,
        };
        let valid = (self.medium == Medium::Sound).then(|| (1..=count).map(|n| (y * n / count) as u32).collect());
        let text = self.text.map(|text| {
            let along = Tensor::arange(text.length, (Kind::Int64, Device::Cpu)).view([1, -1]);
            (sample.to_kind(Kind::Int64).view([-1, 1]) * 7 + along * 3)
                .remainder(text.vocabulary)
                .to_device(self.device)
        });
        let origins: Vec<Origin> = samples.map(|id| Origin { id: id as u64, epoch: step as u64, repeat: 0 }).collect();
        Batch::new(pixels.contiguous().to_device(self.device), &origins, 5).with_text(text).with_valid(valid)
    }

    /// What a checkpoint holds.
    fn state(&self) -> [Tensor; 4] {
        let flat = &self.stepper.flat;
        [&flat.master, &flat.first, &flat.second, &flat.steps].map(Tensor::shallow_clone)
    }
}

fn losses(text: &str, steps: i64, kind: Kind, device: Device) -> Result<Vec<f64>, Failed> {
    Training::new(text, kind, device)?.go(0..steps, 8)
}

fn close(ours: &[f64], theirs: &[f64], within: f64, what: &str) {
    for (step, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        let off = (ours - theirs).abs() / theirs;
        assert!(off <= within, "{what}, step {step}: loss {ours} against {theirs}, off by {off:e}");
    }
}

/// In fp32 to 1e-5; bf16 rounds every value to 2⁻⁹ of itself, and what that does grows from step to step.
fn the_tiny_configs_train_on_a_device_as_on_the_cpu() -> Outcome {
    for Tiny { text, within: [fp32, bf16] } in TINY {
        let wanted = losses(text, 20, Kind::Float, Device::Cpu)?;
        close(&losses(text, 20, Kind::Float, Device::Cuda(0))?, &wanted, fp32, "fp32 on a GPU");
        close(&losses(text, 20, Kind::BFloat16, Device::Cuda(0))?, &wanted, bf16, "bf16 on a GPU");
    }
    Ok(())
}

fn the_tiny_configs_learn_in_bf16_as_in_fp32() -> Outcome {
    for Tiny { text, within: [_, bf16] } in TINY {
        let wanted = losses(text, 4, Kind::Float, Device::Cpu)?;
        let ours = losses(text, 4, Kind::BFloat16, Device::Cpu)?;
        assert!(ours != wanted, "it was computed in fp32");
        close(&ours, &wanted, bf16, "bf16");
    }
    Ok(())
}

/// Six steps; and three and three, with all that a checkpoint holds handed over to a fresh training.
fn gone_on_with(device: Device) -> Outcome {
    for (Tiny { text, .. }, kind) in TINY.into_iter().zip([Kind::Float, Kind::BFloat16].into_iter().cycle()) {
        let [mut whole, mut first, mut second] =
            [(); 3].map(|()| Training::new(text, kind, device).expect("a training"));
        let losses = whole.go(0..6, 8)?;
        let begun = first.go(0..3, 8)?;
        no_grad(|| second.state().iter_mut().zip(first.state()).for_each(|(to, from)| to.copy_(&from)));
        second.stepper.flat.refresh();
        let ended = second.go(3..6, 8)?;
        assert_eq!([begun, ended].concat(), losses, "{kind:?}: other losses");
        for (ours, theirs) in second.state().iter().zip(whole.state()) {
            assert!(ours.equal(&theirs), "{kind:?}: weights or moments are not the same to the bit");
        }
        assert!(!whole.state()[0].equal(&first.state()[0]), "{kind:?}: nothing moved");
    }
    Ok(())
}

/// Two steps of two samples, in fp32 and bf16.
fn small(device: Device) -> Outcome {
    for kind in [Kind::Float, Kind::BFloat16] {
        Training::new(TINY[0].text, kind, device)?.go(0..2, 2)?;
    }
    Ok(())
}
