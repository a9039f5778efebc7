//! Spectrograms that are made where a model computes, beside those of a feed.

use crate::listen::packed;
use crate::pace::{asks_nothing, spans};
use crate::shard::text;
use crate::sound::{furthest, values, view};
use crate::speech;
use crate::step::{self, BATCH, BUCKET, LR, tiny};
use crate::support::{Outcome, normal, read};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::order::rows;
use occlude::data::sound::Clip;
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::fault::Code;
use occlude::feed::Feed;
use occlude::grid::Grid;
use occlude::method::Method;
use occlude::op::shuffle::Origin;
use occlude::optim::flat::Flat;
use occlude::part::view::View;
use occlude::part::view::spectrogram::Sound;
use occlude::run::evaluate::{Feature, features::Encoder};
use occlude::run::open::{Resume, open};
use occlude::run::pace::{Ahead, Share};
use occlude::run::step::{Outcome as Told, Stepper};
use occlude::run::{dump, reconstruct};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

crate::trials![
    a_view_that_stays_samples_becomes_the_same_spectrogram,
    a_gpu_is_fed_samples_and_a_cpu_spectrograms,
    steps_on_samples_take_the_path_of_steps_on_spectrograms,
    a_step_ahead_on_samples_asks_nothing_of_the_device,
    a_run_on_samples_sees_and_shows_what_one_on_spectrograms_does,
];

fn raw(view: &View) -> View {
    View { sound: view.sound.clone().map(|sound| Sound { raw: true, ..sound }), ..view.clone() }
}

/// A view's values, and how many of its frames show the sound.
fn seen(
    view: &View,
    grid: &Grid,
    make: impl FnOnce(&View, &mut [u8]) -> occlude::fault::Result<u32>,
) -> Result<(Vec<f32>, u32), Failed> {
    let mut out = vec![0; 4 * view.shape(grid).iter().product::<i64>() as usize];
    let valid = make(view, &mut out)?;
    Ok((out.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect(), valid))
}

fn a_view_that_stays_samples_becomes_the_same_spectrogram() -> Outcome {
    let samples = values(&normal(4, &[9000]));
    // Long and short, at three rates, and with less to show than the frames hold.
    let sounds = [(8000, 9000), (8000, 1000), (8000, 2680), (4000, 500), (11_025, 9000), (8000, 200)];
    for seconds in [None, Some(0.25)] {
        let (whole, grid) = view(seconds);
        let raw = raw(&whole);
        assert_eq!((whole.shape(&grid), raw.shape(&grid)), ([1, 1, 32, 16], [1, 1, 1, 2680]));
        let log_mel = raw.log_mel(&grid, Device::Cpu)?.ok_or("something makes spectrograms")?;
        let (mut wanted, mut windows) = (Vec::new(), Vec::new());
        for (rate, count) in sounds {
            let clip = Clip { rate, samples: &samples[..count] };
            for id in 0..3 {
                let make = |view: &View, out: &mut [u8]| match id {
                    0 => view.eval(&grid, clip, out),
                    _ => view.train(&grid, clip, 7, id, 0, 0, out),
                };
                let ((spectrogram, valid), (window, shown)) = (seen(&whole, &grid, make)?, seen(&raw, &grid, make)?);
                assert_eq!(shown, valid, "{rate} Hz, {count} samples");
                wanted.push((spectrogram, valid as usize));
                windows.push(Tensor::from_slice(&window).view([1, 1, 1, 1, -1]));
            }
        }
        let made = log_mel.of(&Tensor::cat(&windows, 0))?;
        assert_eq!(made.size(), [wanted.len() as i64, 1, 1, 32, 16]);
        for (number, (wanted, valid)) in (0..).zip(&wanted) {
            let made = values(&made.get(number));
            let off = furthest(&made, wanted);
            assert!(off < 1e-3, "sound {number} of {seconds:?}: off by {off}");
            assert!(made[16 * valid..] == wanted[16 * valid..], "padding, to the bit");
        }
    }
    let (whole, grid) = view(None);
    let short = Clip { rate: 8000, samples: &samples[..199] };
    let fault = raw(&whole).eval(&grid, short, &mut [0; 4 * 2680]).expect_err("nothing");
    assert!(fault.code == Code::Corrupt && fault.message.contains("shorter than one frame"), "{fault}");
    Ok(())
}

fn a_gpu_is_fed_samples_and_a_cpu_spectrograms() -> Outcome {
    let (view, grid) = view(None);
    let [gpu, cpu] = [Device::Cuda(0), Device::Cpu].map(|device| view.on(device));
    assert_eq!((gpu == raw(&view), cpu == view), (true, true));
    assert!(cpu.log_mel(&grid, Device::Cpu)?.is_none(), "there is nothing left to do");
    assert_eq!(serde_json::to_value(&gpu)?, serde_json::to_value(&view)?, "a config says nothing of it");
    let pictures = View::default();
    assert!(pictures.on(Device::Cuda(0)) == pictures && pictures.shape(&grid) == grid.pixels());
    Ok(())
}

/// Sounds of sixteen frames and filters, which the tiny model reads.
fn sixteen(raw: bool) -> View {
    let sound = Sound { rate: 8000, seconds: None, mean: -3.0, std: 2.0, raw };
    View { sound: Some(sound), ..View::default() }
}

fn grid() -> Grid {
    *tiny().grid()
}

/// This rank's share of a step's sounds, some of them short.
fn share(step: u64, view: &View, world: &dyn World, micro: usize) -> Share {
    let own = rows(BATCH, world.rank(), world.size());
    let (mut pixels, mut origins) = (Vec::new(), Vec::new());
    for id in own {
        let samples = values(&normal(50 + step * BATCH + id, &[if id % 3 == 0 { 700 } else { 1900 }]));
        let clip = Clip { rate: 8000, samples: &samples };
        let make = |view: &View, out: &mut [u8]| view.train(&grid(), clip, 5, id, step, 0, out);
        let (values, _) = seen(view, &grid(), make).expect("a view");
        pixels.push(Tensor::from_slice(&values).view(view.shape(&grid())));
        origins.push(Origin { id, epoch: step, repeat: 0 });
    }
    Share { pixels: Tensor::stack(&pixels, 0), origins, text: None, valid: None, seed: 5, micro }
}

fn stepper(view: &View, world: &Arc<dyn World>) -> Stepper {
    let mut stepper = step::stepper(tiny(), world.clone(), Kind::Float, BUCKET);
    stepper.log_mel = view.log_mel(&grid(), world.device()).expect("filters");
    stepper
}

/// The losses of some steps that the host looks at.
fn watched(view: &View) -> Result<Vec<f64>, Failed> {
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let mut stepper = stepper(view, &world);
    let step = |step| {
        let batches = share(step, view, world.as_ref(), 4).batches(Device::Cpu)?;
        Ok(stepper.step(&batches, LR, |_, _| Ok(()))?.loss)
    };
    (0..STEPS).map(step).collect()
}

const STEPS: u64 = 6;

/// The same ahead of the device; and how many parts of one were captured.
pub fn ahead(world: &Arc<dyn World>) -> (Vec<f64>, usize) {
    let view = sixteen(true);
    let mut stepper = stepper(&view, world);
    let mut ahead = Ahead::new(BATCH, &stepper, world).expect("a pace");
    let step = |step| ahead.step(&mut stepper, &share(step, &view, world.as_ref(), 4), LR).expect("a step");
    let mut told: Vec<Told> = (0..STEPS).flat_map(step).collect();
    told.extend(ahead.settle(&stepper).expect("the last"));
    (told.iter().map(|outcome| outcome.loss).collect(), ahead.captured())
}

/// What steps on spectrograms lose, from which others may be a ten-thousandth away.
pub fn agrees(losses: &[f64]) -> Result<(), Failed> {
    let wanted = watched(&sixteen(false))?;
    let off = losses.iter().zip(&wanted).map(|(ours, wanted)| (ours - wanted).abs() / wanted).fold(0.0, f64::max);
    assert!(losses.len() == wanted.len() && off <= 1e-4, "off by {off:e}: {losses:?} for {wanted:?}");
    Ok(())
}

fn steps_on_samples_take_the_path_of_steps_on_spectrograms() -> Outcome {
    agrees(&watched(&sixteen(true))?)?;
    for size in [1, 2, 3] {
        for (losses, _) in threads(size, |world| ahead(&world)) {
            agrees(&losses)?;
        }
    }
    Ok(())
}

fn a_step_ahead_on_samples_asks_nothing_of_the_device() -> Outcome {
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let view = sixteen(true);
    let mut stepper = stepper(&view, &world);
    let mut ahead = Ahead::new(BATCH, &stepper, &world)?;
    asks_nothing(&spans(|step| {
        drop(ahead.step(&mut stepper, &share(step, &view, world.as_ref(), 4), LR).expect("a step"));
    }));
    Ok(())
}

/// What a run leaves of its first step: the dump, the sheet of pictures, class tokens and statistics of the step's samples.
fn first_step(raw: bool, sounds: &str, folder: &Path) -> Result<(BTreeMap<String, Tensor>, Vec<Tensor>), Failed> {
    let mut config = Config::parse(&speech::config(sounds, 2)?.to_string(), &[])?;
    config.view.sound.as_mut().ok_or("a view of sounds")?.raw = raw;
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let mut run = open(&config, &text(folder), &Resume::Never, &world)?;
    let order = run.order.take().ok_or("an order")?;
    let rows = Feed::train(run.source.clone(), order, 6, 0, 1, 0..1)?.next().ok_or("a step")??;
    let [_, .., width] = run.source.shape;
    assert_eq!((rows.pixels.size()[4], raw), (width, width > 32), "samples where they are asked for");
    let share = Share {
        pixels: rows.pixels.shallow_clone(),
        origins: rows.origins(),
        text: None,
        valid: Some(rows.valid.clone()),
        seed: 5,
        micro: 4,
    };
    let micro = share.batches(Device::Cpu)?;
    run.stepper.step(&micro, LR, |stepper, outcome| dump::write(folder, 0, 0, stepper, &micro, outcome, LR, 0.0))?;
    let sheet = reconstruct::sheet(&run.stepper, &run.source, &config)?.into_raw();
    let mut seen = vec![Tensor::from_slice(&sheet).to_kind(Kind::Float) / 255.0];
    for feature in [Feature::Class, Feature::Statistics] {
        let method = config.method.build(&config.input)?;
        let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
        seen.push(Encoder::new(config.clone(), method, flat, Some(feature))?.features(&rows)?);
    }
    run.close();
    Ok((read(&folder.join("dump/step-00000000-rank-0.safetensors"))?, seen))
}

fn a_run_on_samples_sees_and_shows_what_one_on_spectrograms_does() -> Outcome {
    let (folder, sounds) = packed()?;
    let run = |raw, name: &str| first_step(raw, &text(&sounds), &folder.path().join(name));
    let ((wanted, pictures), (got, shown)) = (run(false, "plain")?, run(true, "raw")?);
    assert!(wanted.keys().eq(got.keys()) && wanted.contains_key("input"));
    let off = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    for (name, wanted) in &wanted {
        assert_eq!(wanted.size(), got[name].size(), "{name}");
        let off = off(wanted, &got[name]);
        assert!(off <= 1e-3, "{name} is off by {off}");
    }
    assert!(wanted["keep"].equal(&got["keep"]), "the same tokens are hidden");
    for (wanted, shown) in pictures.iter().zip(&shown) {
        let off = off(wanted, shown);
        assert!(off <= 1e-2, "{:?} is off by {off}", wanted.size());
    }
    Ok(())
}
