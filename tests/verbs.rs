//! The whole way of a user, verb by verb, and what `--dump-steps` promises to other implementations.

use crate::job::{Run, data, occlude, tiny, undisturbed};
use crate::refuse::text;
use crate::support::{Outcome, oracle, read};
use serde_json::Value;
use tch::{Kind, Tensor};

crate::trials![
    the_verbs_lead_from_pictures_to_a_report,
    the_verbs_about_the_program_answer,
    a_dumped_step_can_be_recomputed_by_somebody_else,
];

/// What a verb prints; it must succeed.
fn say(words: &[&str]) -> String {
    let output = occlude(words).output().expect("occlude starts");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn the_verbs_lead_from_pictures_to_a_report() -> Outcome {
    let place = tempfile::tempdir()?;
    let at = |name: &str| text(place.path().join(name));
    let told = say(&["pack", &text(data().join("in")), &at("shards"), "--test-share", "0.25"]);
    assert_eq!(told.lines().count(), 2, "{told}");

    let mut config = tiny();
    config["data"]["train"] = at("shards/train").into();
    config["train"]["steps"] = 60.into();
    config["log"]["pictures_every_steps"] = 40.into();
    let run = Run::new(&config);
    run.finish(0, &[]);
    let folder = text(run.folder());
    for step in [40, 60] {
        let picture = run.folder().join(format!("pictures/step-{step:08}-reconstruction.png"));
        assert!(image::open(&picture)?.width() > 0);
    }
    let resolved: Value = serde_json::from_slice(&std::fs::read(run.folder().join("config.json"))?)?;
    assert_eq!((&resolved["train"]["steps"], &resolved["checkpoint"]["keep_last"]), (&60.into(), &3.into()));
    assert!(run.folder().join("tensorboard").read_dir()?.count() > 0);

    for protocol in ["knn", "linear"] {
        let (train, test) = (at("shards/train"), at("shards/test"));
        let mut words = vec!["evaluate", "--checkpoint", &folder, "--train", &train, "--test", &test];
        words.extend(["--protocol", protocol]);
        let answer = |words: &[&str]| -> Result<Value, serde_json::Error> {
            serde_json::from_str(say(words).lines().last().expect("a line"))
        };
        let trained = answer(&words)?;
        words.push("--random");
        let random = answer(&words)?;
        assert_eq!((&trained["checkpoint"], &trained["step"]), (&"pretrained".into(), &60.into()));
        assert_eq!((&random["checkpoint"], &random["step"]), (&"random".into(), &0.into()));
        for answer in [&trained, &random] {
            let top1 = answer["top1"].as_f64().expect("a share");
            assert!(answer["protocol"] == protocol && (0.0..=1.0).contains(&top1), "{answer}");
            assert_eq!(answer["n_train"].as_u64().zip(answer["n_test"].as_u64()).map(|(a, b)| a + b), Some(260));
        }
    }

    let files = [text(data().join("in/stripes-0/000.png")), text(data().join("in/stripes-1/001.png"))];
    let told = say(&["reconstruct", "--checkpoint", &folder, "--input", &files[0], &files[1], "--out", &at("out")]);
    let written: Vec<&str> = told.lines().collect();
    assert_eq!(written, [at("out/000-000.png"), at("out/001-001.png")]);
    let sheets = written.iter().map(image::open).collect::<Result<Vec<_>, _>>()?;
    assert!(sheets[0].as_bytes() != sheets[1].as_bytes(), "two pictures, one sheet");

    let told = say(&["report", &folder]);
    assert_eq!(told.trim(), text(run.folder().join("report.html")));
    let page = std::fs::read_to_string(run.folder().join("report.html"))?;
    assert!(page.contains("<svg") && page.contains("data:image/png;base64,"), "no curve or no picture");
    let other = text(undisturbed(0).folder());
    say(&["report", &folder, &other, "--out", &at("both.html")]);
    assert!(std::fs::metadata(at("both.html"))?.len() > 1000);
    Ok(())
}

fn the_verbs_about_the_program_answer() -> Outcome {
    let schema: Value = serde_json::from_str(&say(&["schema"]))?;
    for section in ["input", "method", "optim", "data", "train"] {
        assert!(schema["properties"].get(section).is_some(), "no {section} in the schema");
    }
    assert!(say(&["doctor"]).contains("libtorch"));
    let run = Run::tiny();
    let told = say(&["bench", "--config", &text(run.config()), "--steps", "5"]);
    let line: Value = serde_json::from_str(told.lines().last().expect("a line"))?;
    assert!(line["ms"].as_f64() > Some(0.0) && line["steps"] == 5, "{line}");
    let help = say(&["--help"]);
    for verb in ["pack", "train", "evaluate", "reconstruct", "report", "bench", "doctor", "schema"] {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(&format!("{verb} ")) || line.trim() == verb),
            "no {verb} in: {help}"
        );
    }
    Ok(())
}

const NUMBERS: [&str; 5] = ["loss", "loss_local", "lr", "weight_decay", "clip_scale"];

/// Two ranks with uneven shares in uneven micro-batches: what they dump is all that a ViTMAEForPreTraining needs to find
/// the same loss and the same gradients.
fn a_dumped_step_can_be_recomputed_by_somebody_else() -> Outcome {
    let run = Run::with(&[
        "train.steps=4",
        "train.global_batch=11",
        "train.micro_batch=4",
        "optim.clip=0.1",
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
        for (rank, rows) in [(0, 5), (1, 6)] {
            let shape = |name: &str| ranks[rank][name].size();
            assert_eq!(shape("input"), [rows, 1, 1, 16, 16]);
            assert_eq!(
                (shape("keep"), shape("drop"), shape("restore")),
                (vec![rows, 4], vec![rows, 12], vec![rows, 16])
            );
            assert_eq!(shape("sample_id"), [rows]);
            for name in ["keep", "drop", "restore", "sample_id"] {
                assert_eq!(ranks[rank][name].kind(), Kind::Int64);
            }
            for name in NUMBERS {
                assert!(ranks[rank][name].double_value(&[0]).is_finite(), "{name}");
            }
            let joined = Tensor::cat(&[&ranks[rank]["keep"], &ranks[rank]["drop"]], 1);
            let all = joined.gather(1, &ranks[rank]["restore"], false);
            assert_eq!(all, Tensor::arange(16, (Kind::Int64, tch::Device::Cpu)).expand_as(&all));
        }
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
    let files: Vec<String> = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(step, rank)| text(dump(step, rank))).into();
    let config = text(run.folder().join("config.json"));
    let mut words = vec![config.as_str(), "2"];
    words.extend(files.iter().map(String::as_str));
    let told = oracle("replay_dump.py", &words)?;
    assert_eq!(told.lines().count(), 2, "{told}");
    for (step, line) in told.lines().enumerate() {
        let answer: Value = serde_json::from_str(line)?;
        let off = answer["loss_off"].as_f64().expect("a number");
        assert!(off <= 1e-5, "the loss is off by {off:e}");
        let gradients = answer["gradients"].as_object().expect("gradients");
        let ours = read(&dump(step as u64, 0))?;
        assert_eq!(gradients.len(), ours.keys().filter(|name| name.starts_with("grad.")).count());
        let norm = |of: &Value, what: &str| of[what].as_f64().expect("a number");
        let greatest = gradients.values().map(|found| norm(found, "greatest")).fold(0.0, f64::max);
        for (name, found) in gradients {
            let within = 1e-5 * norm(found, "norm") + 1e-7 * greatest;
            assert!(norm(found, "distance") <= within, "gradient of {name}: {found}, allowed {within:e}");
        }
    }
    Ok(())
}
