//! Configs are read, refused with the remedy, and resolved.

use crate::support::{Outcome, root};
use occlude::config::{self, Config, Sources, differences};
use occlude::fault::{Code, Fault};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![
    an_unknown_key_is_refused_with_the_nearest_name,
    an_unknown_method_is_refused_with_the_nearest_name,
    numbers_out_of_range_are_refused_by_their_key,
    two_ways_to_say_one_thing_exclude_each_other,
    the_program_ends_with_code_2_on_a_wrong_config,
    a_key_is_set_where_its_path_leads,
    a_value_is_json_or_else_a_string,
    a_set_that_makes_no_sense_is_refused,
    comments_are_allowed,
    defaults_are_written_out_and_read_back,
    the_identity_is_what_must_not_change,
    steps_follow_from_epochs,
    the_schema_knows_every_key,
    every_config_is_read_says_where_it_is_from_and_builds,
    every_method_has_a_tiny_config,
];

fn tiny() -> String {
    std::fs::read_to_string(root().join("configs/tiny/mae.json")).expect("the tiny config")
}

fn with(overrides: &[&str]) -> Result<Config, Fault> {
    let overrides: Vec<String> = overrides.iter().map(|line| line.to_string()).collect();
    Config::parse(&tiny(), &overrides)
}

/// The fault of a config that must not pass; it is the user's mistake and holds these words.
fn refused(overrides: &[&str], words: &[&str]) {
    let fault = with(overrides).expect_err(&format!("{overrides:?} went through"));
    assert_eq!(fault.code, Code::Usage, "{fault}");
    for word in words {
        assert!(fault.message.contains(word), "no `{word}` in: {fault}");
    }
}

fn an_unknown_key_is_refused_with_the_nearest_name() -> Outcome {
    for (line, place, nearest) in [
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
        ("world.wire=bf61", "at world.wire: unknown value `bf61`", "`bf16`"),
        ("train.dtype=bf61", "at train.dtype: unknown value `bf61`", "`bf16`"),
    ] {
        refused(&[line], &[place, &format!("did you mean {nearest}?")]);
    }
    Ok(())
}

fn an_unknown_method_is_refused_with_the_nearest_name() -> Outcome {
    let mut value: Value = serde_json::from_str(&tiny())?;
    let numbers = value["method"]["mae"].take();
    value["method"] = json!({"maee": numbers});
    let fault = Config::parse(&value.to_string(), &[]).expect_err("an unknown method");
    assert_eq!(fault.code, Code::Usage);
    assert!(fault.message.contains("at method: unknown value `maee`; did you mean `mae`?"), "{fault}");
    Ok(())
}

fn numbers_out_of_range_are_refused_by_their_key() -> Outcome {
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
        ("optim.clip=0", "optim.clip is 0"),
        ("optim.ema=1", "optim.ema is 1"),
        ("optim.warmup.epochs=-1", "optim.warmup.epochs is -1"),
        ("data.max_bad_share=1.5", "data.max_bad_share is 1.5"),
        ("data.open_shards=0", "data.open_shards is 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last is 0"),
        ("world.bucket_mb=0", "world.bucket_mb is 0"),
        ("view.crop.scale=[0.5, 0.2]", "view.crop.scale is [0.5, 0.2]"),
        ("train.global_batch=-5", "at train.global_batch"),
        ("train.steps=abc", "at train.steps"),
    ] {
        refused(&[line], &[key]);
    }
    Ok(())
}

fn two_ways_to_say_one_thing_exclude_each_other() -> Outcome {
    for (section, one, other) in [("train", "steps", "epochs"), ("optim", "base_lr", "lr")] {
        for (keys, words) in [(vec![one, other], "give one of them"), (vec![], "give one of them")] {
            let mut value: Value = serde_json::from_str(&tiny())?;
            let part = value[section].as_object_mut().expect("a section");
            [one, other].iter().for_each(|key| drop(part.remove(*key)));
            keys.iter().for_each(|key| drop(part.insert(key.to_string(), json!(1))));
            let fault = Config::parse(&value.to_string(), &[]).expect_err("both or neither");
            assert!(fault.code == Code::Usage && fault.message.contains(words), "{fault}");
            assert!(fault.message.contains(section) && fault.message.contains(other), "{fault}");
        }
    }
    // What is set on the command line wins over what the file says.
    let config = with(&["train.steps=7", "optim.lr=0.5"])?;
    assert_eq!((config.train.steps, config.train.epochs), (Some(7), None));
    assert_eq!((config.optim.lr, config.optim.base_lr), (Some(0.5), None));
    let config = with(&["train.steps=7", "train.epochs=2"])?;
    assert_eq!((config.train.steps, config.train.epochs), (None, Some(2.0)), "the later one wins");
    Ok(())
}

fn the_program_ends_with_code_2_on_a_wrong_config() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("wrong.json");
    std::fs::write(&path, "{ \"train\": ")?;
    let (tiny, run) = (root().join("configs/tiny/mae.json"), folder.path().join("run"));
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
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(words) && told.contains(&config.display().to_string()), "{told}");
        assert_eq!(told.trim_end().lines().count(), 1, "told once: {told}");
        assert!(!run.exists(), "nothing is begun");
    }
    Ok(())
}

fn a_key_is_set_where_its_path_leads() -> Outcome {
    let config = with(&[
        "method.mae.mask.ratio=0.5",
        "train.seed=9",
        "train.seed=10",
        "log.every_s=3.5",
        "world.deadline_s=9",
        "checkpoint.keep_every=50",
        "optim.warmup={\"steps\": 3}",
    ])?;
    let value = config.resolved();
    assert_eq!(value["method"]["mae"]["mask"]["ratio"], 0.5);
    assert_eq!(config.train.seed, 10, "the last one wins");
    assert_eq!(config.log.every_s, 3.5, "beside a key that is there");
    assert_eq!(config.world.deadline_s, 9.0, "in a section that the file does not have");
    assert_eq!(config.checkpoint.keep_every, Some(50));
    assert_eq!(value["optim"]["warmup"], json!({"steps": 3}));
    let changed: Vec<String> = differences(&with(&[])?.resolved(), &value).into_iter().map(|(path, ..)| path).collect();
    let expected =
        ["checkpoint.keep_every", "log.every_s", "method.mae.mask.ratio", "optim.warmup.epochs", "optim.warmup.steps"];
    assert_eq!(changed[..5], expected);
    assert_eq!(changed[5..], ["train.seed", "world.deadline_s"], "and nothing else");
    Ok(())
}

fn a_value_is_json_or_else_a_string() -> Outcome {
    for (line, wanted) in [
        ("data.train=some/folder", "some/folder"),
        ("data.train=\"some/folder\"", "some/folder"),
        ("data.train=s3://bucket/a=b", "s3://bucket/a=b"),
        ("data.train=dir/train-{000000..000009}.tar", "dir/train-{000000..000009}.tar"),
        ("data.train=\"2024\"", "2024"),
    ] {
        assert_eq!(with(&[line])?.data.train, Sources::One(wanted.into()), "{line}");
    }
    assert_eq!(with(&["train.dtype=bf16"])?.resolved()["train"]["dtype"], "bf16");
    assert_eq!(with(&["train.epochs=0.25"])?.train.epochs, Some(0.25));
    assert_eq!(with(&["view.crop.scale=[0.3, 0.9]"])?.view.crop.scale, [0.3, 0.9]);
    assert!(with(&["method.mae.target.normalize=true"])?.resolved()["method"]["mae"]["target"]["normalize"] == true);
    Ok(())
}

fn a_set_that_makes_no_sense_is_refused() -> Outcome {
    for line in ["train.steps", "=5", "train..steps=5", ".train=5", "train.=5"] {
        refused(&[line], &[&format!("--set {line}: wanted path.to.key=value")]);
    }
    refused(&["train.seed.x=5"], &["--set train.seed.x=5", "`x`"]);
    refused(&["train=5"], &["at train"]);
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
    assert_eq!(config.data.train, Sources::One("s3://bucket/*not a comment*/x".into()), "a string is no comment");
    let mut plain = with(&[])?;
    plain.data.train = config.data.train.clone();
    assert_eq!(config, plain);
    Ok(())
}

fn defaults_are_written_out_and_read_back() -> Outcome {
    for overrides in
        [&[][..], &["train.steps=3", "optim.lr=0.1", "optim.clip=0.3", "optim.ema=0.9999", "data.threads=2"]]
    {
        let config = with(overrides)?;
        let resolved = config.resolved();
        let again = Config::parse(&serde_json::to_string_pretty(&resolved)?, &[])?;
        assert_eq!(again, config);
        assert_eq!(again.resolved().to_string(), resolved.to_string(), "to the byte");
    }
    let resolved = with(&[])?.resolved();
    for (path, wanted) in [
        ("/world/bucket_mb", json!(25.0)),
        ("/checkpoint/keep_last", json!(2)),
        ("/train/bad_steps", json!(3)),
        ("/train/graph", json!(true)),
        ("/train/dtype", json!("fp32")),
        ("/train/recompute", json!(false)),
        ("/world/wire", json!("fp32")),
        ("/world/shard_optimizer", json!(false)),
        ("/optim/eps", json!(1e-8)),
        ("/method/mae/mask_tokens", json!("decoder")),
        ("/method/mae/encoder/mlp_ratio", json!(4)),
        ("/data/open_shards", json!(16)),
    ] {
        assert_eq!(resolved.pointer(path), Some(&wanted), "{path}");
    }
    Ok(())
}

fn the_identity_is_what_must_not_change() -> Outcome {
    let base = with(&[])?.identity();
    for free in [
        "log.every_s=3",
        "checkpoint.every_steps=3",
        "world.bucket_mb=3",
        "world.shard_optimizer=true",
        "train.recompute=true",
        "train.micro_batch=3",
        "data.threads=3",
        "data.prefetch_mb=3",
        "data.max_bad_share=0.5",
        "train.bad_steps=9",
        "train.graph=false",
        "about.title=another",
    ] {
        assert_eq!(with(&[free])?.identity(), base, "{free} may change when a run is resumed");
    }
    for fixed in [
        "train.seed=3",
        "train.global_batch=3",
        "optim.weight_decay=0",
        "method.mae.mask.ratio=0.5",
        "data.train=elsewhere",
        "data.open_shards=3",
        "view.flip=0.5",
        "train.dtype=bf16",
        "world.wire=bf16",
    ] {
        let other = with(&[fixed])?.identity();
        let found = differences(&base, &other);
        assert_eq!(found.len(), 1, "{fixed}: {found:?}");
        assert_eq!(found[0].0, fixed.split('=').next().unwrap());
    }
    Ok(())
}

fn steps_follow_from_epochs() -> Outcome {
    let steps = |line: &str, samples| with(&[line, "train.global_batch=100"]).map(|config| config.steps(samples));
    assert_eq!(steps("train.epochs=3", 1000)?, 30);
    assert_eq!(steps("train.epochs=0.5", 1000)?, 5);
    assert_eq!(steps("train.epochs=1", 1049)?, 10);
    assert_eq!(steps("train.epochs=0.0001", 10)?, 1, "at least one");
    assert_eq!(steps("train.steps=12", 1000)?, 12);
    Ok(())
}

/// Keys of `value` that the schema does not name, by their path.
fn unnamed(schema: &Value, at: &Value, value: &Value, path: &str, out: &mut Vec<String>) {
    if let Some(reference) = at["$ref"].as_str() {
        let target = schema.pointer(reference.trim_start_matches('#')).expect("a reference leads somewhere");
        return unnamed(schema, target, value, path, out);
    }
    let Value::Object(object) = value else { return };
    let choices: Vec<&Value> = match at["oneOf"].as_array() {
        Some(choices) => choices.iter().collect(),
        None => vec![at],
    };
    for (key, inner) in object {
        let path = format!("{path}/{key}");
        match choices.iter().find_map(|choice| choice["properties"].get(key)) {
            Some(next) => unnamed(schema, next, inner, &path, out),
            None => out.push(path),
        }
    }
    let closed = choices.iter().all(|choice| choice["additionalProperties"] == false);
    assert!(closed, "{path}: unknown keys are refused, and the schema must say so");
}

fn the_schema_knows_every_key() -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_occlude")).arg("schema").output()?;
    let schema: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(schema, config::schema(), "what the program prints");
    let mut missing = Vec::new();
    let overrides =
        ["optim.clip=1", "optim.ema=0.9", "data.threads=1", "train.micro_batch=1", "checkpoint.keep_every=1"];
    for mut value in [serde_json::from_str(&tiny())?, with(&overrides)?.resolved()] {
        unnamed(&schema, &schema, &value, "", &mut missing);
        assert!(missing.is_empty(), "the schema does not name {missing:?}");
        value["train"]["stepz"] = json!(1);
        value["method"]["mae"]["mask"]["ration"] = json!(1);
        unnamed(&schema, &schema, &value, "", &mut missing);
        missing.sort();
        assert_eq!(missing, ["/method/mae/mask/ration", "/train/stepz"], "and names no others");
        missing.clear();
    }
    for key in ["about", "input", "method", "optim", "data", "train"] {
        assert!(schema["required"].as_array().expect("a list").contains(&json!(key)), "{key} is required");
    }
    // The editor shows what a key means.
    let sections = schema["properties"].as_object().expect("sections");
    let described = |section: &Value| {
        let target = schema.pointer(section["$ref"].as_str().expect("a section").trim_start_matches('#'));
        let keys = target.expect("a section")["properties"].as_object().cloned().unwrap_or_default();
        keys.values().filter(|key| key["description"].is_string()).count()
    };
    assert!(sections.values().map(described).sum::<usize>() >= 20, "keys carry their descriptions");
    Ok(())
}

/// Every config file under configs/.
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
    files.sort();
    files
}

fn every_config_is_read_says_where_it_is_from_and_builds() -> Outcome {
    let files = configs();
    assert!(!files.is_empty());
    for path in files {
        let name = path.display();
        assert_eq!(path.extension().and_then(|e| e.to_str()), Some("json"), "{name}");
        let config = Config::read(&path, &[])?;
        let about = &config.about;
        for text in [&about.title, &about.source, &about.measured] {
            assert!(text.len() >= 10, "{name} says too little about itself: `{text}`");
        }
        let method = config.method.build(&config.input)?;
        assert_eq!(*method.grid(), config.input.grid()?, "{name}");
        assert!(method.table().parameters() > 0, "{name}");
        assert_eq!(Config::parse(&config.resolved().to_string(), &[])?, config, "{name}");
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
        let value = Config::read(&path, &[])?.resolved();
        assert!(value["method"].get(&method).is_some(), "{} trains another method", path.display());
    }
    Ok(())
}
