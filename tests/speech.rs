//! A training on sounds of all lengths as its user starts it: streamed, stopped, resumed, dumped, shown, exported.

use crate::job::{Run, occlude, signal};
use crate::listen::packed;
use crate::server::Server;
use crate::shard::text;
use crate::support::{Outcome, read, root};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::fault::Code;
use occlude::feed::Rows;
use occlude::optim::flat::Flat;
use occlude::run::evaluate::{Feature, features::Encoder};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    shards_of_sounds_are_streamed_into_training_which_resumes_to_the_bit,
    any_number_of_ranks_trains_alike,
    a_dumped_step_says_which_tokens_are_there,
    features_and_pictures_leave_padding_out,
    statistics_are_those_of_the_sound_alone,
    no_format_takes_what_it_cannot_hold,
];

/// The tiny config for so many steps of six sounds.
pub fn config(train: &str, steps: u64) -> Result<Value, Failed> {
    let mut config: Value = serde_json::from_slice(&std::fs::read(root().join("configs/tiny/audio_mae.json"))?)?;
    config["data"] = json!({"train": train, "threads": 1});
    config["train"] = json!({"steps": steps, "global_batch": 6, "seed": 5});
    config["checkpoint"]["every_steps"] = json!(2);
    config["log"] = json!({"pictures_every_steps": steps, "every_s": 1000});
    Ok(config)
}

fn shards_of_sounds_are_streamed_into_training_which_resumes_to_the_bit() -> Outcome {
    let (_folder, sounds) = packed()?;
    let server = Server::start();
    server.upload(&sounds, "b/tones")?;
    let near = Run::new(&config(&text(&sounds), 12)?);
    near.finish(0, &[]);
    let losses: Vec<f64> = near.lines().iter().map(|line| line.loss).collect();
    assert!(losses.len() == 12 && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    let far = Run::new(&config(&server.http("b/tones"), 12)?);
    let mut job = far.start(0, &[]);
    job.reach(3);
    signal(job.pid(), Signal::USR1);
    let end = job.end(60);
    assert!(end.code == 75 || end.code == 0, "{}", end.told);
    far.finish(0, &[]);
    for (near, far) in near.lines().iter().zip(far.lines()) {
        assert!((near.step, near.loss) == (far.step, far.loss), "step {}: {} and {}", near.step, near.loss, far.loss);
    }
    let (near, far) = (near.newest()?, far.newest()?);
    assert!(near.tensors.iter().all(|(name, tensor)| far.tensors[name] == *tensor), "the same weights to the bit");
    Ok(())
}

fn any_number_of_ranks_trains_alike() -> Outcome {
    let (_folder, sounds) = packed()?;
    let config = config(&text(&sounds), 6)?;
    let (alone, three) = (Run::new(&config), Run::new(&config));
    alone.finish(0, &[]);
    three.finish(3, &["--set", "train.micro_batch=1"]);
    for (one, three) in alone.lines().iter().zip(three.lines()) {
        let off = (one.loss - three.loss).abs() / one.loss;
        assert!(off <= 1e-4, "step {}: {} and {}", one.step, one.loss, three.loss);
    }
    assert_eq!(three.lines().len(), 6);
    Ok(())
}

fn a_dumped_step_says_which_tokens_are_there() -> Outcome {
    let (_folder, sounds) = packed()?;
    let run = Run::new(&config(&text(&sounds), 2)?);
    run.finish(0, &["--dump-steps", "1"]);
    let dump = read(&run.folder().join("dump/step-00000000-rank-0.safetensors"))?;
    // 24 × 4 tokens of which 28 are kept.
    let (keep, drop, restore) = (&dump["keep"], &dump["drop"], &dump["restore"]);
    assert_eq!([keep.size(), drop.size(), restore.size()], [vec![6, 28], vec![6, 68], vec![6, 96]]);
    let there = |x: &tch::Tensor| x.ge(0).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    let tokens = there(keep) + there(drop);
    assert!(tokens.equal(&there(restore)) && tokens.remainder(4).max().int64_value(&[]) == 0, "{tokens:?}");
    assert!(tokens.max().int64_value(&[]) <= 44, "none is longer than 0.9 s");
    assert_eq!(dump["input"].size(), [6, 1, 1, 192, 32]);
    Ok(())
}

fn said(words: &[&str]) -> Result<(i32, String, String), Failed> {
    let output = occlude(words).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
}

fn features_and_pictures_leave_padding_out() -> Outcome {
    let (folder, sounds) = packed()?;
    let run = Run::new(&config(&text(&sounds), 2)?);
    run.finish(0, &[]);
    assert_eq!(std::fs::read_dir(run.folder().join("pictures"))?.count(), 1);
    let (checkpoint, set) = (text(&run.folder()), text(&sounds));
    let words = ["evaluate", "--checkpoint", &checkpoint, "--train", &set, "--test", &set, "--protocol", "knn"];
    let (code, told, why) = said(&[&words[..], &["--feature", "mean"]].concat())?;
    assert_eq!(code, 0, "{why}");
    let answer: Value = serde_json::from_str(told.lines().last().ok_or("an answer")?)?;
    assert!(answer["n_test"] == 24 && answer["top1"].as_f64() > Some(0.4), "three pitches, seen before: {answer}");
    let (file, out) = (text(&folder.path().join("in/tone-1/03.wav")), text(&folder.path().join("shown")));
    let (code, _, why) = said(&["reconstruct", "--checkpoint", &checkpoint, "--input", &file, "--out", &out])?;
    assert_eq!(code, 0, "{why}");
    assert!(image::open(Path::new(&out).join("000-03.png"))?.width() > 3 * 192, "time runs to the right");
    Ok(())
}

fn statistics_are_those_of_the_sound_alone() -> Outcome {
    let encoder = |path: &str| {
        let config = Config::read(&root().join(path), &[])?;
        let method = config.method.build(&config.input)?;
        let flat = Flat::new(method.table(), 3, Kind::Float, Device::Cpu)?;
        Encoder::new(config, method, flat, Some(Feature::Statistics))
    };
    let fault = encoder("configs/tiny/mae.json").err().expect("a picture has no bands");
    assert!(fault.code == Code::Usage && fault.message.contains("about spectrograms"), "{fault}");
    let encoder = encoder("configs/tiny/audio_mae.json")?;
    let pixels = Tensor::full([2, 1, 1, 192, 32], f64::NAN, (Kind::Float, Device::Cpu));
    for (sample, rows) in [(0, [1f32, 2.0, 6.0]), (1, [4.0, -4.0, 0.0])] {
        for (row, value) in (0..).zip(rows) {
            let bands = Tensor::arange(32, (Kind::Float, Device::Cpu)) + f64::from(value);
            pixels.get(sample).get(0).get(0).get(row).copy_(&bands);
        }
    }
    let valid = vec![3, 2];
    let (ids, epochs, repeats) = (vec![0, 1], vec![0; 2], vec![0; 2]);
    let rows = Rows { step: 0, ids, epochs, repeats, labels: None, valid, pixels, text: None, waited: Duration::ZERO };
    let found = encoder.features(&rows)?;
    assert_eq!((encoder.none().size(), found.size()), (vec![0, 64], vec![2, 64]));
    for band in 0..32 {
        for (sample, mean, variance) in [(0, 3.0, 14.0 / 3.0), (1, 0.0, 16.0)] {
            let [middle, deviation] = [band, 32 + band].map(|at| found.double_value(&[sample, at]));
            let off = (middle - mean - band as f64).abs() + (deviation - f64::sqrt(variance)).abs();
            assert!(off < 1e-4, "band {band} of sample {sample}: {middle}, {deviation}");
        }
    }
    Ok(())
}

fn no_format_takes_what_it_cannot_hold() -> Outcome {
    let (folder, sounds) = packed()?;
    let run = Run::new(&config(&text(&sounds), 2)?);
    run.finish(0, &[]);
    let (checkpoint, out) = (text(&run.folder()), text(&folder.path().join("exported")));
    for format in ["mae", "timm", "transformers", "videomae"] {
        let (code, _, why) = said(&["export", "--format", format, "--checkpoint", &checkpoint, "--out", &out])?;
        assert!(code == 2 && why.contains("there is no format for weights of method.audio_mae"), "{format}: {why}");
        assert!(!Path::new(&out).exists(), "nothing is written");
    }
    Ok(())
}
