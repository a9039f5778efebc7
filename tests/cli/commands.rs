//! Tests of the commands in the order in which a user runs them, and of `--dump-steps`.

use crate::support::training_job::{Run, occlude_command, reference_run, shared_data, tiny_config};
use crate::support::{Outcome, Tensors, oracle, path_text, read};
use serde_json::Value;
use tch::{Kind, Tensor};

crate::trials![
    the_commands_lead_from_images_to_a_report,
    schema_and_doctor_print_their_output,
    a_dumped_step_can_be_recomputed_in_pytorch,
];

/// Runs a command, which must succeed, and returns its output.
fn run_command(words: &[&str]) -> String {
    let output = occlude_command(words).output().expect("occlude starts");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn the_commands_lead_from_images_to_a_report() -> Outcome {
    let path = tempfile::tempdir()?;
    let at = |name: &str| path_text(path.path().join(name));
    let output = run_command(&["pack", &path_text(shared_data().join("in")), &at("shards"), "--test-fraction", "0.25"]);
    assert_eq!(output.lines().count(), 2, "{output}");

    let mut config = tiny_config();
    config["data"]["train"] = at("shards/train").into();
    config["train"]["steps"] = 60.into();
    config["log"]["image_interval_steps"] = 40.into();
    let run = Run::new(&config);
    run.finish(0, &[]);
    let folder = path_text(run.folder());
    for step in [40, 60] {
        let image = run.folder().join(format!("pictures/step-{step:08}-reconstruction.png"));
        assert!(image::open(&image)?.width() > 0);
    }
    let resolved: Value = serde_json::from_slice(&std::fs::read(run.folder().join("config.json"))?)?;
    assert_eq!((&resolved["train"]["steps"], &resolved["checkpoint"]["keep_last"]), (&60.into(), &3.into()));
    assert!(run.folder().join("tensorboard").read_dir()?.count() > 0);

    for protocol in ["knn", "linear"] {
        let train = at("shards/train");
        let test = at("shards/test");
        let mut words = vec!["evaluate", "--checkpoint", &folder, "--train", &train, "--test", &test];
        words.extend(["--protocol", protocol]);
        let reply = |words: &[&str]| -> Result<Value, serde_json::Error> {
            serde_json::from_str(run_command(words).lines().last().expect("a line"))
        };
        let trained = reply(&words)?;
        words.push("--random-init");
        let random = reply(&words)?;
        assert_eq!((&trained["checkpoint"], &trained["step"]), (&"pretrained".into(), &60.into()));
        assert_eq!((&random["checkpoint"], &random["step"]), (&"random".into(), &0.into()));
        for reply in [&trained, &random] {
            let top1 = reply["top1"].as_f64().expect("a number");
            assert!(reply["protocol"] == protocol && (0.0..=1.0).contains(&top1), "{reply}");
            assert_eq!(reply["n_train"].as_u64().zip(reply["n_test"].as_u64()).map(|(a, b)| a + b), Some(260));
        }
    }

    let files =
        [path_text(shared_data().join("in/stripes-0/000.png")), path_text(shared_data().join("in/stripes-1/001.png"))];
    let output =
        run_command(&["reconstruct", "--checkpoint", &folder, "--input", &files[0], &files[1], "--out", &at("out")]);
    let written: Vec<&str> = output.lines().collect();
    assert_eq!(written, [at("out/000-000.png"), at("out/001-001.png")]);
    let sheets = written.iter().map(image::open).collect::<Result<Vec<_>, _>>()?;
    assert!(sheets[0].as_bytes() != sheets[1].as_bytes(), "two pictures, one sheet");

    let output = run_command(&["report", &folder]);
    assert_eq!(output.trim(), path_text(run.folder().join("report.html")));
    let page = std::fs::read_to_string(run.folder().join("report.html"))?;
    assert!(page.contains("<svg") && page.contains("data:image/png;base64,"), "no curve or no picture");
    let other = path_text(reference_run(0).folder());
    run_command(&["report", &folder, &other, "--out", &at("both.html")]);
    assert!(std::fs::metadata(at("both.html"))?.len() > 1000);
    Ok(())
}

fn schema_and_doctor_print_their_output() -> Outcome {
    let schema: Value = serde_json::from_str(&run_command(&["schema"]))?;
    for section in ["input", "method", "optim", "data", "train"] {
        assert!(schema["properties"].get(section).is_some(), "no {section} in the schema");
    }
    assert!(run_command(&["doctor"]).contains("libtorch"));
    let run = Run::tiny();
    let output = run_command(&["bench", "--config", &path_text(run.config()), "--steps", "5"]);
    let line: Value = serde_json::from_str(output.lines().last().expect("a line"))?;
    assert!(line["ms"].as_f64() > Some(0.0) && line["steps"] == 5, "{line}");
    let help = run_command(&["--help"]);
    for verb in ["pack", "train", "evaluate", "reconstruct", "report", "bench", "doctor", "schema"] {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(&format!("{verb} ")) || line.trim() == verb),
            "no {verb} in: {help}"
        );
    }
    Ok(())
}

const NUMBERS: [&str; 5] = ["loss", "loss_local", "lr", "weight_decay", "clip_scale"];

/// Checks the shapes and kinds of a rank's dump of `rows` samples, and that its tokens are a permutation.
fn assert_dump_is_complete(dump: &Tensors, rows: i64) {
    let shape = |name: &str| dump[name].size();
    assert_eq!(shape("input"), [rows, 1, 1, 16, 16]);
    assert_eq!((shape("keep"), shape("drop"), shape("restore")), (vec![rows, 4], vec![rows, 12], vec![rows, 16]));
    assert_eq!(shape("sample_id"), [rows]);
    for name in ["keep", "drop", "restore", "sample_id"] {
        assert_eq!(dump[name].kind(), Kind::Int64);
    }
    for name in NUMBERS {
        assert!(dump[name].double_value(&[0]).is_finite(), "{name}");
    }
    let joined = Tensor::cat(&[&dump["keep"], &dump["drop"]], 1);
    let all = joined.gather(1, &dump["restore"], false);
    assert_eq!(all, Tensor::arange(16, (Kind::Int64, tch::Device::Cpu)).expand_as(&all));
}

/// Two ranks with uneven local batches in uneven micro-batches: their dumps hold all that a ViTMAEForPreTraining needs
/// to compute the same loss and gradients.
fn a_dumped_step_can_be_recomputed_in_pytorch() -> Outcome {
    let run = Run::with_overrides(&[
        "train.steps=4",
        "train.global_batch=11",
        "train.micro_batch=4",
        "optim.clip_grad_norm=0.1",
        "method.mae.target.normalize=true",
        "method.mae.encoder.depth=2",
        "method.mae.decoder.width=20",
    ]);
    run.finish(2, &["--dump-steps", "2"]);
    let dump = |step: u64, rank: usize| run.folder().join(format!("dump/step-{step:08}-rank-{rank}.safetensors"));
    assert_eq!(run.folder().join("dump").read_dir()?.count(), 4);
    let line = |step: u64| run.lines()[step as usize].clone();
    for step in 0..2 {
        let ranks = [read(&dump(step, 0))?, read(&dump(step, 1))?];
        assert_dump_is_complete(&ranks[0], 5);
        assert_dump_is_complete(&ranks[1], 6);
        let shared = |name: &&String| name.starts_with("weight.") || name.starts_with("grad.");
        let names: Vec<&String> = ranks[0].keys().filter(shared).collect();
        assert!(names.contains(&&"weight.blocks.1.attn.qkv.weight".to_string()), "{names:?}");
        assert_eq!(names, ranks[1].keys().filter(shared).collect::<Vec<_>>());
        for name in names {
            assert_eq!(ranks[0][name], ranks[1][name], "{name} differs between ranks");
        }
        let number = |name: &str| ranks[0][name].double_value(&[0]);
        assert_eq!((number("loss"), number("lr")), (line(step).loss, line(step).lr));
        let clip = 0.1 / line(step).grad_norm;
        assert!(clip < 0.5 && (number("clip_scale") / clip - 1.0).abs() < 1e-6, "{} for {clip}", number("clip_scale"));
    }
    let files: Vec<String> = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(step, rank)| path_text(dump(step, rank))).into();
    let config = path_text(run.folder().join("config.json"));
    let mut words = vec![config.as_str(), "2"];
    words.extend(files.iter().map(String::as_str));
    let output = oracle("replay_dump.py", &words)?;
    assert_eq!(output.lines().count(), 2, "{output}");
    for (step, line) in output.lines().enumerate() {
        let reply: Value = serde_json::from_str(line)?;
        let difference = reply["loss_off"].as_f64().expect("a number");
        assert!(difference <= 1e-5, "the loss is off by {difference:e}");
        let gradients = reply["gradients"].as_object().expect("gradients");
        let ours = read(&dump(step as u64, 0))?;
        assert_eq!(gradients.len(), ours.keys().filter(|name| name.starts_with("grad.")).count());
        let norm = |of: &Value, label: &str| of[label].as_f64().expect("a number");
        let greatest = gradients.values().map(|found| norm(found, "greatest")).fold(0.0, f64::max);
        for (name, found) in gradients {
            let within = 2.0 * norm(found, "fp32") + 1e-5 * norm(found, "norm") + 1e-7 * greatest;
            assert!(norm(found, "distance") <= within, "gradient of {name}: {found}, allowed {within:e}");
        }
    }
    Ok(())
}
