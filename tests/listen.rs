//! Sounds on their way through the program: packed, looked at, configured, trained on.

use crate::job::{Run, occlude};
use crate::shard::text;
use crate::support::Outcome;
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::data::decode::Limits;
use occlude::data::medium::Medium;
use occlude::data::mix::Mix;
use occlude::data::order::Order;
use occlude::data::pack::{Options, Videos, pack};
use occlude::data::set::DataSet;
use occlude::data::shard::SOUND;
use occlude::data::sound::{Decoder, probe, wav};
use occlude::fault::Code;
use occlude::feed::{Feed, Rows, Source};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    folders_of_sounds_become_shards,
    a_list_of_sounds_becomes_shards,
    sounds_are_brought_to_a_rate,
    what_cannot_be_heard_is_left_out,
    pictures_and_sounds_are_not_mistaken_for_each_other,
    a_set_of_sounds_is_counted,
    a_config_of_sounds_is_checked,
    no_key_beside_sound_does_nothing,
    any_number_of_ranks_hears_the_same_batch,
    a_training_on_sounds_learns_and_resumes_to_the_bit,
    files_are_reconstructed_as_spectrograms,
];

/// Tones of `classes` pitches, `each` of a pitch, of 0.1 to 0.9 s at 8 kHz: `tone-K/NN.wav`.
fn tones(folder: &Path, classes: usize, each: usize) -> Outcome {
    for class in 0..classes {
        let place = folder.join(format!("tone-{class}"));
        std::fs::create_dir_all(&place)?;
        for number in 0..each {
            std::fs::write(place.join(format!("{number:02}.wav")), tone(class, number))?;
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

fn options() -> Options {
    Options { name: Some("tones".into()), samples_per_shard: 7, medium: Medium::Sound, ..Options::default() }
}

/// `in/` of 3 × 8 tones, `out/` packed.
pub fn packed() -> Result<(tempfile::TempDir, PathBuf), Failed> {
    let folder = tempfile::tempdir()?;
    tones(&folder.path().join("in"), 3, 8)?;
    let out = folder.path().join("out");
    pack(&text(&folder.path().join("in")), &text(&out), &options())?;
    Ok((folder, out))
}

/// Class and bytes of every sample, by its key.
type Samples = BTreeMap<String, (Option<i64>, Vec<u8>)>;

fn samples(out: &Path) -> Result<Samples, Failed> {
    let set = DataSet::open(&text(out))?;
    let sample = |index| -> Result<_, Failed> {
        let (shard, row) = set.sample(index)?;
        Ok((shard.key(row).to_owned(), (shard.label(row)?, shard.read(row, SOUND)?)))
    };
    (0..set.len()).map(sample).collect()
}

fn folders_of_sounds_become_shards() -> Outcome {
    let (folder, out) = packed()?;
    let found = samples(&out)?;
    assert_eq!(found.len(), 24);
    for (class, number) in (0..3).flat_map(|class| (0..8).map(move |number| (class, number))) {
        let (label, bytes) = &found[&format!("tone-{class}_{number:02}")];
        assert_eq!(*label, Some(class as i64));
        assert!(*bytes == tone(class, number), "bytes are stored as they came");
    }
    assert_eq!(DataSet::open(&text(&out))?.classes, ["tone-0", "tone-1", "tone-2"]);
    // Any number of threads makes the same tars.
    let again = folder.path().join("again");
    pack(&text(&folder.path().join("in")), &text(&again), &Options { threads: 3, ..options() })?;
    for file in ["tones-000000.tar", "tones-000003.tar", "tones-000001.tar.idx"] {
        assert!(std::fs::read(out.join(file))? == std::fs::read(again.join(file))?, "{file}");
    }
    Ok(())
}

fn a_list_of_sounds_becomes_shards() -> Outcome {
    let folder = tempfile::tempdir()?;
    tones(&folder.path().join("in"), 2, 3)?;
    let rows =
        (0..3).map(|n| json!({"path": format!("tone-1/{n:02}.wav"), "caption": format!("tone {n}"), "by": "us"}));
    let lines: Vec<String> = rows.map(|row| row.to_string()).collect();
    let list = folder.path().join("in/list.jsonl");
    std::fs::write(&list, lines.join("\n"))?;
    let out = folder.path().join("out");
    pack(&text(&list), &text(&out), &options())?;
    let set = DataSet::open(&text(&out))?;
    assert_eq!(set.len(), 3);
    let (shard, row) = set.sample(0)?;
    assert!(String::from_utf8(shard.read(row, &["txt"])?)?.starts_with("tone "));
    assert_eq!(shard.read(row, &["json"])?, br#"{"by":"us"}"#);
    assert!(shard.has(row, "wav"));
    Ok(())
}

fn sounds_are_brought_to_a_rate() -> Outcome {
    let (folder, plain) = packed()?;
    let out = folder.path().join("fast");
    let words = ["pack", &text(&folder.path().join("in")), &text(&out), "--sound", "--rate", "16000"].map(String::from);
    let output = occlude(&words.each_ref().map(String::as_str)).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut decoder = Decoder::new(Default::default());
    for ((key, (_, slow)), (other, (_, fast))) in samples(&plain)?.into_iter().zip(samples(&out)?) {
        assert_eq!(key, other);
        let (slow, fast) = (probe(&slow, &Default::default())?, fast);
        let clip = decoder.decode(&fast)?;
        assert_eq!((clip.rate, clip.samples.len() as u64), (16_000, 2 * slow.samples), "{key}");
        let loud = (clip.samples.iter().map(|x| x * x).sum::<f32>() / clip.samples.len() as f32).sqrt();
        assert!((loud - 0.5 / 2f32.sqrt()).abs() < 0.02, "{key}: {loud}");
    }
    Ok(())
}

fn what_cannot_be_heard_is_left_out() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    tones(&source, 1, 8)?;
    let cut = tone(0, 3);
    std::fs::write(source.join("tone-0/03.wav"), &cut[..cut.len() - 5])?;
    std::fs::write(source.join("tone-0/04.ogg"), b"OggS and nothing")?;
    let some = Options { max_bad_share: 0.5, ..options() };
    let done = pack(&text(&source), &text(&folder.path().join("out")), &some)?;
    assert_eq!((done.sets[0].1.samples, done.bad.len()), (7, 2), "{:?}", done.bad);
    assert!(done.bad.iter().any(|(name, why)| name.contains("03.wav") && why.contains("cut")), "{:?}", done.bad);
    let fault =
        pack(&text(&source), &text(&folder.path().join("none")), &options()).expect_err("one bad sound in a hundred");
    assert!(fault.code == Code::Corrupt && fault.message.contains("sounds are unreadable"), "{fault}");
    Ok(())
}

fn pictures_and_sounds_are_not_mistaken_for_each_other() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("in");
    tones(&source, 1, 2)?;
    let out = text(&folder.path().join("out"));
    let usage = |options: Options, word: &str| {
        let fault = pack(&text(&source), &out, &options).expect_err("it went through");
        assert!(fault.code == Code::Usage && fault.message.contains(word), "{fault}");
    };
    let pictures = "(.jpg, .jpeg, .png, .webp, .mp4, .webm, .mkv, .avi, .mov, .m4v)";
    usage(Options::default(), &format!("holds no picture {pictures}; sounds are packed with --sound"));
    usage(Options { rate: Some(16_000), ..Options::default() }, "a rate is for sounds");
    usage(Options { rate: Some(10), ..options() }, "the rate is 10");
    usage(Options { resize: Some(10), ..options() }, "sounds have no size");
    usage(Options { video: Videos { fps: Some(5.0), ..Videos::default() }, ..options() }, "sounds have no size");
    // A training on what the config does not describe ends before it begins.
    let run = |config: &Value| {
        let end = Run::new(config).start(0, &[]).end(60);
        assert_eq!(end.code, 2, "{}", end.told);
        end.told
    };
    let (_folder, sounds) = packed()?;
    let mut pictured = crate::job::tiny();
    pictured["data"]["train"] = json!(sounds);
    assert!(run(&pictured).contains("tones holds sounds, and the config's view is of pictures; configure view.sound"));
    let mut heard = config(&sounds);
    heard["data"]["train"] = crate::job::tiny()["data"]["train"].clone();
    assert!(run(&heard).contains("holds pictures, and the config's view is of sounds; leave view.sound out"));
    Ok(())
}

fn a_set_of_sounds_is_counted() -> Outcome {
    let (folder, out) = packed()?;
    let output = occlude(&["inspect", &text(&out)]).current_dir(folder.path()).output()?;
    let said = String::from_utf8(output.stdout)?;
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_str(said.lines().last().ok_or("nothing")?)?;
    let seconds: f64 = (0..8).map(|n| 0.1 + 0.8 * f64::from(n * 7 % 10) / 9.0).sum::<f64>() * 3.0;
    for (key, wanted) in [
        ("samples", json!(24)),
        ("sounds", json!(24)),
        ("pictures", json!(0)),
        ("members", json!({"cls": 24, "wav": 24})),
        ("classes", json!({"tone-0": 8, "tone-1": 8, "tone-2": 8})),
        ("rates", json!({"8000": 24})),
        ("channels", json!({"1": 24})),
        ("verdict", json!("ok")),
        ("unreadable", json!([])),
        ("sheet", json!("tones-sheet.png")),
    ] {
        assert_eq!(told[key], wanted, "{key}");
    }
    assert!((told["seconds_total"].as_f64().ok_or("a number")? - seconds).abs() < 0.01, "{told}");
    let bins = told["seconds"].as_array().ok_or("bins")?;
    assert_eq!(bins.iter().map(|bin| bin["count"].as_u64().unwrap_or(0)).sum::<u64>(), 24);
    assert!(said.contains("hours of sound") && said.contains("samples a second: 8000 (24)"), "{said}");
    // The sheet shows each as a spectrogram: higher tones lie higher.
    let sheet = image::open(folder.path().join("tones-sheet.png"))?.into_luma8();
    assert!(
        sheet.width() > 50
            && sheet.pixels().any(|pixel| pixel.0[0] == 255)
            && sheet.pixels().any(|pixel| pixel.0[0] < 60)
    );
    Ok(())
}

/// Spectrograms of 32 frames and 16 filters in patches of 4, some milliseconds a step.
fn config(train: &Path) -> Value {
    let shape = json!({"width": 16, "depth": 1, "heads": 2});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"channels": 1, "height": 32, "width": 16, "patch": 4},
        "view": {"sound": {"rate": 8000, "mean": -6.0, "std": 3.0}},
        "method": {"mae": {"encoder": shape, "decoder": shape}},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": train, "threads": 2},
        "train": {"steps": 60, "global_batch": 10, "seed": 5},
        "checkpoint": {"every_steps": 20},
        "log": {"pictures_every_steps": 0, "every_s": 1000},
    })
}

fn a_config_of_sounds_is_checked() -> Outcome {
    let whole = config(Path::new("data"));
    let parse =
        |sets: &[&str]| Config::parse(&whole.to_string(), &sets.iter().map(ToString::to_string).collect::<Vec<_>>());
    let good = parse(&["view.sound.seconds=0.3"])?;
    let resolved = good.resolved();
    assert_eq!(resolved["view"], json!({"sound": {"rate": 8000, "seconds": 0.3, "mean": -6.0, "std": 3.0}}));
    assert_eq!(Config::parse(&resolved.to_string(), &[])?, good, "what is written is read");
    let schema = occlude::config::schema().to_string();
    assert!(schema.contains("Samples a second that every sound is brought to"), "the schema knows its keys");
    for (line, word) in [
        ("view.sound.rate=100", "view.sound.rate is 100"),
        ("view.sound.std=0", "view.sound.std is 0"),
        ("view.sound.mean=1000", "view.sound.mean is 1000"),
        ("view.sound.seconds=0.01", "view.sound.seconds is 0.01; it must fill a row of patches"),
        ("view.sound.seconds=5", "to 0.344"),
        ("view.sound.second=5", "at view.sound.second: unknown key `second`; did you mean `seconds`?"),
        ("view.sound={\"rate\": 8000, \"mean\": 0}", "missing field `std`"),
        ("view.sond.rate=1", "unknown key `sond`; did you mean `sound`?"),
        ("input.channels=3", "input.channels is 3"),
        ("input.width=4", "input.width is 4"),
    ] {
        let fault = parse(&[line]).expect_err(line);
        assert!(fault.code == Code::Usage && fault.message.contains(word), "{line}: {fault}");
    }
    Ok(())
}

fn no_key_beside_sound_does_nothing() -> Outcome {
    let whole = config(Path::new("data"));
    for line in [
        "view.crop={}",
        "view.flip=0.5",
        "view.center=1",
        "view.augment={}",
        "view.scaled_decode=false",
        "view.clip={\"sampling\": {\"stride\": 4}}",
        "input.mean=[0.5]",
        "input.std=[0.5]",
    ] {
        let fault = Config::parse(&whole.to_string(), &[line.to_owned()]).expect_err(line);
        let key = line.split('=').next().expect("a key");
        assert!(fault.code == Code::Usage && fault.message.contains(key), "{line}: {fault}");
    }
    Ok(())
}

/// All steps of a feed, what is measured set to nothing.
fn all(feed: Feed) -> occlude::fault::Result<Vec<Rows>> {
    feed.map(|rows| rows.map(|rows| Rows { waited: Duration::ZERO, ..rows })).collect()
}

fn any_number_of_ranks_hears_the_same_batch() -> Outcome {
    let (_folder, out) = packed()?;
    let set = Arc::new(Mix::one(DataSet::open(&text(&out))?));
    let config = Config::parse(&config(&out).to_string(), &[])?;
    let (grid, view) = (config.input.grid()?, config.view.clone());
    let source = |threads| {
        let view = view.clone();
        Source {
            set: set.clone(),
            cache: None,
            captions: None,
            medium: view.medium(),
            view: Arc::new(move |sample, id, epoch, _, out| view.train(&grid, sample, 5, id, epoch, 0, out)),
            shape: grid.pixels(),
            stills: Vec::new(),
            limits: Limits::default(),
            seed: 5,
            threads,
            prefetch_bytes: 20_000,
            max_bad_share: 0.001,
        }
    };
    let order = || Order::mixed(&set.sizes(), 5, 2);
    let one = all(Feed::train(source(1), order(), 7, 0, 1, 0..8)?)?;
    assert!(one.iter().all(|rows| rows.pixels.numel() == 7 * 32 * 16 && rows.pixels.kind() == Kind::Float));
    let valid: Vec<u32> = one.iter().flat_map(|rows| rows.valid.clone()).collect();
    assert!(valid.contains(&32) && valid.contains(&8), "long sounds and short ones: {valid:?}");
    for world in 2..=3 {
        let ranks: Vec<Vec<Rows>> = (0..world)
            .map(|rank| all(Feed::train(source(2), order(), 7, rank, world, 0..8)?))
            .collect::<Result<_, _>>()?;
        for step in 0..8 {
            let pixels = Tensor::cat(&ranks.iter().map(|rank| &rank[step].pixels).collect::<Vec<_>>(), 0);
            let ids: Vec<u64> = ranks.iter().flat_map(|rank| rank[step].ids.clone()).collect();
            assert!(ids == one[step].ids && pixels == one[step].pixels, "step {step} on {world} ranks");
        }
    }
    // Resumed at step 5, it goes on with the same rows.
    assert!(all(Feed::train(source(2), order(), 7, 0, 1, 5..8)?)? == one[5..], "a feed goes on");
    let tensor = one[0].to_device(0..7, Device::Cpu)?;
    assert_eq!((tensor.kind(), tensor.size()), (Kind::Float, vec![7, 1, 1, 32, 16]));
    assert!(tensor.abs().max().double_value(&[]) < 6.0, "normalised");
    Ok(())
}

fn a_training_on_sounds_learns_and_resumes_to_the_bit() -> Outcome {
    let (_folder, out) = packed()?;
    let config = config(&out);
    let whole = Run::new(&config);
    whole.finish(0, &[]);
    let losses: Vec<f64> = whole.lines().iter().map(|line| line.loss).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert_eq!(losses.len(), 60);
    assert!(mean(&losses[50..]) < 0.8 * mean(&losses[..10]), "it learns: {losses:?}");
    // Asked to stop on the way, and started again.
    let mut longer = config.clone();
    longer["log"]["pictures_every_steps"] = json!(60);
    let stopped = Run::new(&config);
    let mut job = stopped.start(0, &[]);
    job.reach(3);
    crate::job::signal(job.pid(), rustix::process::Signal::USR1);
    let end = job.end(60);
    assert!(end.code == 75 || end.code == 0, "{}", end.told);
    stopped.finish(0, &[]);
    stopped.same_as(&whole)?;
    // Pictures of what it guesses, on two ranks.
    let two = Run::new(&longer);
    two.finish(2, &[]);
    let pictures: Vec<_> = std::fs::read_dir(two.folder().join("pictures"))?.flatten().collect();
    assert_eq!(pictures.len(), 1, "{pictures:?}");
    for (one, two) in whole.lines().iter().zip(two.lines()) {
        assert!((one.loss - two.loss).abs() <= 1e-3 * one.loss, "step {}: {} and {}", one.step, one.loss, two.loss);
    }
    Ok(())
}

fn files_are_reconstructed_as_spectrograms() -> Outcome {
    let (folder, out) = packed()?;
    let mut short = config(&out);
    short["train"]["steps"] = json!(2);
    let run = Run::new(&short);
    run.finish(0, &[]);
    let file = folder.path().join("in/tone-2/05.wav");
    let sheets = folder.path().join("sheets");
    let words = ["reconstruct", "--checkpoint", &text(&run.folder()), "--input", &text(&file), "--out", &text(&sheets)]
        .map(String::from);
    let output = occlude(&words.each_ref().map(String::as_str)).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let sheet = image::open(sheets.join("000-05.png"))?;
    assert!(sheet.width() > sheet.height(), "masked, reconstructed, original side by side");
    Ok(())
}
