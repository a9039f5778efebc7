//! Tests of audio from packing to training: pack, inspect, config, batches, training, reconstruction.

use crate::support::training_job::{Run, occlude_command};
use crate::support::{Outcome, path_text};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::audio::{AudioDecoder, probe, wav};
use occlude::data::decode::ImageLimits;
use occlude::data::mixture::Mixture;
use occlude::data::modality::Modality;
use occlude::data::order::SampleOrder;
use occlude::data::pack::{PackOptions, VideoOptions, pack};
use occlude::data::set::DataSet;
use occlude::data::shard::AUDIO_EXTENSIONS;
use occlude::error::ExitCode;
use occlude::loader::{DataLoader, Labels, LoadedRows, LoaderOptions};
use occlude::view::ViewKey;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    folders_of_audio_are_packed,
    a_list_of_audio_files_is_packed,
    audio_is_resampled_to_the_requested_rate,
    undecodable_audio_is_skipped,
    images_and_audio_are_not_confused,
    inspect_counts_an_audio_data_set,
    an_audio_config_is_checked,
    image_keys_in_an_audio_config_are_rejected,
    any_number_of_ranks_reads_the_same_batch,
    audio_training_learns_and_resumes_bit_for_bit,
    audio_files_are_reconstructed_as_spectrograms,
];

/// Writes `each` tones for each of `classes` pitches, of 0.1 to 0.9 s at 8 kHz: `tone-K/NN.wav`.
fn tones(folder: &Path, classes: usize, each: usize) -> Outcome {
    for class in 0..classes {
        let path = folder.join(format!("tone-{class}"));
        std::fs::create_dir_all(&path)?;
        for number in 0..each {
            std::fs::write(path.join(format!("{number:02}.wav")), tone(class, number))?;
        }
    }
    Ok(())
}

fn tone(class: usize, number: usize) -> Vec<u8> {
    let seconds = 0.1 + 0.8 * (number * 7 % 10) as f64 / 9.0;
    let pitch = 300.0 * (class + 1) as f64 * (1.0 + 0.01 * number as f64);
    let sample = |at: usize| {
        let noise =
            (at as u32 * 31 + number as u32 * 101).wrapping_mul(2_654_435_761) as f64 / f64::from(u32::MAX) - 0.5;
        (0.5 * (TAU * pitch * at as f64 / 8000.0).sin() + 0.02 * noise) as f32
    };
    wav::encode(8000, &(0..(seconds * 8000.0) as usize).map(sample).collect::<Vec<_>>())
}

fn options() -> PackOptions {
    PackOptions {
        name: Some("tones".into()),
        samples_per_shard: 7,
        modality: Modality::Audio,
        ..PackOptions::default()
    }
}

/// Returns a folder with 3 × 8 tones in `in/`, packed into `out/`.
pub fn packed_tones() -> Result<(tempfile::TempDir, PathBuf), Failed> {
    let folder = tempfile::tempdir()?;
    tones(&folder.path().join("in"), 3, 8)?;
    let out = folder.path().join("out");
    pack(&path_text(folder.path().join("in")), &path_text(&out), &options())?;
    Ok((folder, out))
}

/// Class and bytes of every sample, by its key.
type Samples = BTreeMap<String, (Option<i64>, Vec<u8>)>;

fn read_samples(out: &Path) -> Result<Samples, Failed> {
    let set = DataSet::open(&path_text(out))?;
    let sample = |index| -> Result<_, Failed> {
        let (shard, row) = set.find_sample(index)?;
        Ok((shard.key(row).to_owned(), (shard.read_label(row)?, shard.read(row, AUDIO_EXTENSIONS)?)))
    };
    (0..set.len()).map(sample).collect()
}

fn folders_of_audio_are_packed() -> Outcome {
    let (folder, out) = packed_tones()?;
    let found = read_samples(&out)?;
    assert_eq!(found.len(), 24);
    for (class, number) in (0..3).flat_map(|class| (0..8).map(move |number| (class, number))) {
        let (label, bytes) = &found[&format!("tone-{class}_{number:02}")];
        assert_eq!(*label, Some(class as i64));
        assert!(*bytes == tone(class, number), "bytes are stored unchanged");
    }
    assert_eq!(DataSet::open(&path_text(&out))?.classes, ["tone-0", "tone-1", "tone-2"]);
    // Any number of threads makes the same tars.
    let second = folder.path().join("again");
    pack(&path_text(folder.path().join("in")), &path_text(&second), &PackOptions { threads: 3, ..options() })?;
    for file in ["tones-000000.tar", "tones-000003.tar", "tones-000001.tar.idx"] {
        assert!(std::fs::read(out.join(file))? == std::fs::read(second.join(file))?, "{file}");
    }
    Ok(())
}

fn a_list_of_audio_files_is_packed() -> Outcome {
    let folder = tempfile::tempdir()?;
    tones(&folder.path().join("in"), 2, 3)?;
    let rows =
        (0..3).map(|n| json!({"path": format!("tone-1/{n:02}.wav"), "caption": format!("tone {n}"), "by": "us"}));
    let lines: Vec<String> = rows.map(|row| row.to_string()).collect();
    let list = folder.path().join("in/list.jsonl");
    std::fs::write(&list, lines.join("\n"))?;
    let out = folder.path().join("out");
    pack(&path_text(&list), &path_text(&out), &options())?;
    let set = DataSet::open(&path_text(&out))?;
    assert_eq!(set.len(), 3);
    let (shard, row) = set.find_sample(0)?;
    assert!(String::from_utf8(shard.read(row, &["txt"])?)?.starts_with("tone "));
    assert_eq!(shard.read(row, &["json"])?, br#"{"by":"us"}"#);
    assert!(shard.has_member(row, "wav"));
    Ok(())
}

fn audio_is_resampled_to_the_requested_rate() -> Outcome {
    let (folder, plain) = packed_tones()?;
    let out = folder.path().join("fast");
    let words = ["pack", &path_text(folder.path().join("in")), &path_text(&out), "--audio", "--sample-rate", "16000"]
        .map(String::from);
    let output = occlude_command(&words.each_ref().map(String::as_str)).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut decoder = AudioDecoder::new(Default::default());
    for ((key, (_, slow)), (other, (_, fast))) in read_samples(&plain)?.into_iter().zip(read_samples(&out)?) {
        assert_eq!(key, other);
        let slow = probe(&slow, &Default::default())?;
        let clip = decoder.decode(&fast)?;
        assert_eq!((clip.sample_rate, clip.samples.len() as u64), (16_000, 2 * slow.samples), "{key}");
        let loud = (clip.samples.iter().map(|x| x * x).sum::<f32>() / clip.samples.len() as f32).sqrt();
        assert!((loud - 0.5 / 2f32.sqrt()).abs() < 0.02, "{key}: {loud}");
    }
    Ok(())
}

fn undecodable_audio_is_skipped() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    tones(&source, 1, 8)?;
    let cut = tone(0, 3);
    std::fs::write(source.join("tone-0/03.wav"), &cut[..cut.len() - 5])?;
    std::fs::write(source.join("tone-0/04.ogg"), b"OggS and nothing")?;
    let some = PackOptions { max_corrupt_fraction: 0.5, ..options() };
    let packed = pack(&path_text(&source), &path_text(folder.path().join("out")), &some)?;
    assert_eq!((packed.data_sets[0].1.samples, packed.skipped.len()), (7, 2), "{:?}", packed.skipped);
    assert!(
        packed.skipped.iter().any(|(name, why)| name.contains("03.wav") && why.contains("truncated")),
        "{:?}",
        packed.skipped
    );
    let error = pack(&path_text(&source), &path_text(folder.path().join("none")), &options())
        .expect_err("one corrupt clip in a hundred");
    assert!(error.code == ExitCode::Corrupt && error.message.contains("audio files are unreadable"), "{error}");
    Ok(())
}

fn images_and_audio_are_not_confused() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    tones(&source, 1, 2)?;
    let out = path_text(folder.path().join("out"));
    let usage = |options: PackOptions, word: &str| {
        let error = pack(&path_text(&source), &out, &options).expect_err("it went through");
        assert!(error.code == ExitCode::Usage && error.message.contains(word), "{error}");
    };
    let images = "(.jpg, .jpeg, .png, .webp, .mp4, .webm, .mkv, .avi, .mov, .m4v)";
    usage(PackOptions::default(), &format!("holds no image {images}; audio is packed with --audio"));
    usage(PackOptions { sample_rate: Some(16_000), ..PackOptions::default() }, "a sample rate is for audio");
    usage(PackOptions { sample_rate: Some(10), ..options() }, "the sample rate is 10");
    usage(PackOptions { resize: Some(10), ..options() }, "audio has no size");
    usage(
        PackOptions { video: VideoOptions { fps: Some(5.0), ..VideoOptions::default() }, ..options() },
        "audio has no size",
    );
    // A training on data that the config does not describe ends before it begins.
    let run = |config: &Value| {
        let end = Run::new(config).start(0, &[]).end(60);
        assert_eq!(end.code, 2, "{}", end.stderr);
        end.stderr
    };
    let (_folder, clips) = packed_tones()?;
    let mut pictured = crate::support::training_job::tiny_config();
    pictured["data"]["train"] = json!(clips);
    assert!(
        run(&pictured).contains("tones holds audio files, and the config's view is of images; configure view.audio")
    );
    let mut audio_config = config(&clips);
    audio_config["data"]["train"] = crate::support::training_job::tiny_config()["data"]["train"].clone();
    assert!(run(&audio_config).contains("holds images, and the config's view is of audio files; leave view.audio out"));
    Ok(())
}

fn inspect_counts_an_audio_data_set() -> Outcome {
    let (folder, out) = packed_tones()?;
    let output = occlude_command(&["inspect", &path_text(&out)]).current_dir(folder.path()).output()?;
    let printed = String::from_utf8(output.stdout)?;
    assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    let text: Value = serde_json::from_str(printed.lines().last().ok_or("nothing")?)?;
    let seconds: f64 = (0..8).map(|n| 0.1 + 0.8 * f64::from(n * 7 % 10) / 9.0).sum::<f64>() * 3.0;
    for (key, expected) in [
        ("samples", json!(24)),
        ("audio_files", json!(24)),
        ("images", json!(0)),
        ("members", json!({"cls": 24, "wav": 24})),
        ("classes", json!({"tone-0": 8, "tone-1": 8, "tone-2": 8})),
        ("sample_rates", json!({"8000": 24})),
        ("channels", json!({"1": 24})),
        ("verdict", json!("ok")),
        ("unreadable", json!([])),
        ("sheet", json!("tones-sheet.png")),
    ] {
        assert_eq!(text[key], expected, "{key}");
    }
    assert!((text["seconds_total"].as_f64().ok_or("a number")? - seconds).abs() < 0.01, "{text}");
    let bins = text["seconds"].as_array().ok_or("bins")?;
    assert_eq!(bins.iter().map(|bin| bin["count"].as_u64().unwrap_or(0)).sum::<u64>(), 24);
    assert!(printed.contains("hours of audio") && printed.contains("sample rates: 8000 (24)"), "{printed}");
    // The contact sheet shows spectrograms: higher tones are higher up.
    let sheet = image::open(folder.path().join("tones-sheet.png"))?.into_luma8();
    assert!(
        sheet.width() > 50
            && sheet.pixels().any(|pixel| pixel.0[0] == 255)
            && sheet.pixels().any(|pixel| pixel.0[0] < 60)
    );
    Ok(())
}

/// Spectrograms of 32 frames and 16 filters in patches of 4; a step takes some milliseconds.
fn config(train: &Path) -> Value {
    let shape = json!({"width": 16, "depth": 1, "heads": 2});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"channels": 1, "height": 32, "width": 16, "patch": 4},
        "view": {"audio": {"sample_rate": 8000, "mean": -6.0, "std": 3.0}},
        "method": {"mae": {"encoder": shape, "decoder": shape}},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": train, "threads": 2},
        "train": {"steps": 60, "global_batch": 10, "seed": 5},
        "checkpoint": {"every_steps": 20},
        "log": {"image_interval_steps": 0, "interval_s": 1000},
    })
}

fn an_audio_config_is_checked() -> Outcome {
    let full = config(Path::new("data"));
    let parse =
        |sets: &[&str]| Config::parse(&full.to_string(), &sets.iter().map(ToString::to_string).collect::<Vec<_>>());
    let good = parse(&["view.audio.seconds=0.3"])?;
    let resolved = good.to_json();
    assert_eq!(resolved["view"], json!({"audio": {"sample_rate": 8000, "seconds": 0.3, "mean": -6.0, "std": 3.0}}));
    assert_eq!(Config::parse(&resolved.to_string(), &[])?, good, "what is written is read");
    let schema = occlude::config::json_schema().to_string();
    assert!(schema.contains("Sample rate to which all audio is resampled"), "the schema covers its keys");
    for (line, word) in [
        ("view.audio.sample_rate=100", "view.audio.sample_rate is 100"),
        ("view.audio.std=0", "view.audio.std is 0"),
        ("view.audio.mean=1000", "view.audio.mean is 1000"),
        ("view.audio.seconds=0.01", "view.audio.seconds is 0.01; it must fill a row of patches"),
        ("view.audio.seconds=5", "to 0.344"),
        ("view.audio.second=5", "at view.audio.second: unknown key `second`; did you mean `seconds`?"),
        ("view.audio={\"sample_rate\": 8000, \"mean\": 0}", "missing field `std`"),
        ("view.audo.sample_rate=1", "unknown key `audo`; did you mean `audio`?"),
        ("input.channels=3", "input.channels is 3"),
        ("input.width=4", "input.width is 4"),
    ] {
        let error = parse(&[line]).expect_err(line);
        assert!(error.code == ExitCode::Usage && error.message.contains(word), "{line}: {error}");
    }
    Ok(())
}

fn image_keys_in_an_audio_config_are_rejected() -> Outcome {
    let full = config(Path::new("data"));
    for line in [
        "view.crop={}",
        "view.hflip=0.5",
        "view.center_crop=1",
        "view.augment={}",
        "view.scaled_decode=false",
        "view.clip={\"sampling\": {\"stride\": 4}}",
        "input.mean=[0.5]",
        "input.std=[0.5]",
    ] {
        let error = Config::parse(&full.to_string(), &[line.to_owned()]).expect_err(line);
        let key = line.split('=').next().expect("a key");
        assert!(error.code == ExitCode::Usage && error.message.contains(key), "{line}: {error}");
    }
    Ok(())
}

/// Returns all steps of a loader, with measured times set to zero.
fn all_steps(loader: DataLoader) -> occlude::error::Result<Vec<LoadedRows>> {
    loader.map(|rows| rows.map(|rows| LoadedRows { wait_time: Duration::ZERO, ..rows })).collect()
}

fn any_number_of_ranks_reads_the_same_batch() -> Outcome {
    let (_folder, out) = packed_tones()?;
    let set = Arc::new(Mixture::from_set(DataSet::open(&path_text(&out))?));
    let config = Config::parse(&config(&out).to_string(), &[])?;
    let grid = config.input.grid()?;
    let view = config.view.clone();
    let source = |threads| {
        let view = view.clone();
        LoaderOptions {
            labels: Labels::Required,
            mixture: set.clone(),
            cache: None,
            tokenizer: None,
            modality: view.modality(),
            view: Arc::new(move |sample, id, epoch, _, out| {
                view.train_view(&grid, sample, ViewKey { seed: 5, id, epoch }, 0, out)
            }),
            shape: grid.pixel_shape(),
            single_frame_sets: Vec::new(),
            limits: ImageLimits::default(),
            seed: 5,
            threads,
            prefetch_bytes: 20_000,
            max_corrupt_fraction: 0.001,
        }
    };
    let order = || SampleOrder::with_sources(&set.weighted_sizes(), 5, 2);
    let one = all_steps(DataLoader::for_training(source(1), order(), 7, 0, 1, 0..8)?)?;
    assert!(one.iter().all(|rows| rows.pixels.numel() == 7 * 32 * 16 && rows.pixels.kind() == Kind::Float));
    let valid: Vec<u32> = one.iter().flat_map(|rows| rows.side.valid.clone().expect("lengths")).collect();
    assert!(valid.contains(&32) && valid.contains(&8), "long clips and short ones: {valid:?}");
    for world in 2..=3 {
        let ranks: Vec<Vec<LoadedRows>> = (0..world)
            .map(|rank| all_steps(DataLoader::for_training(source(2), order(), 7, rank, world, 0..8)?))
            .collect::<Result<_, _>>()?;
        for step in 0..8 {
            let pixels = Tensor::cat(&ranks.iter().map(|rank| &rank[step].pixels).collect::<Vec<_>>(), 0);
            let ids: Vec<u64> = ranks.iter().flat_map(|rank| rank[step].ids.clone()).collect();
            assert!(ids == one[step].ids && pixels == one[step].pixels, "step {step} on {world} ranks");
        }
    }
    // Resuming at step 5 gives the same rows.
    assert!(all_steps(DataLoader::for_training(source(2), order(), 7, 0, 1, 5..8)?)? == one[5..], "the loader resumes");
    let tensor = one[0].to_device(0..7, Device::Cpu)?;
    assert_eq!((tensor.kind(), tensor.size()), (Kind::Float, vec![7, 1, 1, 32, 16]));
    assert!(tensor.abs().max().double_value(&[]) < 6.0, "normalized");
    Ok(())
}

fn audio_training_learns_and_resumes_bit_for_bit() -> Outcome {
    let (_folder, out) = packed_tones()?;
    let config = config(&out);
    let full = Run::new(&config);
    full.finish(0, &[]);
    let losses: Vec<f64> = full.lines().iter().map(|line| line.loss).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert_eq!(losses.len(), 60);
    assert!(mean(&losses[50..]) < 0.8 * mean(&losses[..10]), "it learns: {losses:?}");
    // Stopped on request during training, and started again.
    let mut longer = config.clone();
    longer["log"]["image_interval_steps"] = json!(60);
    let stopped = Run::new(&config);
    let mut job = stopped.start(0, &[]);
    job.wait_for_step(3);
    crate::support::training_job::send_signal(job.pid(), rustix::process::Signal::USR1);
    let end = job.end(60);
    assert!(end.code == 75 || end.code == 0, "{}", end.stderr);
    stopped.finish(0, &[]);
    stopped.assert_same_as(&full)?;
    // Reconstruction images, on two ranks.
    let two = Run::new(&longer);
    two.finish(2, &[]);
    let images: Vec<_> = std::fs::read_dir(two.folder().join("pictures"))?.flatten().collect();
    assert_eq!(images.len(), 1, "{images:?}");
    for (one, two) in full.lines().iter().zip(two.lines()) {
        assert!((one.loss - two.loss).abs() <= 1e-3 * one.loss, "step {}: {} and {}", one.step, one.loss, two.loss);
    }
    Ok(())
}

fn audio_files_are_reconstructed_as_spectrograms() -> Outcome {
    let (folder, out) = packed_tones()?;
    let mut short = config(&out);
    short["train"]["steps"] = json!(2);
    let run = Run::new(&short);
    run.finish(0, &[]);
    let file = folder.path().join("in/tone-2/05.wav");
    let sheets = folder.path().join("sheets");
    let words = [
        "reconstruct",
        "--checkpoint",
        &path_text(run.folder()),
        "--input",
        &path_text(&file),
        "--out",
        &path_text(&sheets),
    ]
    .map(String::from);
    let output = occlude_command(&words.each_ref().map(String::as_str)).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let sheet = image::open(sheets.join("000-05.png"))?;
    assert!(sheet.width() > sheet.height(), "masked, reconstructed, original side by side");
    Ok(())
}
