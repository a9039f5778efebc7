//! Tests of frozen probes as a whole: every sample counts once on any number of ranks, the recipes learn, invalid
//! options are rejected.

use crate::cli::usage_errors::assert_rejected;
use crate::support::training_job::{occlude_command, program, reference_run, shared_data};
use crate::support::{Outcome, path_text, root};
use libtest_mimic::Failed;
use occlude::checkpoint;
use occlude::checkpoint::weights::{self, SavedModel};
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::error::{Error, ExitCode, Result};
use occlude::evaluate::features::{FeatureExtractor, FeatureSet};
use occlude::evaluate::knn::KnnOptions;
use occlude::evaluate::layer::ProbeLayer;
use occlude::evaluate::linear_paper::Paper;
use occlude::evaluate::model_source::ModelSource;
use occlude::evaluate::ranks::Ranks;
use occlude::evaluate::samples;
use occlude::evaluate::samples::Augmentation;
use occlude::evaluate::{EvalOptions, EvalReport, Feature, Probe, evaluate};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tch::Device;

crate::trials![
    every_sample_counts_once_on_one_two_and_three_ranks,
    features_are_equal_to_the_bit_on_any_number_of_ranks,
    two_ranks_under_the_launcher_print_one_result,
    undecodable_samples_are_skipped_and_counted,
    a_data_set_without_decodable_samples_is_rejected,
    the_paper_recipe_learns,
    the_paper_views_change_with_every_epoch,
    a_class_without_a_name_is_rejected,
    ranks_with_different_options_are_rejected,
    an_option_of_another_protocol_is_rejected,
    a_number_out_of_range_is_rejected,
];

/// Returns the options of a probe of the tiny training that all tests share.
fn probe_options(probe: Probe, train: &Path, test: &Path) -> EvalOptions {
    EvalOptions {
        model: ModelSource { checkpoint: path_text(reference_run(0).folder()), random_init: false, seed: None },
        train: path_text(train),
        test: path_text(test),
        probe,
        feature: Some(Feature::Class),
        layer: ProbeLayer::Default,
    }
}

fn alone(options: &EvalOptions) -> Result<EvalReport> {
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    evaluate(options, &world)
}

/// Returns the result of `size` ranks, which must agree.
fn evaluate_on(options: &EvalOptions, size: usize) -> EvalReport {
    let replies = run_on_threads(size, |world| evaluate(options, &world).expect("a result"));
    assert!(replies.iter().all(|reply| *reply == replies[0]), "{replies:?}");
    replies.into_iter().next().expect("a rank")
}

fn short(epochs: u64, batch: u64) -> Probe {
    let augmentation = Augmentation::Run;
    Probe::Paper(Paper { epochs, batch, base_lr: 50.0, warmup_epochs: 1.0, augmentation })
}

fn every_sample_counts_once_on_one_two_and_three_ranks() -> Outcome {
    let [train, test] = ["train", "test"].map(|part| shared_data().join(part));
    for probe in [Probe::Knn(KnnOptions::default()), Probe::Fast, short(3, 50)] {
        let options = probe_options(probe, &train, &test);
        let one = evaluate_on(&options, 1);
        assert_eq!((one.n_train + one.n_test, one.n_skipped, one.ranks), (260, 0, 1));
        assert_eq!(one.top5.is_some(), matches!(probe, Probe::Paper(_)));
        for size in [2, 3] {
            let several = evaluate_on(&options, size);
            assert_eq!(several.ranks, size);
            assert_eq!(EvalReport { ranks: 1, ..several }, one, "on {size} ranks");
        }
    }
    Ok(())
}

fn features_are_equal_to_the_bit_on_any_number_of_ranks() -> Outcome {
    let set = samples::open_labeled(&path_text(shared_data().join("train")))?;
    let features = |size: usize| {
        run_on_threads(size, |world| {
            let loaded = checkpoint::load_from_url(&path_text(reference_run(0).folder())).expect("a checkpoint");
            let model = weights::load_model(&loaded, Device::Cpu).expect("a model");
            let extractor = FeatureExtractor::new(model, None, None).expect("an extractor");
            let mut ranks = Ranks::join(&world, 60.0, 60.0).expect("a channel");
            let local = FeatureSet::extract(&extractor, &set, &mut ranks, "training set").expect("features");
            local.all_gather(&mut ranks, "training set").expect("features of all ranks").features
        })
    };
    let alone = features(1).remove(0);
    for size in [2, 3, 5] {
        for together in features(size) {
            assert!(together.equal(&alone), "{size} ranks");
        }
    }
    Ok(())
}

fn two_ranks_under_the_launcher_print_one_result() -> Outcome {
    let [train, test] = ["train", "test"].map(|part| path_text(shared_data().join(part)));
    let run = path_text(reference_run(0).folder());
    for protocol in [
        &["knn", "--k", "7", "--temperature", "0.1"][..],
        &["linear", "--recipe", "paper", "--epochs", "12", "--base-lr", "20"],
    ] {
        let mut words = vec!["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol"];
        words.extend(protocol);
        let alone = occlude_command(&words).output()?;
        let mut launcher = Command::new(root().join("launch/mpirun"));
        launcher.args(["-n", "2", "--", program()]).args(&words).env("OMP_NUM_THREADS", "1");
        let together = launcher.output()?;
        let [alone, mut together] = [alone, together].map(|output| {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8(output.stdout).expect("UTF-8");
            assert_eq!(text.lines().count(), 1, "only rank 0 prints the result: {text}");
            serde_json::from_str::<Value>(&text).expect("one JSON object")
        });
        assert_eq!((&alone["ranks"], &together["ranks"]), (&json!(1), &json!(2)));
        together["ranks"] = json!(1);
        assert_eq!(alone, together);
        match protocol[0] {
            "knn" => assert_eq!((&alone["k"], &alone["temperature"]), (&json!(7), &json!(0.1))),
            _ => {
                assert_eq!((&alone["recipe"], &alone["epochs"]), (&json!("paper"), &json!(12)));
                assert_eq!((&alone["batch"], &alone["base_lr"]), (&alone["n_train"], &json!(20.0)));
                assert_eq!(alone["top5"], json!(1.0), "five predictions of three classes");
            }
        }
    }
    Ok(())
}

/// Writes a shard of `samples` images in three shades with cycling classes; those whose indices are in `broken` are not
/// images.
fn write_shard(path: &Path, samples: u32, broken: &[u32]) -> Outcome {
    write_shades(path, samples, broken, 0)
}

/// The same with shifted labels: class (shade + turn) mod 3.
fn write_shades(path: &Path, samples: u32, broken: &[u32], round: u32) -> Outcome {
    let mut tar = tar::Builder::new(std::fs::File::create(path)?);
    let mut append = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes)
    };
    for number in 0..samples {
        let shade = number % 3;
        let image = image::GrayImage::from_fn(16, 16, |x, y| {
            let noise = (x * 31 + y * 17 + number * 101).wrapping_mul(2_654_435_761) >> 26;
            image::Luma([(20 + 70 * shade + noise) as u8])
        });
        let mut bytes = std::io::Cursor::new(Vec::new());
        image.write_to(&mut bytes, image::ImageFormat::Png)?;
        let bytes = if broken.contains(&number) { b"no picture".to_vec() } else { bytes.into_inner() };
        append(format!("{number:03}.png"), &bytes)?;
        append(format!("{number:03}.cls"), ((shade + round) % 3).to_string().as_bytes())?;
    }
    Ok(tar.finish()?)
}

fn undecodable_samples_are_skipped_and_counted() -> Outcome {
    let folder = tempfile::tempdir()?;
    let [train, test] = ["train.tar", "test.tar"].map(|name| folder.path().join(name));
    write_shard(&train, 61, &[0])?;
    write_shard(&test, 31, &[3, 30])?;
    for (probe, learned, left_out) in
        [(Probe::Knn(KnnOptions::default()), 60, 3), (Probe::Fast, 60, 3), (short(2, 20), 61, 2)]
    {
        let options = probe_options(probe, &train, &test);
        let one = evaluate_on(&options, 1);
        assert_eq!((one.n_train, one.n_test, one.n_skipped), (learned, 29, left_out), "{probe:?}");
        let fraction = one.top1 * 29.0;
        assert!((fraction - fraction.round()).abs() < 1e-9, "a multiple of 1/29: {}", one.top1);
        assert_eq!(EvalReport { ranks: 1, ..evaluate_on(&options, 3) }, one);
    }
    Ok(())
}

fn a_data_set_without_decodable_samples_is_rejected() -> Outcome {
    let folder = tempfile::tempdir()?;
    let [good, bad] = ["good.tar", "bad.tar"].map(|name| folder.path().join(name));
    write_shard(&good, 20, &[])?;
    write_shard(&bad, 2, &[0, 1])?;
    for (train, test) in [(&good, &bad), (&bad, &good)] {
        let error =
            alone(&probe_options(Probe::Knn(KnnOptions::default()), train, test)).expect_err("nothing to evaluate");
        assert_eq!(error.code, ExitCode::Corrupt);
        assert!(error.message.contains("bad.tar could be decoded"), "{error}");
    }
    Ok(())
}

fn the_paper_recipe_learns() -> Outcome {
    let folder = tempfile::tempdir()?;
    let [train, test] = ["train.tar", "test.tar"].map(|name| folder.path().join(name));
    write_shard(&train, 90, &[])?;
    write_shard(&test, 60, &[])?;
    let one = alone(&probe_options(short(20, 15), &train, &test))?;
    assert!(one.top1 >= 0.8, "three shades: {}", one.top1);
    // Not an accident of the features: training on shifted labels predicts shifted labels.
    write_shades(&train, 90, &[], 1)?;
    let turned = alone(&probe_options(short(20, 15), &train, &test))?;
    assert!(turned.top1 <= 0.2, "shifted labels: {}", turned.top1);
    Ok(())
}

/// Returns the pixels of every sample by id in one epoch of a seed.
fn training_views(augmentation: Augmentation, seed: u64) -> std::result::Result<BTreeMap<u64, Vec<u8>>, Failed> {
    let SavedModel { config, method, .. } =
        weights::load_model(&checkpoint::load_from_url(&path_text(reference_run(0).folder()))?, Device::Cpu)?;
    let set = samples::open_labeled(&path_text(shared_data().join("test")))?;
    let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
    let ranks = Ranks::join(&world, 60.0, 60.0)?;
    let mut found = BTreeMap::new();
    let epoch = samples::TrainEpoch { augmentation, batch: 1, updates: set.len(), seed };
    for rows in samples::train_epoch(&set, &epoch, &config, method.model().patchify().grid, &ranks)? {
        let rows = rows?;
        found.insert(rows.ids[0], Vec::<u8>::try_from(rows.pixels.flatten(0, -1))?);
    }
    assert_eq!(found.len() as u64, set.len(), "every sample once");
    Ok(found)
}

fn the_paper_views_change_with_every_epoch() -> Outcome {
    let views = [(Augmentation::Paper, 1), (Augmentation::Paper, 2), (Augmentation::Run, 1)];
    let views = views.map(|(augmentation, seed)| self::training_views(augmentation, seed));
    let [first, second, run] = views;
    let first = first?;
    let second = second?;
    let run = run?;
    let alike =
        |a: &BTreeMap<u64, Vec<u8>>, b: &BTreeMap<u64, Vec<u8>>| a.iter().filter(|(id, x)| b[id] == **x).count();
    assert!(alike(&first, &second) < first.len() / 4, "two epochs have the same views");
    assert!(alike(&first, &run) < first.len() / 4, "the crops of the paper equal those of the run");
    assert_eq!(first, self::training_views(Augmentation::Paper, 1)?, "an epoch depends on the reader");
    Ok(())
}

fn a_class_without_a_name_is_rejected() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_shard(&folder.path().join("a.tar"), 12, &[])?;
    let manifest = json!({"name": "two", "samples": 12, "classes": ["one", "two"]});
    std::fs::write(folder.path().join("dataset.json"), manifest.to_string())?;
    let error =
        alone(&probe_options(short(2, 12), folder.path(), folder.path())).expect_err("three classes, two names");
    assert_eq!(error.code, ExitCode::Usage);
    assert!(error.message.contains("label 2") && error.message.contains("classes 0 to 1"), "{error}");
    Ok(())
}

fn ranks_with_different_options_are_rejected() -> Outcome {
    let [train, test] = ["train", "test"].map(|part| shared_data().join(part));
    let plain = probe_options(Probe::Knn(KnnOptions::default()), &train, &test);
    let other_k = EvalOptions { probe: Probe::Knn(KnnOptions { k: 3, ..KnnOptions::default() }), ..plain.clone() };
    let other_set = EvalOptions { test: path_text(&train), ..plain.clone() };
    let untrained = ModelSource { random_init: true, ..plain.model.clone() };
    let other_weights = EvalOptions { model: untrained, ..plain.clone() };
    for (other, label) in [(other_k, "probe"), (other_set, "test set"), (other_weights, "weights")] {
        let errors: Vec<Error> = run_on_threads(2, |world| {
            let options = [&plain, &other][world.rank()];
            evaluate(options, &world).expect_err("two different sets of options")
        });
        for error in errors {
            assert_eq!(error.code, ExitCode::RankMismatch, "{error}");
            assert!(error.message.contains(&format!("  {label}: ")), "no {label} in: {error}");
        }
    }
    Ok(())
}

/// Asserts that the program rejects these words with one message.
fn assert_program_rejects(words: &[&str], text: &[&str]) -> Outcome {
    let [train, test] = ["train", "test"].map(|part| path_text(shared_data().join(part)));
    let run = path_text(reference_run(0).folder());
    let mut all = vec!["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol"];
    all.extend(words);
    let output = occlude_command(&all).output()?;
    assert_rejected(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), text);
    assert!(output.stdout.is_empty());
    Ok(())
}

fn an_option_of_another_protocol_is_rejected() -> Outcome {
    assert_program_rejects(&["knn", "--recipe", "fast"], &["--recipe belongs to --protocol linear"])?;
    assert_program_rejects(&["knn", "--epochs", "3"], &["--epochs belongs to --protocol linear --recipe paper"])?;
    assert_program_rejects(&["linear", "--k", "3"], &["--k belongs to --protocol knn"])?;
    assert_program_rejects(
        &["linear", "--recipe", "paper", "--temperature", "1"],
        &["--temperature belongs to --protocol knn"],
    )?;
    for (option, value) in
        [("--epochs", "3"), ("--batch", "8"), ("--base-lr", "1"), ("--warmup-epochs", "1"), ("--augmentation", "run")]
    {
        assert_program_rejects(&["linear", option, value], &[&format!("{option} belongs to --recipe paper")])?;
    }
    Ok(())
}

fn a_number_out_of_range_is_rejected() -> Outcome {
    assert_program_rejects(&["knn", "--k", "0"], &["--k is 0", "at least one"])?;
    assert_program_rejects(&["knn", "--temperature", "0"], &["--temperature is 0", "above 0"])?;
    let paper = |option: &str, value: &str, output: &[&str]| {
        assert_program_rejects(&["linear", "--recipe", "paper", &format!("{option}={value}")], output)
    };
    paper("--epochs", "10", &["--warmup-epochs is 10", "of --epochs 10", "less"])?;
    paper("--epochs", "0", &["--epochs is 0"])?;
    paper("--batch", "1", &["--batch is 1", "two samples"])?;
    paper("--base-lr", "-0.1", &["--base-lr is -0.1", "above 0"])?;
    paper("--warmup-epochs", "-1", &["--warmup-epochs is -1"])
}
