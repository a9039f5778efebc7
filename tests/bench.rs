//! What `occlude bench` tells of a step, its trace, and model FLOP utilisation in the log of every run.

use crate::job::{Run, occlude, tiny};
use crate::support::Outcome;
use occlude::config::Config;
use occlude::device::World;
use occlude::device::solo::Solo;
use occlude::run::bench::Bench;
use occlude::run::log::{Line, Log};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use tch::Device;

crate::trials![
    a_step_by_stages_moves_the_weights_as_the_trainer_does,
    captions_are_a_part_of_noise,
    the_table_tells_every_part_and_its_last_line_is_json,
    without_data_it_takes_noise_and_says_why,
    turns_are_taken_for_every_line,
    several_ranks_tell_one_table,
    a_trace_nests_and_holds_the_parts_of_a_step,
    every_run_tells_its_model_flop_utilisation,
    the_log_works_utilisation_out_for_both_readers,
    options_of_other_benchmarks_are_refused,
];

fn a_step_by_stages_moves_the_weights_as_the_trainer_does() -> Outcome {
    let mut config = tiny();
    config["optim"]["clip"] = 0.05.into();
    config["optim"]["ema"] = 0.9.into();
    config["train"]["micro_batch"] = 4.into();
    let config = Config::parse(&config.to_string(), &[])?;
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    tch::set_num_threads(1);
    let mut both = [(); 2].map(|()| Bench::new(&config, &world, true).expect("a bench"));
    assert!(both.iter().all(|(_, noise)| noise.is_none()), "the data are there");
    for _ in 0..4 {
        both[0].0.step()?;
        let (seconds, bytes) = both[1].0.stages()?;
        assert!(seconds.iter().all(|seconds| *seconds >= 0.0) && seconds[1] > 0.0 && seconds[2] > 0.0, "{seconds:?}");
        assert_eq!(bytes, 10 * 16 * 16);
    }
    let [(step, _), (stages, _)] = &both;
    let (step, stages) = (&step.stepper, &stages.stepper);
    assert!(step.flat.master.equal(&stages.flat.master), "the weights differ");
    assert!(step.flat.second.equal(&stages.flat.second), "the moments differ");
    let average = |stepper: &occlude::run::step::Stepper| stepper.updater.average.as_ref().expect("an average").copy();
    assert!(average(step).equal(&average(stages)), "the averages differ");
    let fresh = Bench::new(&config, &world, true)?.0;
    assert!(!fresh.stepper.flat.master.equal(&step.flat.master), "nothing moved");
    Ok(())
}

fn captions_are_a_part_of_noise() -> Outcome {
    let config = Config::parse(include_str!("../configs/tiny/flip.json"), &["train.global_batch=8".into()])?;
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let mut bench = Bench::new(&config, &world, false)?.0;
    let begun = bench.stepper.flat.master.copy();
    bench.step()?;
    let moved = bench.stepper.flat.master.copy();
    assert_eq!(bench.stages()?.1, 8 * (3 * 64 * 64 + 16 * 8), "pixels and ids");
    assert!(!begun.equal(&moved) && !moved.equal(&bench.stepper.flat.master), "both kinds of steps move the weights");
    Ok(())
}

/// The output of `bench` on a run's config, which must succeed.
fn bench(run: &Run, more: &[&str]) -> String {
    let config = run.config();
    let mut words = vec!["bench", "--config", config.to_str().expect("UTF-8"), "--steps", "6"];
    words.extend(run.sets.iter().flat_map(|set| ["--set", set.as_str()]));
    words.extend(more);
    let output = occlude(&words).output().expect("occlude starts");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn last(told: &str) -> Value {
    serde_json::from_str(told.lines().last().expect("a line")).expect("JSON")
}

const PARTS: [&str; 8] = ["data wait", "copy", "forward", "backward", "reduction", "optimizer", "the rest", "step"];

fn the_table_tells_every_part_and_its_last_line_is_json() -> Outcome {
    let run = Run::tiny();
    let out = run.config().with_file_name("bench.json");
    let told = bench(&run, &["--out", out.to_str().expect("UTF-8")]);
    for part in PARTS {
        assert!(told.lines().any(|line| line.starts_with(&format!("{part} "))), "no {part} in {told}");
    }
    assert!(told.contains("input: the config's data"), "{told}");
    let line = last(&told);
    assert_eq!(line, serde_json::from_str::<Value>(&std::fs::read_to_string(out)?)?, "--out is the last line");
    let parts = line["parts"].as_array().expect("parts");
    let ms = |name: &str| parts.iter().find(|part| part["part"] == name).expect(name)["ms"].as_f64().expect("a number");
    assert!(ms("forward") > 0.0 && ms("backward") > 0.0 && ms("optimizer") > 0.0, "{line}");
    let whole: f64 = PARTS[..7].iter().map(|part| ms(part)).sum();
    assert!((whole / ms("step") - 1.0).abs() < 1e-6, "the parts make {whole}, the step takes {}", ms("step"));
    let number = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"));
    assert!((number("samples_per_s") * number("ms") / 1e3 / 10.0 - 1.0).abs() < 1e-6, "ten samples a step: {line}");
    let mfu = number("flop_per_sample") * number("samples_per_s") / number("product_flop_per_s");
    assert!((number("mfu_of_product") / mfu - 1.0).abs() < 1e-6 && mfu > 0.0, "{line}");
    let reached = number("samples_per_s") / number("roofline_samples_per_s");
    assert!((number("of_roofline") / reached - 1.0).abs() < 1e-6, "{line}");
    let memory = |part: &str| line["memory"][part].as_u64().expect("bytes");
    let parameters = line["parameters"].as_u64().expect("a number");
    // Every tensor begins at a multiple of 512 bytes.
    assert!((4 * parameters..4 * parameters + 512 * 64).contains(&memory("weights")), "{line}");
    assert_eq!([memory("gradients"), memory("moments")], [memory("weights"), 2 * memory("weights")]);
    assert!(memory("peak") > 4 * memory("weights"));
    Ok(())
}

fn without_data_it_takes_noise_and_says_why() -> Outcome {
    let run = Run::with(&["data.train=no/such/folder", "train.dtype=bf16"]);
    let told = bench(&run, &[]);
    let line = last(&told);
    assert!(told.contains("input: noise, since the data do not open: ") && told.contains("no/such/folder"), "{told}");
    assert_eq!((&line["input"], &line["dtype"], &line["data_wait"]), (&"noise".into(), &"bf16".into(), &0.0.into()));
    // Weights to compute with stand beside the master weights.
    let memory = |part: &str| line["memory"][part].as_u64().expect("bytes");
    assert_eq!(2 * memory("weights"), 3 * memory("gradients"));
    Ok(())
}

fn several_ranks_tell_one_table() -> Outcome {
    let run = Run::tiny();
    let config = run.config();
    let mut command = std::process::Command::new(crate::support::root().join("launch/mpirun"));
    command.args(["-n", "2", "--", crate::job::program(), "bench", "--steps", "3", "--config"]).arg(config);
    let output = command.env("OMP_NUM_THREADS", "1").output()?;
    let told = String::from_utf8(output.stdout)?;
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(told.lines().filter(|line| line.starts_with("forward ")).count(), 1, "{told}");
    let line = last(&told);
    assert_eq!((&line["ranks"], &line["global_batch"], &line["input"]), (&2.into(), &10.into(), &"data".into()));
    // Of both ranks' products together.
    let mfu =
        line["flop_per_sample"].as_f64().zip(line["samples_per_s"].as_f64()).map(|(flops, rate)| flops * rate / 2.0);
    let told =
        line["mfu_of_product"].as_f64().zip(line["product_flop_per_s"].as_f64()).map(|(share, peak)| share * peak);
    assert!((mfu.expect("numbers") / told.expect("numbers") - 1.0).abs() < 1e-6, "{line}");
    Ok(())
}

fn turns_are_taken_for_every_line() -> Outcome {
    use std::io::Write;
    let run = Run::tiny();
    let mut command = occlude(&["bench", "--by-turns", "--config", run.config().to_str().expect("UTF-8")]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().expect("a pipe").write_all(b"\n3\n1\n")?;
    let output = child.wait_with_output()?;
    assert!(output.status.success());
    let told = String::from_utf8(output.stdout)?;
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), 4, "{told}");
    assert!(lines[..3].iter().all(|line| line.parse::<f64>().is_ok_and(|seconds| seconds > 0.0)), "{told}");
    assert!(last(&told)["memory"]["peak"].as_u64() > Some(0), "{told}");
    Ok(())
}

/// A stretch of a trace, in microseconds.
#[derive(Debug)]
struct Span {
    name: String,
    place: (String, String),
    from: f64,
    to: f64,
}

fn spans(path: &Path) -> Result<Vec<Span>, libtest_mimic::Failed> {
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let events = trace["traceEvents"].as_array().expect("traceEvents");
    let span = |event: &Value| {
        let kind = event["cat"].as_str()?;
        let number = |key: &str| event[key].as_f64();
        (event["ph"] == "X" && ["cpu_op", "user_annotation"].contains(&kind)).then_some(())?;
        Some(Span {
            name: event["name"].as_str()?.to_owned(),
            place: (event["pid"].to_string(), event["tid"].to_string()),
            from: number("ts")?,
            to: number("ts")? + number("dur")?,
        })
    };
    Ok(events.iter().filter_map(span).collect())
}

fn a_trace_nests_and_holds_the_parts_of_a_step() -> Outcome {
    let run = Run::tiny();
    let path = run.config().with_file_name("trace.json");
    bench(&run, &["--trace", path.to_str().expect("UTF-8")]);
    let mut spans = spans(&path)?;
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    for (name, times) in [("step", 2), ("step by stage", 2), ("data", 4), ("mask", 4), ("forward", 4), ("backward", 4)]
    {
        assert_eq!(named(name).len(), times, "{name}: {:?}", named(name));
    }
    for (name, least) in [("copy", 2), ("reduce", 2), ("update", 2)] {
        assert!(named(name).len() >= least, "{name}");
    }
    let inside = |outer: &str, inner: &str| {
        let holds = |a: &Span, b: &Span| a.place == b.place && a.from <= b.from && b.to <= a.to;
        named(outer).iter().any(|a| named(inner).iter().any(|b| holds(a, b)))
    };
    assert!(inside("step by stage", "forward") && inside("step by stage", "update"), "the parts are in the step");
    assert!(inside("forward", "mask") && inside("step", "mask"), "the mask is drawn in the forward pass");
    assert!(inside("forward", "aten::layer_norm"), "libtorch's operations are in the forward pass");
    // On every thread a span ends before the one around it does; the profiler writes thousandths of a microsecond.
    spans.sort_by(|a, b| a.from.total_cmp(&b.from).then(b.to.total_cmp(&a.to)));
    let mut open: std::collections::BTreeMap<(String, String), Vec<&Span>> = Default::default();
    for span in &spans {
        let stack = open.entry(span.place.clone()).or_default();
        while stack.last().is_some_and(|outer| outer.to <= span.from + 1e-3) {
            stack.pop();
        }
        if let Some(outer) = stack.last() {
            assert!(span.to <= outer.to + 2e-3, "{span:?} ends after {outer:?}");
        }
        stack.push(span);
    }
    Ok(())
}

fn every_run_tells_its_model_flop_utilisation() -> Outcome {
    let run = crate::job::undisturbed(2);
    let lines = run.lines();
    assert!(!lines.is_empty());
    let share = |line: &Line| line.mfu.expect("a number") / line.samples_per_s;
    for line in &lines {
        assert!(line.mfu > Some(0.0), "{line:?}");
        assert!((share(line) / share(&lines[0]) - 1.0).abs() < 1e-6, "utilisation is speed by one factor");
    }
    Ok(())
}

fn the_log_works_utilisation_out_for_both_readers() -> Outcome {
    let place = tempfile::tempdir()?;
    let mut log = Log::create(place.path(), 10, 1000.0)?.tell(std::io::sink(), 1000.0).with_ceiling(400.0);
    let line = Line {
        step: 1,
        epoch: 0.1,
        samples: 10,
        loss: 1.0,
        terms: vec![("pixel".into(), 1.0)],
        lr: 1e-3,
        weight_decay: None,
        grad_norm: 1.0,
        samples_per_s: 100.0,
        data_wait: 0.0,
        comm_wait: 0.0,
        mfu: None,
        seconds: 0.1,
    };
    log.step(&line)?;
    log.sync()?;
    let text = std::fs::read_to_string(place.path().join("metrics.jsonl"))?;
    assert_eq!(serde_json::from_str::<Line>(text.trim())?.mfu, Some(0.25));
    let events: Vec<u8> = std::fs::read_dir(place.path().join("tensorboard"))?
        .flatten()
        .flat_map(|entry| std::fs::read(entry.path()).expect("events"))
        .collect();
    assert!(events.windows(9).any(|bytes| bytes == b"speed/mfu"), "TensorBoard is told too");
    Ok(())
}

fn options_of_other_benchmarks_are_refused() -> Outcome {
    let run = Run::tiny();
    let config = run.config();
    let config = config.to_str().expect("UTF-8");
    let refused = |words: &[&str], why: &str| {
        let output = occlude(words).output().expect("occlude starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {told}");
        assert!(told.contains(why), "{words:?}: {told}");
    };
    refused(&["bench", "data", "--config", config, "--trace", "x.json"], "--trace belongs to bench step");
    refused(&["bench", "op", "--nvtx"], "--nvtx belongs to bench step");
    refused(&["bench", "data", "--config", config, "--out", "x.json"], "--out belongs to bench step and bench op");
    refused(&["bench", "--config", config, "--nvtx", "--trace", "x.json"], "cannot be used with");
    refused(&["bench", "--config", config, "--by-turns", "--steps", "3"], "cannot be used with");
    Ok(())
}
