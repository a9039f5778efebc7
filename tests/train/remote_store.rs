//! Tests of training on data in a store: the same weights as from a disk, despite latency, failures and an outage.

use crate::method::captioned_images;
use crate::support::object_store::Server;
use crate::support::training_job::{Run, occlude_command, send_signal, shared_data, tiny_config};
use crate::support::{Outcome, root};
use crate::train::mixed_modalities;
use occlude::checkpoint;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

crate::trials![
    training_from_a_store_matches_training_from_a_disk,
    images_and_clips_from_s3_train_bit_for_bit_as_from_a_disk,
    captions_from_s3_train_bit_for_bit_as_from_a_disk,
    a_latency_of_100_ms_does_not_slow_training,
    a_lost_store_stops_training,
    a_run_can_be_kept_in_a_store,
    bench_data_prints_its_table,
];

fn stripes() -> Result<Server, libtest_mimic::Failed> {
    let server = Server::start();
    server.upload(&shared_data().join("train"), "b/train")?;
    Ok(server)
}

fn far(server: &Server, change: impl FnOnce(&mut Value)) -> Run {
    let mut config = tiny_config();
    config["data"]["train"] = json!(server.http("b/train"));
    change(&mut config);
    Run::new(&config)
}

fn training_from_a_store_matches_training_from_a_disk() -> Outcome {
    let near = Run::tiny();
    near.finish(0, &[]);
    let server = stripes()?;
    let run = far(&server, |_| {});
    // Unavailable when the training starts, for longer than the retries of a client, and failing at times from then on.
    server.faults(|errors| (errors.away_until, errors.fail_every) = (Some(Instant::now() + Duration::from_secs(6)), 7));
    let end = run.start(2, &[]).end(90);
    assert_eq!(end.code, 0, "{}", end.stderr);
    let pair = (near.newest_checkpoint()?, run.newest_checkpoint()?);
    assert_eq!(pair.0.manifest.samples, pair.1.manifest.samples);
    let losses = |run: &Run| -> Vec<f64> { run.lines().iter().map(|line| line.loss).collect() };
    for (step, (near, far)) in losses(&near).into_iter().zip(losses(&run)).enumerate().take(30) {
        assert!((near - far).abs() <= 1e-5 * near.abs(), "step {step}: {near} from the disk, {far} from the store");
    }
    Ok(())
}

/// Trains on sets in S3, stopped and resumed, and compares with the same from the disk.
fn train_streamed(mut config: Value, sets: &[std::path::PathBuf]) -> Outcome {
    let near = Run::new(&config);
    near.finish(0, &[]);
    let server = Server::start();
    let mut urls = Vec::new();
    for set in sets {
        let name = set.file_name().and_then(|name| name.to_str()).expect("a name");
        server.upload(set, &format!("b/{name}"))?;
        urls.push(format!("s3://b/{name}"));
    }
    match &mut config["data"]["train"] {
        Value::Array(mixed) => mixed.iter_mut().zip(urls).for_each(|(one, url)| one["url"] = json!(url)),
        one => *one = json!(urls.remove(0)),
    }
    let run = Run::new(&config);
    let home = tempfile::tempdir()?;
    let start = || {
        let mut command = occlude_command(&[]);
        command.args(run.words(&[])).envs(server.s3_environment("somebody")).env("XDG_CACHE_HOME", home.path());
        run.spawn(&mut command)
    };
    let mut job = start();
    job.wait_for_step(3);
    send_signal(job.pid(), Signal::USR1);
    let end = job.end(60);
    assert_eq!(end.code, 75, "{}", end.stderr);
    let end = start().end(60);
    assert_eq!(end.code, 0, "{}", end.stderr);
    run.assert_same_as(&near)
}

fn images_and_clips_from_s3_train_bit_for_bit_as_from_a_disk() -> Outcome {
    train_streamed(
        mixed_modalities::config(),
        &["stills", "clips"].map(|name| mixed_modalities::shared_data().join(name)),
    )
}

fn captions_from_s3_train_bit_for_bit_as_from_a_disk() -> Outcome {
    let mut config = captioned_images::config();
    config["train"]["steps"] = json!(40);
    train_streamed(config, &[captioned_images::shared_folder().join("shards/train")])
}

/// Returns the fraction of its time that the quickstart's model, batch and ranks wait for such a store after the start.
fn waited_fraction() -> Result<f64, libtest_mimic::Failed> {
    let server = stripes()?;
    server.faults(|errors| (errors.latency, errors.fail_every) = (Duration::from_millis(100), 100));
    let quickstart = std::fs::read(root().join("configs/tiny/mae.json"))?;
    let run = far(&server, |config| {
        let url = config["data"]["train"].take();
        *config = serde_json::from_slice(&quickstart).expect("JSON");
        config["data"]["train"] = url;
        config["train"]["epochs"].take();
        config["train"]["steps"] = json!(40);
        config["log"]["image_interval_steps"] = json!(0);
    });
    let end = run.start(2, &[]).end(120);
    assert_eq!(end.code, 0, "{}", end.stderr);
    let lines = run.lines();
    let waited: f64 = lines[10..].iter().map(|line| line.data_wait * line.seconds).sum();
    let total: f64 = lines[10..].iter().map(|line| line.seconds).sum();
    Ok(waited / total)
}

/// The best of up to three: another process may take the processor from the fetching threads, and nothing makes a slow
/// store look fast.
fn a_latency_of_100_ms_does_not_slow_training() -> Outcome {
    let mut shares = Vec::new();
    while shares.len() < 3 && shares.last().is_none_or(|&fraction| fraction >= 0.05) {
        shares.push(waited_fraction()?);
    }
    assert!(shares.last() < Some(&0.05), "waiting fractions: {shares:.3?}");
    Ok(())
}

fn a_lost_store_stops_training() -> Outcome {
    let server = stripes()?;
    let run = far(&server, |config| {
        config["data"]["store_timeout_s"] = json!(2);
        config["train"]["steps"] = json!(50_000);
    });
    let job = run.start(2, &[]);
    let start = Instant::now();
    while run.lines().len() < 20 && start.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(20));
    }
    server.faults(|errors| errors.away_until = Some(Instant::now() + Duration::from_secs(3600)));
    let end = job.end(60);
    assert_eq!(end.code, 69, "{}", end.stderr);
    assert!(end.stderr.contains("after 2 s of trying") && end.stderr.contains("b/train/"), "{}", end.stderr);
    Ok(())
}

fn a_run_can_be_kept_in_a_store() -> Outcome {
    let near = Run::tiny();
    near.finish(0, &[]);
    let server = Server::start();
    server.faults(|errors| errors.fail_every = 23);
    let config = Run::tiny();
    let home = tempfile::tempdir()?;
    let far = || {
        let path = config.config();
        let mut command =
            occlude_command(&["train", "--run", "s3://b/runs/one", "--config", path.to_str().expect("UTF-8")]);
        command.envs(server.s3_environment("somebody")).env("XDG_CACHE_HOME", home.path());
        config.spawn(&mut command)
    };
    // Stopped in the middle, and resumed as if on another machine: only the store is left.
    let job = far();
    let start = Instant::now();
    while !server.keys().iter().any(|key| key.contains("step-00000060/manifest")) {
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", server.keys());
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_raw(job.pid()).expect("a process"), Signal::USR1)?;
    let end = job.end(60);
    assert_eq!(end.code, 75, "{}", end.stderr);
    std::fs::remove_dir_all(home.path().join("occlude"))?;
    let end = far().end(60);
    assert_eq!(end.code, 0, "{}", end.stderr);
    let folder = tempfile::tempdir()?;
    server.download("b/runs/one", folder.path())?;
    let ours = checkpoint::load_from_url(folder.path().to_str().expect("UTF-8"))?;
    let reference = near.newest_checkpoint()?;
    assert_eq!(ours.manifest.step, reference.manifest.step);
    for (name, tensor) in &reference.tensors {
        assert!(ours.tensors[name] == *tensor, "{name} differs");
    }
    let mut steps = Vec::new();
    for part in std::fs::read_dir(folder.path().join("metrics"))? {
        for line in std::fs::read_to_string(part?.path())?.lines() {
            steps.push(serde_json::from_str::<Value>(line)?["step"].as_u64().expect("a step"));
        }
    }
    steps.sort();
    assert_eq!(steps, (1..=reference.manifest.step).collect::<Vec<_>>(), "every step once");
    for file in ["config.json", "tensorboard/"] {
        assert!(server.keys().iter().any(|key| key.starts_with(&format!("b/runs/one/{file}"))), "{file} is missing");
    }
    Ok(())
}

fn bench_data_prints_its_table() -> Outcome {
    let run = Run::tiny();
    let config = run.config();
    let mut command = occlude_command(&["bench", "data", "--seconds", "1", "--config"]);
    let output = command.arg(config).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["fetch", "decode", "view", "batch", "copy", "samples/s", "the limit is"] {
        assert!(text.contains(word), "{word} is missing: {text}");
    }
    let reply: Value = serde_json::from_str(text.lines().last().expect("a line"))?;
    let stages: f64 = reply["us_per_sample"].as_object().expect("stages").values().filter_map(Value::as_f64).sum();
    let full = reply["process_us_per_sample"].as_f64().expect("a number");
    assert!(stages > 0.3 * full && stages < 1.5 * full, "stages of {stages} µs in {full} µs of CPU time");
    Ok(())
}
