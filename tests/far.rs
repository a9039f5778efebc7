//! Training on data that lie in a store: the same weights as from a disk, through slowness, failures and an outage.

use crate::job::{Run, data, occlude, signal, tiny};
use crate::server::Server;
use crate::support::{Outcome, root};
use crate::{captions, turns};
use occlude::run::checkpoint;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

crate::trials![
    training_from_a_store_is_training_from_a_disk,
    pictures_and_clips_from_s3_train_as_from_a_disk_to_the_bit,
    captions_from_s3_train_as_from_a_disk_to_the_bit,
    a_store_of_100_ms_is_not_waited_for,
    a_store_that_is_gone_ends_the_training,
    a_run_lives_in_a_store,
    the_budget_of_feeding_is_printed,
];

fn stripes() -> Result<Server, libtest_mimic::Failed> {
    let server = Server::start();
    server.upload(&data().join("train"), "b/train")?;
    Ok(server)
}

fn far(server: &Server, change: impl FnOnce(&mut Value)) -> Run {
    let mut config = tiny();
    config["data"]["train"] = json!(server.http("b/train"));
    change(&mut config);
    Run::new(&config)
}

fn training_from_a_store_is_training_from_a_disk() -> Outcome {
    let near = Run::tiny();
    near.finish(0, &[]);
    let server = stripes()?;
    let run = far(&server, |_| {});
    // Away when the training starts, for longer than a client's own retries last, and busy from then on.
    server.faults(|faults| (faults.away_until, faults.fail_every) = (Some(Instant::now() + Duration::from_secs(6)), 7));
    let end = run.start(2, &[]).end(90);
    assert_eq!(end.code, 0, "{}", end.told);
    let pair = (near.newest()?, run.newest()?);
    assert_eq!(pair.0.manifest.samples, pair.1.manifest.samples);
    let losses = |run: &Run| -> Vec<f64> { run.lines().iter().map(|line| line.loss).collect() };
    for (step, (near, far)) in losses(&near).into_iter().zip(losses(&run)).enumerate().take(30) {
        assert!((near - far).abs() <= 1e-5 * near.abs(), "step {step}: {near} from the disk, {far} from the store");
    }
    Ok(())
}

/// Sets that are read from S3 in a training that is stopped on the way and gone on with; beside the same from the disk.
fn streamed(mut config: Value, sets: &[std::path::PathBuf]) -> Outcome {
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
    let (run, home) = (Run::new(&config), tempfile::tempdir()?);
    let start = || {
        let mut command = occlude(&[]);
        command.args(run.words(&[])).envs(server.s3_environment("somebody")).env("XDG_CACHE_HOME", home.path());
        run.spawn(&mut command)
    };
    let mut job = start();
    job.reach(3);
    signal(job.pid(), Signal::USR1);
    let end = job.end(60);
    assert_eq!(end.code, 75, "{}", end.told);
    let end = start().end(60);
    assert_eq!(end.code, 0, "{}", end.told);
    run.same_as(&near)
}

fn pictures_and_clips_from_s3_train_as_from_a_disk_to_the_bit() -> Outcome {
    streamed(turns::config(), &["stills", "clips"].map(|name| turns::shared().join(name)))
}

fn captions_from_s3_train_as_from_a_disk_to_the_bit() -> Outcome {
    let mut config = captions::config();
    config["train"]["steps"] = json!(40);
    streamed(config, &[captions::place().join("shards/train")])
}

/// The share of its time that the quickstart's model, batch and ranks wait for such a store, once begun.
fn share_waited() -> Result<f64, libtest_mimic::Failed> {
    let server = stripes()?;
    server.faults(|faults| (faults.latency, faults.fail_every) = (Duration::from_millis(100), 100));
    let quickstart = std::fs::read(root().join("configs/tiny/mae.json"))?;
    let run = far(&server, |config| {
        let url = config["data"]["train"].take();
        *config = serde_json::from_slice(&quickstart).expect("JSON");
        config["data"]["train"] = url;
        config["train"]["epochs"].take();
        config["train"]["steps"] = json!(40);
        config["log"]["pictures_every_steps"] = json!(0);
    });
    let end = run.start(2, &[]).end(120);
    assert_eq!(end.code, 0, "{}", end.told);
    let lines = run.lines();
    let waited: f64 = lines[10..].iter().map(|line| line.data_wait * line.seconds).sum();
    let total: f64 = lines[10..].iter().map(|line| line.seconds).sum();
    Ok(waited / total)
}

/// The best of up to three: another process may take the processor from those who fetch, and nothing makes a store that is
/// waited for look fast.
fn a_store_of_100_ms_is_not_waited_for() -> Outcome {
    let mut shares = Vec::new();
    while shares.len() < 3 && shares.last().is_none_or(|&share| share >= 0.05) {
        shares.push(share_waited()?);
    }
    assert!(shares.last() < Some(&0.05), "of the time, waiting: {shares:.3?}");
    Ok(())
}

fn a_store_that_is_gone_ends_the_training() -> Outcome {
    let server = stripes()?;
    let run = far(&server, |config| {
        config["data"]["patience_s"] = json!(2);
        config["train"]["steps"] = json!(50_000);
    });
    let job = run.start(2, &[]);
    let began = Instant::now();
    while run.lines().len() < 20 && began.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(20));
    }
    server.faults(|faults| faults.away_until = Some(Instant::now() + Duration::from_secs(3600)));
    let end = job.end(60);
    assert_eq!(end.code, 69, "{}", end.told);
    assert!(end.told.contains("after 2 s of trying") && end.told.contains("b/train/"), "{}", end.told);
    Ok(())
}

fn a_run_lives_in_a_store() -> Outcome {
    let near = Run::tiny();
    near.finish(0, &[]);
    let server = Server::start();
    server.faults(|faults| faults.fail_every = 23);
    let config = Run::tiny();
    let home = tempfile::tempdir()?;
    let far = || {
        let path = config.config();
        let mut command = occlude(&["train", "--run", "s3://b/runs/one", "--config", path.to_str().expect("UTF-8")]);
        command.envs(server.s3_environment("somebody")).env("XDG_CACHE_HOME", home.path());
        config.spawn(&mut command)
    };
    // Stopped in the middle, and then as if on another machine: nothing is left but the store.
    let job = far();
    let began = Instant::now();
    while !server.keys().iter().any(|key| key.contains("step-00000060/manifest")) {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", server.keys());
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_raw(job.pid()).expect("a process"), Signal::USR1)?;
    let end = job.end(60);
    assert_eq!(end.code, 75, "{}", end.told);
    std::fs::remove_dir_all(home.path().join("occlude"))?;
    let end = far().end(60);
    assert_eq!(end.code, 0, "{}", end.told);
    let folder = tempfile::tempdir()?;
    server.download("b/runs/one", folder.path())?;
    let (ours, theirs) = (checkpoint::open(folder.path().to_str().expect("UTF-8"))?, near.newest()?);
    assert_eq!(ours.manifest.step, theirs.manifest.step);
    for (name, tensor) in &theirs.tensors {
        assert!(ours.tensors[name] == *tensor, "{name} is not the same to the bit");
    }
    let mut steps = Vec::new();
    for part in std::fs::read_dir(folder.path().join("metrics"))? {
        for line in std::fs::read_to_string(part?.path())?.lines() {
            steps.push(serde_json::from_str::<Value>(line)?["step"].as_u64().expect("a step"));
        }
    }
    steps.sort();
    assert_eq!(steps, (1..=theirs.manifest.step).collect::<Vec<_>>(), "every step once");
    for file in ["config.json", "tensorboard/"] {
        assert!(server.keys().iter().any(|key| key.starts_with(&format!("b/runs/one/{file}"))), "{file} is missing");
    }
    Ok(())
}

fn the_budget_of_feeding_is_printed() -> Outcome {
    let run = Run::tiny();
    let config = run.config();
    let mut command = occlude(&["bench", "data", "--seconds", "1", "--config"]);
    let output = command.arg(config).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["fetch", "decode", "view", "batch", "copy", "samples/s", "the limit is"] {
        assert!(text.contains(word), "{word} is missing: {text}");
    }
    let answer: Value = serde_json::from_str(text.lines().last().expect("a line"))?;
    let stages: f64 = answer["us_per_sample"].as_object().expect("stages").values().filter_map(Value::as_f64).sum();
    let whole = answer["process_us_per_sample"].as_f64().expect("a number");
    assert!(stages > 0.3 * whole && stages < 1.5 * whole, "stages of {stages} µs in {whole} µs of processor");
    Ok(())
}
