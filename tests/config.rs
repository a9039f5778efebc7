//! Tests of configs: parsing, validation with remedies, resolution.

use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, root};
use occlude::config::{self, Config, TrainSources, differences};
use occlude::error::{Error, ExitCode};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![
    an_unknown_key_is_rejected_with_the_nearest_name,
    an_unknown_method_is_rejected_with_the_nearest_name,
    numbers_out_of_range_are_rejected_by_key,
    two_keys_for_one_setting_exclude_each_other,
    the_program_exits_with_2_on_a_wrong_config,
    set_follows_the_path_of_a_key,
    a_set_value_is_json_or_else_a_string,
    an_invalid_set_is_rejected,
    comments_are_allowed,
    resolved_defaults_are_written_and_read_back,
    the_identity_covers_what_must_not_change,
    steps_follow_from_epochs,
    the_schema_covers_every_key,
    every_config_parses_names_its_source_and_builds,
    every_method_has_a_tiny_config,
];

fn tiny() -> String {
    std::fs::read_to_string(root().join("configs/tiny/mae.json")).expect("the tiny config")
}

fn config_with(overrides: &[&str]) -> Result<Config, Error> {
    let overrides: Vec<String> = overrides.iter().map(|line| line.to_string()).collect();
    Config::parse(&tiny(), &overrides)
}

/// Asserts that a config is rejected as a user's mistake with these words in the message.
fn assert_rejected(overrides: &[&str], words: &[&str]) {
    let error = config_with(overrides).expect_err(&format!("{overrides:?} went through"));
    assert_eq!(error.code, ExitCode::Usage, "{error}");
    for word in words {
        assert!(error.message.contains(word), "no `{word}` in: {error}");
    }
}

fn an_unknown_key_is_rejected_with_the_nearest_name() -> Outcome {
    for (line, path, nearest) in [
        ("train.stepz=5", "at train.stepz: unknown key `stepz`", "`steps`"),
        ("method.mae.mask.ration=0.5", "at method.mae.mask.ration: unknown key `ration`", "`ratio`"),
        ("method.mae.encoder.dept=2", "at method.mae.encoder.dept: unknown key `dept`", "`depth`"),
        ("input.heigth=28", "at input.heigth: unknown key `heigth`", "`height`"),
        ("optim.wieght_decay=0", "at optim.wieght_decay: unknown key `wieght_decay`", "`weight_decay`"),
        ("view.crop.scales=[0.1, 1]", "at view.crop.scales: unknown key `scales`", "`scale`"),
        ("chekpoint.every_steps=5", "at chekpoint: unknown key `chekpoint`", "`checkpoint`"),
        ("checkpoint.evry_steps=5", "at checkpoint.evry_steps: unknown key `evry_steps`", "`every_steps`"),
        ("world.buckets_mb=5", "at world.buckets_mb: unknown key `buckets_mb`", "`bucket_mb`"),
        ("optim.warmup={\"epoch\": 2}", "at optim.warmup: unknown value `epoch`", "`epochs`"),
        ("world.grad_dtype=bf61", "at world.grad_dtype: unknown value `bf61`", "`bf16`"),
        ("train.dtype=bf61", "at train.dtype: unknown value `bf61`", "`bf16`"),
    ] {
        assert_rejected(&[line], &[path, &format!("did you mean {nearest}?")]);
    }
    Ok(())
}

fn an_unknown_method_is_rejected_with_the_nearest_name() -> Outcome {
    let mut value: Value = serde_json::from_str(&tiny())?;
    let numbers = value["method"]["mae"].take();
    value["method"] = json!({"maee": numbers});
    let error = Config::parse(&value.to_string(), &[]).expect_err("an unknown method");
    assert_eq!(error.code, ExitCode::Usage);
    assert!(error.message.contains("at method: unknown value `maee`; did you mean `mae`?"), "{error}");
    Ok(())
}

fn numbers_out_of_range_are_rejected_by_key() -> Outcome {
    for (line, key) in [
        ("method.mae.mask.ratio=1.2", "method.mae.mask.ratio is 1.2"),
        ("method.mae.mask.ratio=0", "method.mae.mask.ratio is 0"),
        ("method.mae.mask.ratio=-0.1", "method.mae.mask.ratio is -0.1"),
        ("method.mae.mask.ratio=0.99", "keeps 0 of 49"),
        ("method.mae.encoder.heads=3", "method.mae.encoder.width is 128"),
        ("method.mae.decoder.width=6", "method.mae.decoder.width is 6"),
        ("input.patch=5", "input.height is 28"),
        ("input.frames=2", "input.frames makes 2 time slots"),
        ("input.std=[0]", "input.std holds 0"),
        ("input.mean=[0.1, 0.2]", "input.mean has 2 values for 1 channels"),
        ("train.steps=0", "train.steps is 0"),
        ("train.global_batch=0", "train.global_batch is 0"),
        ("train.micro_batch=257", "train.micro_batch is 257"),
        ("optim.betas=[0.9, 1.0]", "optim.betas[1] is 1"),
        ("optim.base_lr=-1", "optim.base_lr is -1"),
        ("optim.clip_grad_norm=0", "optim.clip_grad_norm is 0"),
        ("optim.ema_decay=1", "optim.ema_decay is 1"),
        ("optim.warmup.epochs=-1", "optim.warmup.epochs is -1"),
        ("data.max_corrupt_fraction=1.5", "data.max_corrupt_fraction is 1.5"),
        ("data.shuffle_shards=0", "data.shuffle_shards is 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last is 0"),
        ("world.bucket_mb=0", "world.bucket_mb is 0"),
        ("view.crop.scale=[0.5, 0.2]", "view.crop.scale is [0.5, 0.2]"),
        ("train.global_batch=-5", "at train.global_batch"),
        ("train.steps=abc", "at train.steps"),
    ] {
        assert_rejected(&[line], &[key]);
    }
    Ok(())
}

fn two_keys_for_one_setting_exclude_each_other() -> Outcome {
    for (section, one, other) in [("train", "steps", "epochs"), ("optim", "base_lr", "lr")] {
        for (keys, words) in [(vec![one, other], "give one of them"), (vec![], "give one of them")] {
            let mut value: Value = serde_json::from_str(&tiny())?;
            let part = value[section].as_object_mut().expect("a section");
            [one, other].iter().for_each(|key| drop(part.remove(*key)));
            keys.iter().for_each(|key| drop(part.insert(key.to_string(), json!(1))));
            let error = Config::parse(&value.to_string(), &[]).expect_err("both or none");
            assert!(error.code == ExitCode::Usage && error.message.contains(words), "{error}");
            assert!(error.message.contains(section) && error.message.contains(other), "{error}");
        }
    }
    // Overrides on the command line win over the file.
    let config = config_with(&["train.steps=7", "optim.lr=0.5"])?;
    assert_eq!((config.train.steps, config.train.epochs), (Some(7), None));
    assert_eq!((config.optim.lr, config.optim.base_lr), (Some(0.5), None));
    let config = config_with(&["train.steps=7", "train.epochs=2"])?;
    assert_eq!((config.train.steps, config.train.epochs), (None, Some(2.0)), "the later one wins");
    Ok(())
}

fn the_program_exits_with_2_on_a_wrong_config() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("wrong.json");
    std::fs::write(&path, "{ \"train\": ")?;
    let tiny = root().join("configs/tiny/mae.json");
    let run = folder.path().join("run");
    let cases = [
        (tiny.as_path(), "train.stepz=5", "did you mean `steps`?"),
        (tiny.as_path(), "method.mae.mask.ratio=1.2", "method.mae.mask.ratio is 1.2"),
        (path.as_path(), "train.steps=5", "not JSON"),
        (Path::new("no/such/config.json"), "train.steps=5", "no/such/config.json"),
    ];
    for (config, set, words) in cases {
        let output = Command::new(env!("CARGO_BIN_EXE_occlude"))
            .arg("train")
            .args([Path::new("--config"), config, Path::new("--set"), Path::new(set), Path::new("--run"), &run])
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words) && text.contains(&config.display().to_string()), "{text}");
        assert_eq!(text.trim_end().lines().count(), 1, "reported once: {text}");
        assert!(!run.exists(), "nothing was started");
    }
    Ok(())
}

fn set_follows_the_path_of_a_key() -> Outcome {
    let config = config_with(&[
        "method.mae.mask.ratio=0.5",
        "train.seed=9",
        "train.seed=10",
        "log.interval_s=3.5",
        "world.collective_timeout_s=9",
        "checkpoint.keep_every=50",
        "optim.warmup={\"steps\": 3}",
    ])?;
    let value = config.to_json();
    assert_eq!(value["method"]["mae"]["mask"]["ratio"], 0.5);
    assert_eq!(config.train.seed, 10, "the last one wins");
    assert_eq!(config.log.interval_s, 3.5, "next to an existing key");
    assert_eq!(config.world.collective_timeout_s, 9.0, "in a section that is missing in the file");
    assert_eq!(config.checkpoint.keep_every, Some(50));
    assert_eq!(value["optim"]["warmup"], json!({"steps": 3}));
    let changed: Vec<String> =
        differences(&config_with(&[])?.to_json(), &value).into_iter().map(|(path, ..)| path).collect();
    let expected = [
        "checkpoint.keep_every",
        "log.interval_s",
        "method.mae.mask.ratio",
        "optim.warmup.epochs",
        "optim.warmup.steps",
    ];
    assert_eq!(changed[..5], expected);
    assert_eq!(changed[5..], ["train.seed", "world.collective_timeout_s"], "and nothing else");
    Ok(())
}

fn a_set_value_is_json_or_else_a_string() -> Outcome {
    for (line, expected) in [
        ("data.train=some/folder", "some/folder"),
        ("data.train=\"some/folder\"", "some/folder"),
        ("data.train=s3://bucket/a=b", "s3://bucket/a=b"),
        ("data.train=dir/train-{000000..000009}.tar", "dir/train-{000000..000009}.tar"),
        ("data.train=\"2024\"", "2024"),
    ] {
        assert_eq!(config_with(&[line])?.data.train, TrainSources::Single(expected.into()), "{line}");
    }
    assert_eq!(config_with(&["train.dtype=bf16"])?.to_json()["train"]["dtype"], "bf16");
    assert_eq!(config_with(&["train.epochs=0.25"])?.train.epochs, Some(0.25));
    assert_eq!(config_with(&["view.crop.scale=[0.3, 0.9]"])?.view.crop.scale, [0.3, 0.9]);
    assert!(
        config_with(&["method.mae.target.normalize=true"])?.to_json()["method"]["mae"]["target"]["normalize"] == true
    );
    Ok(())
}

fn an_invalid_set_is_rejected() -> Outcome {
    for line in ["train.steps", "=5", "train..steps=5", ".train=5", "train.=5"] {
        assert_rejected(&[line], &[&format!("--set {line}: wanted path.to.key=value")]);
    }
    assert_rejected(&["train.seed.x=5"], &["--set train.seed.x=5", "`x`"]);
    assert_rejected(&["train=5"], &["at train"]);
    Ok(())
}

fn comments_are_allowed() -> Outcome {
    let mut text = String::from("// what this is\n/* at\nlength */\n");
    for line in tiny().lines() {
        text += line;
        text += " // said beside it\n";
    }
    text = text.replace("\"data/mnist/train\"", "\"s3://bucket/*not a comment*/x\" /* here */");
    let config = Config::parse(&text, &[])?;
    assert_eq!(
        config.data.train,
        TrainSources::Single("s3://bucket/*not a comment*/x".into()),
        "a string is not a comment"
    );
    let mut plain = config_with(&[])?;
    plain.data.train = config.data.train.clone();
    assert_eq!(config, plain);
    Ok(())
}

fn resolved_defaults_are_written_and_read_back() -> Outcome {
    for overrides in [
        &[][..],
        &["train.steps=3", "optim.lr=0.1", "optim.clip_grad_norm=0.3", "optim.ema_decay=0.9999", "data.threads=2"],
    ] {
        let config = config_with(overrides)?;
        let resolved = config.to_json();
        let second = Config::parse(&serde_json::to_string_pretty(&resolved)?, &[])?;
        assert_eq!(second, config);
        assert_eq!(second.to_json().to_string(), resolved.to_string(), "byte for byte");
    }
    let resolved = config_with(&[])?.to_json();
    for (path, expected) in [
        ("/world/bucket_mb", json!(25.0)),
        ("/checkpoint/keep_last", json!(2)),
        ("/train/max_nonfinite_steps", json!(3)),
        ("/train/cuda_graph", json!(true)),
        ("/train/dtype", json!("fp32")),
        ("/train/recompute", json!(false)),
        ("/world/grad_dtype", json!("fp32")),
        ("/world/shard_optimizer", json!(false)),
        ("/optim/eps", json!(1e-8)),
        ("/method/mae/mask_tokens", json!("decoder")),
        ("/method/mae/encoder/mlp_ratio", json!(4)),
        ("/data/shuffle_shards", json!(16)),
    ] {
        assert_eq!(resolved.pointer(path), Some(&expected), "{path}");
    }
    Ok(())
}

fn the_identity_covers_what_must_not_change() -> Outcome {
    let base = config_with(&[])?.resume_identity();
    for free in [
        "log.interval_s=3",
        "checkpoint.every_steps=3",
        "world.bucket_mb=3",
        "world.shard_optimizer=true",
        "train.recompute=true",
        "train.micro_batch=3",
        "data.threads=3",
        "data.prefetch_mb=3",
        "data.max_corrupt_fraction=0.5",
        "train.max_nonfinite_steps=9",
        "train.cuda_graph=false",
        "about.title=another",
    ] {
        assert_eq!(config_with(&[free])?.resume_identity(), base, "{free} may change when a run is resumed");
    }
    for fixed in [
        "train.seed=3",
        "train.global_batch=3",
        "optim.weight_decay=0",
        "method.mae.mask.ratio=0.5",
        "data.train=elsewhere",
        "data.shuffle_shards=3",
        "view.hflip=0.5",
        "train.dtype=bf16",
        "world.grad_dtype=bf16",
    ] {
        let other = config_with(&[fixed])?.resume_identity();
        let found = differences(&base, &other);
        assert_eq!(found.len(), 1, "{fixed}: {found:?}");
        assert_eq!(found[0].0, fixed.split('=').next().unwrap());
    }
    Ok(())
}

fn steps_follow_from_epochs() -> Outcome {
    let steps =
        |line: &str, samples| config_with(&[line, "train.global_batch=100"]).map(|config| config.total_steps(samples));
    assert_eq!(steps("train.epochs=3", 1000)?, 30);
    assert_eq!(steps("train.epochs=0.5", 1000)?, 5);
    assert_eq!(steps("train.epochs=1", 1049)?, 10);
    assert_eq!(steps("train.epochs=0.0001", 10)?, 1, "at least one");
    assert_eq!(steps("train.steps=12", 1000)?, 12);
    Ok(())
}

/// Collects the paths of keys of `value` that the schema does not name.
fn find_unknown_keys(schema: &Value, at: &Value, value: &Value, path: &str, out: &mut Vec<String>) {
    if let Some(reference) = at["$ref"].as_str() {
        let target = schema.pointer(reference.trim_start_matches('#')).expect("a reference leads somewhere");
        return find_unknown_keys(schema, target, value, path, out);
    }
    let Value::Object(object) = value else { return };
    let choices: Vec<&Value> = match at["oneOf"].as_array() {
        Some(choices) => choices.iter().collect(),
        None => vec![at],
    };
    for (key, inner) in object {
        let path = format!("{path}/{key}");
        match choices.iter().find_map(|choice| choice["properties"].get(key)) {
            Some(next) => find_unknown_keys(schema, next, inner, &path, out),
            None => out.push(path),
        }
    }
    let closed = choices.iter().all(|choice| choice["additionalProperties"] == false);
    assert!(closed, "{path}: the schema must reject unknown keys");
}

fn the_schema_covers_every_key() -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_occlude")).arg("schema").output()?;
    let schema: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(schema, config::json_schema(), "what the program prints");
    let mut missing = Vec::new();
    let overrides = [
        "optim.clip_grad_norm=1",
        "optim.ema_decay=0.9",
        "data.threads=1",
        "train.micro_batch=1",
        "checkpoint.keep_every=1",
    ];
    for mut value in [serde_json::from_str(&tiny())?, config_with(&overrides)?.to_json()] {
        find_unknown_keys(&schema, &schema, &value, "", &mut missing);
        assert!(missing.is_empty(), "the schema does not name {missing:?}");
        value["train"]["stepz"] = json!(1);
        value["method"]["mae"]["mask"]["ration"] = json!(1);
        find_unknown_keys(&schema, &schema, &value, "", &mut missing);
        missing.sort();
        assert_eq!(missing, ["/method/mae/mask/ration", "/train/stepz"], "the schema names no other keys");
        missing.clear();
    }
    for key in ["about", "input", "method", "optim", "data", "train"] {
        assert!(schema["required"].as_array().expect("a list").contains(&json!(key)), "{key} is required");
    }
    // Editors show the description of a key.
    let sections = schema["properties"].as_object().expect("sections");
    let described = |section: &Value| {
        let target = schema.pointer(section["$ref"].as_str().expect("a section").trim_start_matches('#'));
        let keys = target.expect("a section")["properties"].as_object().cloned().unwrap_or_default();
        keys.values().filter(|key| key["description"].is_string()).count()
    };
    assert!(sections.values().map(described).sum::<usize>() >= 20, "keys carry their descriptions");
    Ok(())
}

/// Returns every config file under configs/.
fn configs() -> Vec<PathBuf> {
    let mut folders = vec![root().join("configs")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    // The table of the configs.
    files.retain(|path| !path.ends_with("configs/README.md"));
    files.sort();
    files
}

fn every_config_parses_names_its_source_and_builds() -> Outcome {
    let files = configs();
    assert!(!files.is_empty());
    for path in files {
        let name = path.display();
        assert_eq!(path.extension().and_then(|e| e.to_str()), Some("json"), "{name}");
        let config = Config::read(&path, &[])?;
        let about = &config.about;
        for text in [&about.title, &about.source, &about.measured] {
            assert!(text.len() >= 10, "{name} has too short a description: `{text}`");
        }
        let method = config.method.build(&config.input)?;
        assert_eq!(method.grid(), config.input.grid()?, "{name}");
        assert!(method.params().parameter_count() > 0, "{name}");
        assert_eq!(Config::parse(&config.to_json().to_string(), &[])?, config, "{name}");
    }
    Ok(())
}

fn every_method_has_a_tiny_config() -> Outcome {
    let catalog = serde_json::to_value(schemars::schema_for!(occlude::method::catalog::Config))?;
    let entries = catalog["oneOf"].as_array().expect("a choice of methods");
    let keys = |entry: &Value| entry["properties"].as_object().expect("one key").keys().cloned().collect::<Vec<_>>();
    let methods: Vec<String> = entries.iter().flat_map(keys).collect();
    assert!(methods.contains(&"mae".to_string()), "{methods:?}");
    for method in methods {
        let path = root().join(format!("configs/tiny/{method}.json"));
        assert!(path.exists(), "the method {method} has no {}", path.display());
        let value = Config::read(&path, &[])?.to_json();
        assert!(value["method"].get(&method).is_some(), "{} trains another method", path.display());
    }
    Ok(())
}
