//! Tests of spectrograms that are computed on the device, against those of the loader.

use crate::data::audio::{max_difference, small_view, values};
use crate::data::audio_pipeline::packed_tones;
use crate::support::method_ext::{MethodExt, untrained};
use crate::support::{Outcome, normal, path_text, read};
use crate::train::audio_training;
use crate::train::step::{self, BATCH, BUCKET, LR, tiny_mae};
use crate::train::step_mode::{assert_no_synchronization, record_spans};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::audio::Waveform;
use occlude::data::order::rank_rows;
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::error::ExitCode;
use occlude::evaluate::Feature;
use occlude::evaluate::features::FeatureExtractor;
use occlude::grid::Grid;
use occlude::loader::DataLoader;
use occlude::op::shuffle::SampleKey;
use occlude::part::batch::Side;
use occlude::reconstruct;
use occlude::train::dump;
use occlude::train::outcome;
use occlude::train::session::{Resume, Session};
use occlude::train::step::Stepper;
use occlude::train::step_mode::{LocalBatch, StepPipeline};
use occlude::view::spectrogram::AudioView;
use occlude::view::{View, ViewKey};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

crate::trials![
    waveform_views_become_the_same_spectrograms,
    gpus_get_waveforms_and_cpus_get_spectrograms,
    steps_on_waveforms_match_steps_on_spectrograms,
    a_pipelined_step_on_waveforms_never_synchronizes,
    a_run_on_waveforms_matches_one_on_spectrograms,
];

fn raw(view: &View) -> View {
    View { audio: view.audio.clone().map(|audio| AudioView { raw_waveform: true, ..audio }), ..view.clone() }
}

/// Returns the values of a view and how many of its frames are valid.
fn view_values(
    view: &View,
    grid: &Grid,
    options: impl FnOnce(&View, &mut [u8]) -> occlude::error::Result<u32>,
) -> Result<(Vec<f32>, u32), Failed> {
    let mut out = vec![0; 4 * view.shape(grid).iter().product::<i64>() as usize];
    let valid = options(view, &mut out)?;
    Ok((out.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect(), valid))
}

fn waveform_views_become_the_same_spectrograms() -> Outcome {
    let samples = values(&normal(4, &[9000]));
    // Long and short, at three rates, and with fewer samples than the frames hold.
    let clips = [(8000, 9000), (8000, 1000), (8000, 2680), (4000, 500), (11_025, 9000), (8000, 200)];
    for seconds in [None, Some(0.25)] {
        let (full, grid) = small_view(seconds);
        let raw = raw(&full);
        assert_eq!((full.shape(&grid), raw.shape(&grid)), ([1, 1, 32, 16], [1, 1, 1, 2680]));
        let log_mel = raw.log_mel(&grid, Device::Cpu)?.ok_or("something makes spectrograms")?;
        let mut expected = Vec::new();
        let mut windows = Vec::new();
        for (rate, count) in clips {
            let clip = Waveform { sample_rate: rate, samples: &samples[..count] };
            for id in 0..3 {
                let options = |view: &View, out: &mut [u8]| match id {
                    0 => view.eval_view(&grid, clip, out),
                    _ => view.train_view(&grid, clip, ViewKey { seed: 7, id, epoch: 0 }, 0, out),
                };
                let (spectrogram, valid) = view_values(&full, &grid, options)?;
                let (window, visible) = view_values(&raw, &grid, options)?;
                assert_eq!(visible, valid, "{rate} Hz, {count} samples");
                expected.push((spectrogram, valid as usize));
                windows.push(Tensor::from_slice(&window).view([1, 1, 1, 1, -1]));
            }
        }
        let output = log_mel.forward(&Tensor::cat(&windows, 0))?;
        assert_eq!(output.size(), [expected.len() as i64, 1, 1, 32, 16]);
        for (number, (expected, valid)) in (0..).zip(&expected) {
            let output = values(&output.get(number));
            let difference = max_difference(&output, expected);
            assert!(difference < 1e-3, "clip {number} of {seconds:?}: off by {difference}");
            assert!(output[16 * valid..] == expected[16 * valid..], "padding, bit for bit");
        }
    }
    let (full, grid) = small_view(None);
    let short = Waveform { sample_rate: 8000, samples: &samples[..199] };
    let error = raw(&full).eval_view(&grid, short, &mut [0; 4 * 2680]).expect_err("nothing");
    assert!(error.code == ExitCode::Corrupt && error.message.contains("shorter than one frame"), "{error}");
    Ok(())
}

fn gpus_get_waveforms_and_cpus_get_spectrograms() -> Outcome {
    let (view, grid) = small_view(None);
    let [gpu, cpu] = [Device::Cuda(0), Device::Cpu].map(|device| view.for_device(device));
    assert_eq!((gpu == raw(&view), cpu == view), (true, true));
    assert!(cpu.log_mel(&grid, Device::Cpu)?.is_none(), "there is nothing left to do");
    assert_eq!(serde_json::to_value(&gpu)?, serde_json::to_value(&view)?, "the config does not contain it");
    let images = View::default();
    assert!(images.for_device(Device::Cuda(0)) == images && images.shape(&grid) == grid.pixel_shape());
    Ok(())
}

/// Clips of sixteen frames and filters, which the tiny model reads.
fn sixteen_frames(raw: bool) -> View {
    let audio = AudioView { sample_rate: 8000, seconds: None, mean: -3.0, std: 2.0, raw_waveform: raw };
    View { audio: Some(audio), ..View::default() }
}

fn grid() -> Grid {
    tiny_mae().grid()
}

/// Returns the local batch of a step, with some short clips.
fn local_batch(step: u64, view: &View, world: &dyn World, micro_batch: usize) -> LocalBatch {
    let rows = rank_rows(BATCH, world.rank(), world.size());
    let mut pixels = Vec::new();
    let mut keys = Vec::new();
    for id in rows {
        let samples = values(&normal(50 + step * BATCH + id, &[if id % 3 == 0 { 700 } else { 1900 }]));
        let clip = Waveform { sample_rate: 8000, samples: &samples };
        let options =
            |view: &View, out: &mut [u8]| view.train_view(&grid(), clip, ViewKey { seed: 5, id, epoch: step }, 0, out);
        let (values, _) = view_values(view, &grid(), options).expect("a view");
        pixels.push(Tensor::from_slice(&values).view(view.shape(&grid())));
        keys.push(SampleKey { id, epoch: step, repeat: 0 });
    }
    LocalBatch { views: vec![Tensor::stack(&pixels, 0)], keys, side: Side::default(), seed: 5, micro_batch }
}

fn stepper(view: &View, world: &Arc<dyn World>) -> Stepper {
    let mut stepper = step::stepper(tiny_mae(), world.clone(), Kind::Float, BUCKET);
    stepper.log_mel = view.log_mel(&grid(), world.device()).expect("filters");
    stepper
}

/// Returns the losses of some synchronous steps.
fn synchronous_losses(view: &View) -> Result<Vec<f64>, Failed> {
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let mut stepper = stepper(view, &world);
    let step = |step| {
        let batches = local_batch(step, view, world.as_ref(), 4).micro_batches(Device::Cpu)?;
        Ok(stepper.step(&batches, LR, |_, _| Ok(()))?.loss)
    };
    (0..STEPS).map(step).collect()
}

const STEPS: u64 = 6;

/// Returns the same for pipelined steps, and the number of captured parts.
pub fn pipelined_losses(world: &Arc<dyn World>) -> (Vec<f64>, usize) {
    let view = sixteen_frames(true);
    let mut stepper = stepper(&view, world);
    let mut pipeline = StepPipeline::new(BATCH, &stepper, world).expect("a pipelined step mode");
    let step = |step| pipeline.step(&mut stepper, &local_batch(step, &view, world.as_ref(), 4), LR).expect("a step");
    let mut output: Vec<outcome::Outcome> = (0..STEPS).flat_map(step).collect();
    output.extend(pipeline.flush(&stepper).expect("the last"));
    (output.iter().map(|outcome| outcome.loss).collect(), pipeline.captured_parts())
}

/// Asserts that losses are within 1e-4 of those of steps on spectrograms.
pub fn assert_losses_match(losses: &[f64]) -> Result<(), Failed> {
    let expected = synchronous_losses(&sixteen_frames(false))?;
    let difference =
        losses.iter().zip(&expected).map(|(ours, expected)| (ours - expected).abs() / expected).fold(0.0, f64::max);
    assert!(losses.len() == expected.len() && difference <= 1e-4, "off by {difference:e}: {losses:?} for {expected:?}");
    Ok(())
}

fn steps_on_waveforms_match_steps_on_spectrograms() -> Outcome {
    assert_losses_match(&synchronous_losses(&sixteen_frames(true))?)?;
    for size in [1, 2, 3] {
        for (losses, _) in run_on_threads(size, |world| pipelined_losses(&world)) {
            assert_losses_match(&losses)?;
        }
    }
    Ok(())
}

fn a_pipelined_step_on_waveforms_never_synchronizes() -> Outcome {
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let view = sixteen_frames(true);
    let mut stepper = stepper(&view, &world);
    let mut pipeline = StepPipeline::new(BATCH, &stepper, &world)?;
    assert_no_synchronization(&record_spans(|step| {
        drop(pipeline.step(&mut stepper, &local_batch(step, &view, world.as_ref(), 4), LR).expect("a step"));
    }));
    Ok(())
}

/// Returns the results of the first step of a run: the dump, and the reconstruction sheet, class tokens and statistics
/// of the samples of the step.
fn first_step(raw: bool, clips: &str, folder: &Path) -> Result<(BTreeMap<String, Tensor>, Vec<Tensor>), Failed> {
    let mut config = Config::parse(&audio_training::config(clips, 2)?.to_string(), &[])?;
    config.view.audio.as_mut().ok_or("a view of sounds")?.raw_waveform = raw;
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let mut run = Session::open(&config, &path_text(folder), &Resume::Never, &world)?;
    let order = run.sample_order.take().ok_or("an order")?;
    let rows = DataLoader::for_training(run.loader.clone(), order, 6, 0, 1, 0..1)?.next().ok_or("a step")??;
    let [_, .., width] = run.loader.shape;
    assert_eq!((rows.pixels.size()[4], raw), (width, width > 32), "waveforms where they are requested");
    let local = LocalBatch {
        views: vec![rows.pixels.shallow_clone()],
        keys: rows.keys(),
        side: rows.side.slice(0..rows.ids.len())?,
        seed: 5,
        micro_batch: 4,
    };
    let micro_batches = local.micro_batches(Device::Cpu)?;
    run.stepper.step(&micro_batches, LR, |stepper, outcome| {
        let dump = dump::StepDump {
            step: 0,
            rank: 0,
            method: config.method.name(),
            micro_batches: &micro_batches,
            outcome,
            lr: LR,
            weight_decay: 0.0,
        };
        dump::write_step(folder, stepper, &dump)
    })?;
    let subject = reconstruct::Subject {
        method: run.stepper.method.as_ref(),
        weights: &run.stepper.flat.leaves,
        buffers: &run.stepper.buffers,
        log_mel: run.stepper.log_mel.as_ref(),
    };
    let sheet = reconstruct::sheet(&subject, &run.loader, &config)?.into_raw();
    let mut visible = vec![Tensor::from_slice(&sheet).to_kind(Kind::Float) / 255.0];
    for feature in [Feature::Class, Feature::Statistics] {
        let extractor = FeatureExtractor::new(untrained(config.clone())?, Some(feature), None)?;
        visible.push(extractor.features(&rows)?);
    }
    run.close();
    Ok((read(&folder.join("dump/step-00000000-rank-0.safetensors"))?, visible))
}

fn a_run_on_waveforms_matches_one_on_spectrograms() -> Outcome {
    let (folder, clips) = packed_tones()?;
    let run = |raw, name: &str| first_step(raw, &path_text(&clips), &folder.path().join(name));
    let (expected, images) = run(false, "plain")?;
    let (ours, visible) = run(true, "raw")?;
    assert!(expected.keys().eq(ours.keys()) && expected.contains_key("input"));
    let difference = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    for (name, expected) in &expected {
        assert_eq!(expected.size(), ours[name].size(), "{name}");
        let difference = difference(expected, &ours[name]);
        assert!(difference <= 1e-3, "{name} is off by {difference}");
    }
    assert!(expected["keep"].equal(&ours["keep"]), "the same tokens are hidden");
    for (expected, visible) in images.iter().zip(&visible) {
        let difference = difference(expected, visible);
        assert!(difference <= 1e-2, "{:?} is off by {difference}", expected.size());
    }
    Ok(())
}
