//! Tests of `occlude bench`: the table of a step, its trace, and model FLOPs utilization in the log of every run.

use crate::support::Outcome;
use crate::support::training_job::{Run, occlude_command, tiny_config};
use occlude::bench::Bench;
use occlude::config::Config;
use occlude::dist::World;
use occlude::dist::solo::SoloWorld;
use occlude::log::{MetricsLine, RunLog};
use occlude::timing::device_timer::best_flops_per_s;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use tch::Device;

crate::trials![
    a_staged_step_updates_weights_as_the_trainer_does,
    synthetic_batches_include_captions,
    the_table_lists_every_part_and_ends_with_json,
    missing_data_is_replaced_by_noise_with_a_warning,
    interleaved_steps_run_once_per_input_line,
    several_ranks_print_one_table,
    trace_spans_nest_and_cover_the_parts_of_a_step,
    the_peak_is_the_best_of_several_products,
    every_run_reports_model_flops_utilization,
    the_log_computes_utilization_for_metrics_and_console,
    options_of_other_benchmarks_are_rejected,
];

fn a_staged_step_updates_weights_as_the_trainer_does() -> Outcome {
    let mut config = tiny_config();
    config["optim"]["clip_grad_norm"] = 0.05.into();
    config["optim"]["ema_decay"] = 0.9.into();
    config["train"]["micro_batch"] = 4.into();
    let config = Config::parse(&config.to_string(), &[])?;
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    tch::set_num_threads(1);
    let mut both = [(); 2].map(|()| Bench::new(&config, &world, true).expect("a bench"));
    assert!(both.iter().all(|(_, noise)| noise.is_none()), "the data exist");
    for _ in 0..4 {
        both[0].0.step()?;
        let (seconds, bytes) = both[1].0.step_by_stage()?;
        assert!(seconds.iter().all(|seconds| *seconds >= 0.0) && seconds[1] > 0.0 && seconds[2] > 0.0, "{seconds:?}");
        assert_eq!(bytes, 10 * 16 * 16);
    }
    let [(step, _), (stages, _)] = &both;
    let step = &step.stepper;
    let stages = &stages.stepper;
    assert!(step.flat.master.equal(&stages.flat.master), "the weights differ");
    assert!(step.flat.exp_avg_sq.equal(&stages.flat.exp_avg_sq), "the moments differ");
    let average = |stepper: &occlude::train::step::Stepper| stepper.updater.ema.as_ref().expect("an average").copy();
    assert!(average(step).equal(&average(stages)), "the averages differ");
    let fresh = Bench::new(&config, &world, true)?.0;
    assert!(!fresh.stepper.flat.master.equal(&step.flat.master), "nothing changed");
    Ok(())
}

fn synthetic_batches_include_captions() -> Outcome {
    let config = Config::parse(include_str!("../configs/tiny/flip.json"), &["train.global_batch=8".into()])?;
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let mut bench = Bench::new(&config, &world, false)?.0;
    let start = bench.stepper.flat.master.copy();
    bench.step()?;
    let moved = bench.stepper.flat.master.copy();
    assert_eq!(bench.step_by_stage()?.1, 8 * (3 * 64 * 64 + 16 * 8), "pixels and ids");
    assert!(!start.equal(&moved) && !moved.equal(&bench.stepper.flat.master), "both kinds of steps update the weights");
    Ok(())
}

/// Runs `bench` on the config of a run and returns its output. It must succeed.
fn run_bench(run: &Run, more: &[&str]) -> String {
    let config = run.config();
    let mut words = vec!["bench", "--config", config.to_str().expect("UTF-8"), "--steps", "6"];
    words.extend(run.sets.iter().flat_map(|set| ["--set", set.as_str()]));
    words.extend(more);
    let output = occlude_command(&words).output().expect("occlude starts");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn last_line(output: &str) -> Value {
    serde_json::from_str(output.lines().last().expect("a line")).expect("JSON")
}

const PARTS: [&str; 8] = ["data wait", "copy", "forward", "backward", "reduction", "optimizer", "the rest", "step"];

fn the_table_lists_every_part_and_ends_with_json() -> Outcome {
    let run = Run::tiny();
    let out = run.config().with_file_name("bench.json");
    let output = run_bench(&run, &["--out", out.to_str().expect("UTF-8")]);
    for part in PARTS {
        assert!(output.lines().any(|line| line.starts_with(&format!("{part} "))), "no {part} in {output}");
    }
    assert!(output.contains("input: the config's data"), "{output}");
    let line = last_line(&output);
    assert_eq!(line, serde_json::from_str::<Value>(&std::fs::read_to_string(out)?)?, "--out is the last line");
    let parts = line["parts"].as_array().expect("parts");
    let ms = |name: &str| parts.iter().find(|part| part["part"] == name).expect(name)["ms"].as_f64().expect("a number");
    assert!(ms("forward") > 0.0 && ms("backward") > 0.0 && ms("optimizer") > 0.0, "{line}");
    let full: f64 = PARTS[..7].iter().map(|part| ms(part)).sum();
    assert!((full / ms("step") - 1.0).abs() < 1e-6, "the parts take {full}, the step takes {}", ms("step"));
    let number = |key: &str| line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"));
    assert!((number("samples_per_s") * number("ms") / 1e3 / 10.0 - 1.0).abs() < 1e-6, "ten samples per step: {line}");
    let mfu = number("flop_per_sample") * number("samples_per_s") / number("matmul_flop_per_s");
    assert!((number("mfu_of_matmul") / mfu - 1.0).abs() < 1e-6 && mfu > 0.0, "{line}");
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

fn missing_data_is_replaced_by_noise_with_a_warning() -> Outcome {
    let run = Run::with_overrides(&["data.train=no/such/folder", "train.dtype=bf16"]);
    let output = run_bench(&run, &[]);
    let line = last_line(&output);
    assert!(
        output.contains("input: noise, since the data do not open: ") && output.contains("no/such/folder"),
        "{output}"
    );
    assert_eq!((&line["input"], &line["dtype"], &line["data_wait"]), (&"noise".into(), &"bf16".into(), &0.0.into()));
    // Compute weights are kept next to the master weights.
    let memory = |part: &str| line["memory"][part].as_u64().expect("bytes");
    assert_eq!(2 * memory("weights"), 3 * memory("gradients"));
    Ok(())
}

fn several_ranks_print_one_table() -> Outcome {
    let run = Run::tiny();
    let config = run.config();
    let mut command = std::process::Command::new(crate::support::root().join("launch/mpirun"));
    command
        .args(["-n", "2", "--", crate::support::training_job::program(), "bench", "--steps", "3", "--config"])
        .arg(config);
    let output = command.env("OMP_NUM_THREADS", "1").output()?;
    let text = String::from_utf8(output.stdout)?;
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().filter(|line| line.starts_with("forward ")).count(), 1, "{text}");
    let line = last_line(&text);
    assert_eq!((&line["ranks"], &line["global_batch"], &line["input"]), (&2.into(), &10.into(), &"data".into()));
    // Utilization counts the matrix products of both ranks.
    let mfu =
        line["flop_per_sample"].as_f64().zip(line["samples_per_s"].as_f64()).map(|(flops, rate)| flops * rate / 2.0);
    let text =
        line["mfu_of_matmul"].as_f64().zip(line["matmul_flop_per_s"].as_f64()).map(|(fraction, peak)| fraction * peak);
    assert!((mfu.expect("numbers") / text.expect("numbers") - 1.0).abs() < 1e-6, "{line}");
    Ok(())
}

/// Other processes may disturb the products of one size, or of a whole round.
fn the_peak_is_the_best_of_several_products() -> Outcome {
    let flops = |side: i64| 2.0 * (side as f64).powi(3);
    for disturbed in [0..4, 3..20, 5..6] {
        let mut calls = 0;
        let rate = best_flops_per_s(&mut |side| {
            calls += 1;
            // Five products at 50 GFLOP/s or less.
            let slowdown = if disturbed.contains(&(calls - 1)) { 100.0 } else { 1.0 };
            Ok((0..5).map(|k| slowdown * flops(side) / 50e9 * (1.0 + 0.1 * f64::from(k))).collect())
        })?;
        assert!((rate / 50e9 - 1.0).abs() < 1e-9, "{rate} where calls {disturbed:?} of {calls} are disturbed");
    }
    Ok(())
}

fn interleaved_steps_run_once_per_input_line() -> Outcome {
    use std::io::Write;
    let run = Run::tiny();
    let mut command = occlude_command(&["bench", "--interleaved", "--config", run.config().to_str().expect("UTF-8")]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().expect("a pipe").write_all(b"\n3\n1\n")?;
    let output = child.wait_with_output()?;
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout)?;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[..3].iter().all(|line| line.parse::<f64>().is_ok_and(|seconds| seconds > 0.0)), "{text}");
    assert!(last_line(&text)["memory"]["peak"].as_u64() > Some(0), "{text}");
    Ok(())
}

/// A span of a trace, in microseconds.
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

fn trace_spans_nest_and_cover_the_parts_of_a_step() -> Outcome {
    let run = Run::tiny();
    let path = run.config().with_file_name("trace.json");
    run_bench(&run, &["--trace", path.to_str().expect("UTF-8")]);
    let mut spans = spans(&path)?;
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    for (name, times) in [("step", 2), ("step by stage", 2), ("data", 4), ("mask", 4), ("forward", 4), ("backward", 4)]
    {
        assert_eq!(named(name).len(), times, "{name}: {:?}", named(name));
    }
    for (name, min) in [("copy", 2), ("reduce", 2), ("update", 2)] {
        assert!(named(name).len() >= min, "{name}");
    }
    let inside = |outer: &str, inner: &str| {
        let holds = |a: &Span, b: &Span| a.place == b.place && a.from <= b.from && b.to <= a.to;
        named(outer).iter().any(|a| named(inner).iter().any(|b| holds(a, b)))
    };
    assert!(inside("step by stage", "forward") && inside("step by stage", "update"), "the parts are in the step");
    assert!(inside("forward", "mask") && inside("step", "mask"), "the mask is sampled in the forward pass");
    assert!(inside("forward", "aten::layer_norm"), "libtorch's operations are in the forward pass");
    // On every thread a span ends before its enclosing span; the profiler writes thousandths of a microsecond.
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

fn every_run_reports_model_flops_utilization() -> Outcome {
    let run = crate::support::training_job::reference_run(2);
    let lines = run.lines();
    assert!(!lines.is_empty());
    let fraction = |line: &MetricsLine| line.mfu.expect("a number") / line.samples_per_s;
    for line in &lines {
        assert!(line.mfu > Some(0.0), "{line:?}");
        assert!((fraction(line) / fraction(&lines[0]) - 1.0).abs() < 1e-6, "utilization is proportional to speed");
    }
    Ok(())
}

fn the_log_computes_utilization_for_metrics_and_console() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut log =
        RunLog::create(folder.path(), 10, 1000.0)?.with_output(std::io::sink(), 1000.0).with_peak_samples_per_s(400.0);
    let line = MetricsLine {
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
    log.record_step(&line)?;
    log.sync()?;
    let text = std::fs::read_to_string(folder.path().join("metrics.jsonl"))?;
    assert_eq!(serde_json::from_str::<MetricsLine>(text.trim())?.mfu, Some(0.25));
    let events: Vec<u8> = std::fs::read_dir(folder.path().join("tensorboard"))?
        .flatten()
        .flat_map(|entry| std::fs::read(entry.path()).expect("events"))
        .collect();
    assert!(events.windows(9).any(|bytes| bytes == b"speed/mfu"), "TensorBoard gets it as well");
    Ok(())
}

fn options_of_other_benchmarks_are_rejected() -> Outcome {
    let run = Run::tiny();
    let config = run.config();
    let config = config.to_str().expect("UTF-8");
    let refused = |words: &[&str], why: &str| {
        let output = occlude_command(words).output().expect("occlude starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {text}");
        assert!(text.contains(why), "{words:?}: {text}");
    };
    refused(&["bench", "data", "--config", config, "--trace", "x.json"], "--trace belongs to bench step");
    refused(&["bench", "op", "--nvtx"], "--nvtx belongs to bench step");
    refused(&["bench", "data", "--config", config, "--out", "x.json"], "--out belongs to bench step and bench op");
    refused(&["bench", "--config", config, "--nvtx", "--trace", "x.json"], "cannot be used with");
    refused(&["bench", "--config", config, "--interleaved", "--steps", "3"], "cannot be used with");
    Ok(())
}
