//! A training on a CUDA device beside the same on the CPU, and steps as graphs beside the same one by one.

use crate::bridge::run;
use crate::flip;
use crate::log_mel;
use crate::step::{BATCH, BUCKET, LR, Path, input, load, optim, state, stepper};
use crate::support::{Outcome, skipped};
use libtest_mimic::{Failed, Trial};
use occlude::bridge::cuda;
use occlude::device::World;
use occlude::device::solo::Solo;
use occlude::fault::{Fault, Result};
use occlude::method::{Method, mae};
use occlude::optim::flat::Flat;
use occlude::optim::update::Updater;
use occlude::run::pace::{Ahead, Share};
use occlude::run::step::{self, Counts, Stepper};
use serde_json::json;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path as File;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor, no_grad};

type OnDevice = fn() -> Result<()>;

/// What needs a device, each in a process of its own: test, case, body.
const ON_A_DEVICE: [(&str, &str, OnDevice); 10] = [
    ("a_training_on_a_device_takes_the_path_of_the_cpu", "gpu-path", path),
    ("captured_steps_take_the_path_of_the_cpu_also_in_ragged_micro_batches", "gpu-captured", captured),
    ("captured_steps_with_captions_take_the_path_of_the_cpu", "gpu-captions", captions),
    ("captured_steps_on_samples_take_the_path_of_the_cpu_on_spectrograms", "gpu-sounds", sounds),
    ("captured_steps_equal_the_same_steps_queued_one_by_one_to_the_bit", "gpu-equal", equal),
    ("captured_steps_of_shards_equal_those_of_the_whole_to_the_bit", "gpu-shards", shards),
    ("a_training_that_is_taken_up_again_equals_one_that_went_on_to_the_bit", "gpu-resumed", resumed),
    ("a_bad_step_is_refused_inside_a_graph", "gpu-refused", refused),
    ("captured_steps_take_no_more_memory", "gpu-memory", memory),
    ("a_loss_that_asks_the_device_ends_the_training_instead_of_being_captured", "gpu-curious", curious),
];

pub fn trials() -> Vec<Trial> {
    let trial = |(name, case, _): (&str, &'static str, OnDevice)| {
        let name = format!("gpu_step::{name}");
        match File::new("/dev/nvidiactl").exists() {
            true => Trial::test(name, move || -> Outcome {
                let (code, told, why) = run(case)?;
                if code == Some(0) { Ok(()) } else { Err(Failed::from(format!("{code:?}\n{told}{why}"))) }
            }),
            false => skipped(&name, "no CUDA device here"),
        }
    };
    ON_A_DEVICE.into_iter().map(trial).collect()
}

/// The case of that name. Returns the exit code.
pub fn case(name: &str) -> i32 {
    let (_, _, case) = ON_A_DEVICE.into_iter().find(|(_, case, _)| *case == name).expect("a case");
    occlude::bridge::open_cuda();
    match case() {
        Ok(()) => 0,
        Err(fault) => {
            eprintln!("{fault}");
            1
        }
    }
}

fn gpu() -> Arc<dyn World> {
    Arc::new(Solo::new(Device::Cuda(0)))
}

fn path() -> Result<()> {
    for micro in [BATCH, 3] {
        Path::of(gpu(), 30, BATCH, micro).agrees(&Path::solo(30, BATCH), "on a GPU");
    }
    Ok(())
}

fn captured() -> Result<()> {
    for (micro, parts) in [(BATCH, 1), (5, 2), (3, 2)] {
        let (path, captured) = Path::ahead(gpu(), 20, BATCH, micro);
        path.agrees(&Path::solo(20, BATCH), &format!("captured, micro-batches of {micro}"));
        assert_eq!(
            captured, parts,
            "micro-batches of {micro}: one part that adds up where there are several, and the last"
        );
    }
    Ok(())
}

/// Heads of 32 and 24 in bf16: our own kernels, which sum in one order.
fn exact() -> mae::Mae {
    let config = json!({
        "encoder": {"width": 64, "depth": 2, "heads": 2}, "decoder": {"width": 48, "depth": 1, "heads": 2},
        "mask": {"ratio": 0.75},
    });
    mae::Mae::new(&serde_json::from_value(config).expect("numbers"), &input()).expect("a method")
}

/// A training ahead on the device.
struct Run {
    // Dropped before what its graphs read and write.
    ahead: Ahead,
    stepper: Stepper,
}

impl Run {
    fn new() -> Result<Run> {
        Run::of(false)
    }

    fn of(sharded: bool) -> Result<Run> {
        let (method, world, config) = (exact(), gpu(), optim());
        let place = (Kind::BFloat16, world.device());
        let flat = match sharded {
            true => Flat::sharded(method.table(), 7, place, BUCKET, (0, 1))?,
            false => Flat::new(method.table(), 7, place.0, place.1)?,
        };
        let updater = Updater::new(&flat, &config);
        let stepper = Stepper::new(Box::new(method), flat, updater, world.clone(), BUCKET, Duration::from_secs(60))?;
        Ok(Run { ahead: Ahead::new(BATCH, &stepper, &world)?, stepper })
    }

    /// Steps and their losses.
    fn go(&mut self, steps: std::ops::Range<u64>) -> Result<Vec<f64>> {
        let mut told: Vec<step::Outcome> = Vec::new();
        for step in steps {
            told.extend(self.ahead.step(&mut self.stepper, &load(step, BATCH, gpu().as_ref(), 4), LR)?);
        }
        told.extend(self.ahead.settle(&self.stepper)?);
        assert!(told.iter().all(|outcome| outcome.bad_ranks.is_empty()));
        Ok(told.iter().map(|outcome| outcome.loss).collect())
    }
}

/// The losses of ten steps of two towers, and how many parts were captured.
fn pairs(towers: &'static str, world: &Arc<dyn World>) -> Result<(Vec<f64>, usize)> {
    let mut stepper = flip::stepper(towers, world.clone());
    let mut ahead = Ahead::new(flip::PAIRS, &stepper, world)?;
    let mut told: Vec<step::Outcome> = Vec::new();
    for step in 0..10 {
        told.extend(ahead.step(&mut stepper, &flip::share(step, world.as_ref()), LR)?);
    }
    told.extend(ahead.settle(&stepper)?);
    Ok((told.iter().map(|outcome| outcome.loss).collect(), ahead.captured()))
}

/// Likenesses are multiplied by 14 ahead of their exponentials, and what a device rounds otherwise with them: 1e-4.
fn captions() -> Result<()> {
    let cpu: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    for towers in ["plain", "clip"] {
        let (wanted, _) = pairs(towers, &cpu)?;
        let (losses, captured) = pairs(towers, &gpu())?;
        assert_eq!((losses.len(), captured), (10, 1));
        let off = losses.iter().zip(&wanted).map(|(ours, theirs)| (ours - theirs).abs() / theirs).fold(0.0, f64::max);
        assert!(off <= 1e-4, "{towers}: off by {off:e}: {losses:?} for {wanted:?}");
    }
    Ok(())
}

fn sounds() -> Result<()> {
    let (losses, captured) = log_mel::ahead(&gpu());
    log_mel::agrees(&losses).map_err(|failed| Fault::failed(failed.message().unwrap_or("they differ")))?;
    assert_eq!(captured, 2, "micro-batches of four, and one of the last two");
    Ok(())
}

fn equal() -> Result<()> {
    let mut run = Run::new()?;
    let losses = run.go(0..20)?;
    assert_eq!(run.ahead.captured(), 2);
    // The same parts, never captured.
    let mut plain = Run::new()?.stepper;
    let counts = Counts { own: plain.counts(BATCH as i64), all: plain.counts(BATCH as i64) };
    let rates = Tensor::from_slice(&plain.updater.rates(LR)).to_device(Device::Cuda(0));
    for step in 0..20 {
        let batches = load(step, BATCH, gpu().as_ref(), 4).batches(Device::Cuda(0))?;
        plain.begin()?;
        for (index, batch) in batches.iter().enumerate() {
            plain.accumulate(batch, &counts, index + 1 == batches.len())?;
        }
        let numbers = Vec::<f64>::try_from(&plain.conclude(&rates)?.to_device(Device::Cpu))?;
        let loss = plain.outcome(&numbers, &counts).loss;
        assert_eq!(
            loss.to_bits(),
            losses[step as usize].to_bits(),
            "step {step}: {loss} for {}",
            losses[step as usize]
        );
    }
    assert!(state(&run.stepper) == state(&plain), "the weights differ");
    assert!(losses[19] < losses[0], "nothing is learned: {losses:?}");
    Ok(())
}

/// The first part gathers, and so is another than the second of as many samples.
fn shards() -> Result<()> {
    let (mut whole, mut shards) = (Run::new()?, Run::of(true)?);
    let [ours, theirs] = [shards.go(0..12)?, whole.go(0..12)?];
    assert!(ours.iter().zip(&theirs).all(|(a, b)| a.to_bits() == b.to_bits()), "{ours:?}\n{theirs:?}");
    assert_eq!((shards.ahead.captured(), whole.ahead.captured()), (3, 2));
    Ok(())
}

fn resumed() -> Result<()> {
    let mut whole = Run::new()?;
    let losses = whole.go(0..12)?;
    let mut first = Run::new()?;
    let begun = first.go(0..6)?;
    let mut second = Run::new()?;
    let parts = |run: &Run| {
        let (flat, average) = (&run.stepper.flat, run.stepper.updater.average.as_ref().expect("an average"));
        [&flat.master, &flat.compute, &flat.first, &flat.second, &flat.steps, average].map(Tensor::shallow_clone)
    };
    no_grad(|| parts(&second).iter_mut().zip(parts(&first)).for_each(|(to, from)| to.copy_(&from)));
    cuda::synchronize(0)?;
    let ended = second.go(6..12)?;
    let both = [begun, ended].concat();
    assert!(both.iter().zip(&losses).all(|(a, b)| a.to_bits() == b.to_bits()), "{both:?}\n{losses:?}");
    assert!(state(&second.stepper) == state(&whole.stepper), "the weights differ");
    Ok(())
}

fn refused() -> Result<()> {
    let mut run = Run::new()?;
    let floats = |step, bad: bool| {
        let share = load(step, BATCH, gpu().as_ref(), 4);
        let pixels = share.pixels.to_kind(Kind::Float) / 64.0 - 2.0;
        if bad {
            let _ = pixels.get(0).get(0).get(0).get(9).get(5).fill_(f64::NAN);
        }
        Share { pixels, ..share }
    };
    for step in 0..6 {
        run.ahead.step(&mut run.stepper, &floats(step, false), LR)?;
    }
    run.ahead.settle(&run.stepper)?;
    assert_eq!(run.ahead.captured(), 2);
    let before = state(&run.stepper);
    assert!(run.ahead.step(&mut run.stepper, &floats(6, true), LR)?.is_none());
    let bad = run.ahead.settle(&run.stepper)?.expect("its outcome");
    assert!(bad.bad_ranks == [0] && !bad.loss.is_finite(), "{bad:?}");
    assert!(state(&run.stepper) == before, "a refused step has moved something");
    run.ahead.step(&mut run.stepper, &floats(7, false), LR)?;
    let good = run.ahead.settle(&run.stepper)?.expect("its outcome");
    assert!(good.bad_ranks.is_empty() && good.loss.is_finite() && state(&run.stepper) != before, "{good:?}");
    Ok(())
}

fn memory() -> Result<()> {
    let mut run = Run::new()?;
    run.go(0..6)?;
    let after = cuda::memory(0)?;
    run.go(6..20)?;
    let later = cuda::memory(0)?;
    assert_eq!((later.allocated, later.reserved), (after.allocated, after.reserved));
    Ok(())
}

/// A loss that looks at a number runs as it is, and ends the training where it would be captured.
fn curious() -> Result<()> {
    let world = gpu();
    let mut stepper = stepper(crate::pace::curious(), world.clone(), Kind::Float, BUCKET);
    let mut ahead = Ahead::new(BATCH, &stepper, &world)?;
    let mut step = |step| {
        let share = load(step, BATCH, world.as_ref(), BATCH);
        catch_unwind(AssertUnwindSafe(|| ahead.step(&mut stepper, &share, LR))).is_ok_and(|told| told.is_ok())
    };
    assert_eq!([0, 1, 2, 3].map(&mut step), [true, true, true, false]);
    // libtorch's allocator is not to be relied on any more.
    std::process::exit(0)
}
