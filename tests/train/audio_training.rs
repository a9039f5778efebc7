//! Tests of training on audio of all lengths: streamed, stopped, resumed, dumped, reconstructed, exported.

use crate::data::audio_pipeline::packed_tones;
use crate::support::method_ext::untrained;
use crate::support::object_store::Server;
use crate::support::training_job::{Run, occlude_command, send_signal};
use crate::support::{Outcome, path_text, read, root};
use libtest_mimic::Failed;
use occlude::config::Config;
use occlude::error::ExitCode;
use occlude::evaluate::Feature;
use occlude::evaluate::features::FeatureExtractor;
use occlude::loader::LoadedRows;
use occlude::part::batch::Side;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

crate::trials![
    audio_shards_are_streamed_and_training_resumes_bit_for_bit,
    any_number_of_ranks_trains_alike,
    a_dumped_step_names_its_valid_tokens,
    features_and_reconstructions_ignore_padding,
    statistics_ignore_padding,
    exports_that_lose_information_are_rejected,
];

/// Returns the tiny config for `steps` steps of six clips.
pub fn config(train: &str, steps: u64) -> Result<Value, Failed> {
    let mut config: Value = serde_json::from_slice(&std::fs::read(root().join("configs/tiny/audiomae.json"))?)?;
    config["data"] = json!({"train": train, "threads": 1});
    config["train"] = json!({"steps": steps, "global_batch": 6, "seed": 5});
    config["checkpoint"]["every_steps"] = json!(2);
    config["log"] = json!({"image_interval_steps": steps, "interval_s": 1000});
    Ok(config)
}

fn audio_shards_are_streamed_and_training_resumes_bit_for_bit() -> Outcome {
    let (_folder, clips) = packed_tones()?;
    let server = Server::start();
    server.upload(&clips, "b/tones")?;
    let near = Run::new(&config(&path_text(&clips), 12)?);
    near.finish(0, &[]);
    let losses: Vec<f64> = near.lines().iter().map(|line| line.loss).collect();
    assert!(losses.len() == 12 && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    let far = Run::new(&config(&server.http("b/tones"), 12)?);
    let mut job = far.start(0, &[]);
    job.wait_for_step(3);
    send_signal(job.pid(), Signal::USR1);
    let end = job.end(60);
    assert!(end.code == 75 || end.code == 0, "{}", end.stderr);
    far.finish(0, &[]);
    for (near, far) in near.lines().iter().zip(far.lines()) {
        assert!((near.step, near.loss) == (far.step, far.loss), "step {}: {} and {}", near.step, near.loss, far.loss);
    }
    let near = near.newest_checkpoint()?;
    let far = far.newest_checkpoint()?;
    assert!(near.tensors.iter().all(|(name, tensor)| far.tensors[name] == *tensor), "the same weights to the bit");
    Ok(())
}

fn any_number_of_ranks_trains_alike() -> Outcome {
    let (_folder, clips) = packed_tones()?;
    let config = config(&path_text(&clips), 6)?;
    let alone = Run::new(&config);
    let three = Run::new(&config);
    alone.finish(0, &[]);
    three.finish(3, &["--set", "train.micro_batch=1"]);
    for (one, three) in alone.lines().iter().zip(three.lines()) {
        let difference = (one.loss - three.loss).abs() / one.loss;
        assert!(difference <= 1e-4, "step {}: {} and {}", one.step, one.loss, three.loss);
    }
    assert_eq!(three.lines().len(), 6);
    Ok(())
}

fn a_dumped_step_names_its_valid_tokens() -> Outcome {
    let (_folder, clips) = packed_tones()?;
    let run = Run::new(&config(&path_text(&clips), 2)?);
    run.finish(0, &["--dump-steps", "1"]);
    let dump = read(&run.folder().join("dump/step-00000000-rank-0.safetensors"))?;
    // 24 × 4 tokens, of which 28 are kept.
    let keep = &dump["keep"];
    let drop = &dump["drop"];
    let restore = &dump["restore"];
    assert_eq!([keep.size(), drop.size(), restore.size()], [vec![6, 28], vec![6, 68], vec![6, 96]]);
    let count_tokens = |x: &tch::Tensor| x.ge(0).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    let tokens = count_tokens(keep) + count_tokens(drop);
    assert!(tokens.equal(&count_tokens(restore)) && tokens.remainder(4).max().int64_value(&[]) == 0, "{tokens:?}");
    assert!(tokens.max().int64_value(&[]) <= 44, "none is longer than 0.9 s");
    assert_eq!(dump["input"].size(), [6, 1, 1, 192, 32]);
    Ok(())
}

fn command_output(words: &[&str]) -> Result<(i32, String, String), Failed> {
    let output = occlude_command(words).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
}

fn features_and_reconstructions_ignore_padding() -> Outcome {
    let (folder, clips) = packed_tones()?;
    let run = Run::new(&config(&path_text(&clips), 2)?);
    run.finish(0, &[]);
    assert_eq!(std::fs::read_dir(run.folder().join("pictures"))?.count(), 1);
    let checkpoint = path_text(run.folder());
    let set = path_text(&clips);
    let words = ["evaluate", "--checkpoint", &checkpoint, "--train", &set, "--test", &set, "--protocol", "knn"];
    let (code, output, why) = command_output(&[&words[..], &["--feature", "mean"]].concat())?;
    assert_eq!(code, 0, "{why}");
    let reply: Value = serde_json::from_str(output.lines().last().ok_or("an answer")?)?;
    assert!(reply["n_test"] == 24 && reply["top1"].as_f64() > Some(0.4), "three pitches, seen in training: {reply}");
    let file = path_text(folder.path().join("in/tone-1/03.wav"));
    let out = path_text(folder.path().join("shown"));
    let (code, _, why) =
        command_output(&["reconstruct", "--checkpoint", &checkpoint, "--input", &file, "--out", &out])?;
    assert_eq!(code, 0, "{why}");
    assert!(image::open(Path::new(&out).join("000-03.png"))?.width() > 3 * 192, "time increases to the right");
    Ok(())
}

fn statistics_ignore_padding() -> Outcome {
    let encoder = |path: &str| {
        let model = untrained(Config::read(&root().join(path), &[])?)?;
        FeatureExtractor::new(model, Some(Feature::Statistics), None)
    };
    let error = encoder("configs/tiny/mae.json").err().expect("an image has no bands");
    assert!(error.code == ExitCode::Usage && error.message.contains("about spectrograms"), "{error}");
    let encoder = encoder("configs/tiny/audiomae.json")?;
    let pixels = Tensor::full([2, 1, 1, 192, 32], f64::NAN, (Kind::Float, Device::Cpu));
    for (sample, rows) in [(0, [1f32, 2.0, 6.0]), (1, [4.0, -4.0, 0.0])] {
        for (row, value) in (0..).zip(rows) {
            let bands = Tensor::arange(32, (Kind::Float, Device::Cpu)) + f64::from(value);
            pixels.get(sample).get(0).get(0).get(row).copy_(&bands);
        }
    }
    let side = Side { valid: Some(vec![3, 2]), ..Side::default() };
    let ids = vec![0, 1];
    let epochs = vec![0; 2];
    let repeats = vec![0; 2];
    let rows = LoadedRows { step: 0, ids, epochs, repeats, side, pixels, wait_time: Duration::ZERO };
    let found = encoder.features(&rows)?;
    assert_eq!((encoder.empty_features().size(), found.size()), (vec![0, 64], vec![2, 64]));
    for band in 0..32 {
        for (sample, mean, variance) in [(0, 3.0, 14.0 / 3.0), (1, 0.0, 16.0)] {
            let [middle, deviation] = [band, 32 + band].map(|at| found.double_value(&[sample, at]));
            let difference = (middle - mean - band as f64).abs() + (deviation - f64::sqrt(variance)).abs();
            assert!(difference < 1e-4, "band {band} of sample {sample}: {middle}, {deviation}");
        }
    }
    Ok(())
}

fn exports_that_lose_information_are_rejected() -> Outcome {
    let (folder, clips) = packed_tones()?;
    let run = Run::new(&config(&path_text(&clips), 2)?);
    run.finish(0, &[]);
    let checkpoint = path_text(run.folder());
    let out = path_text(folder.path().join("exported"));
    for format in ["mae", "timm", "transformers", "videomae"] {
        let (code, _, why) =
            command_output(&["export", "--format", format, "--checkpoint", &checkpoint, "--out", &out])?;
        assert!(code == 2 && why.contains("there is no format for weights of method.audiomae"), "{format}: {why}");
        assert!(!Path::new(&out).exists(), "nothing is written");
    }
    Ok(())
}
