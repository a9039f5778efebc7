//! Frozen probes as a whole: every sample counts once on any number of ranks, the recipes learn, what makes no sense is
//! refused.

use crate::job::{data, occlude, program, undisturbed};
use crate::refuse::{refused, text};
use crate::support::{Outcome, root};
use libtest_mimic::Failed;
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::fault::{Code, Fault, Result};
use occlude::run::evaluate::nearest::Vote;
use occlude::run::evaluate::paper::Paper;
use occlude::run::evaluate::ranks::Ranks;
use occlude::run::evaluate::samples::{self, Augmentation};
use occlude::run::evaluate::subject::Subject;
use occlude::run::evaluate::{Answer, Feature, Probe, Question, evaluate};
use occlude::run::{checkpoint, state};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tch::Device;

crate::trials![
    every_sample_counts_once_on_one_two_and_three_ranks,
    two_ranks_under_the_launcher_give_one_answer,
    what_cannot_be_decoded_is_left_out_and_counted,
    a_set_of_which_nothing_can_be_decoded_is_refused,
    the_paper_s_recipe_learns,
    the_paper_s_views_change_with_every_epoch,
    a_class_without_a_name_is_refused,
    ranks_that_ask_different_questions_are_refused,
    an_option_of_another_protocol_is_refused,
    a_number_out_of_range_is_refused,
];

/// A probe of the tiny training that all tests share.
fn ask(probe: Probe, train: &Path, test: &Path) -> Question {
    Question {
        subject: Subject { checkpoint: text(undisturbed(0).folder()), random: false, seed: None },
        train: text(train),
        test: text(test),
        probe,
        feature: Some(Feature::Class),
    }
}

fn alone(question: &Question) -> Result<Answer> {
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    evaluate(question, &world)
}

/// The answer of so many ranks, which must be one answer.
fn answer(question: &Question, size: usize) -> Answer {
    let answers = threads(size, |world| evaluate(question, &world).expect("an answer"));
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    answers.into_iter().next().expect("a rank")
}

fn short(epochs: u64, batch: u64) -> Probe {
    let augmentation = Augmentation::Run;
    Probe::Paper(Paper { epochs, batch, base_lr: 50.0, warmup_epochs: 1.0, augmentation })
}

fn every_sample_counts_once_on_one_two_and_three_ranks() -> Outcome {
    let [train, test] = ["train", "test"].map(|part| data().join(part));
    for probe in [Probe::Nearest(Vote::default()), Probe::Fast, short(3, 50)] {
        let question = ask(probe, &train, &test);
        let one = answer(&question, 1);
        assert_eq!((one.n_train + one.n_test, one.n_left_out, one.ranks), (260, 0, 1));
        assert_eq!(one.top5.is_some(), matches!(probe, Probe::Paper(_)));
        for size in [2, 3] {
            let several = answer(&question, size);
            assert_eq!(several.ranks, size);
            assert_eq!(Answer { ranks: 1, ..several }, one, "on {size} ranks");
        }
    }
    Ok(())
}

fn two_ranks_under_the_launcher_give_one_answer() -> Outcome {
    let [train, test] = ["train", "test"].map(|part| text(data().join(part)));
    let run = text(undisturbed(0).folder());
    for protocol in [
        &["knn", "--k", "7", "--temperature", "0.1"][..],
        &["linear", "--recipe", "paper", "--epochs", "12", "--base-lr", "20"],
    ] {
        let mut words = vec!["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol"];
        words.extend(protocol);
        let alone = occlude(&words).output()?;
        let mut launcher = Command::new(root().join("launch/mpirun"));
        launcher.args(["-n", "2", "--", program()]).args(&words).env("OMP_NUM_THREADS", "1");
        let together = launcher.output()?;
        let [alone, mut together] = [alone, together].map(|output| {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let told = String::from_utf8(output.stdout).expect("UTF-8");
            assert_eq!(told.lines().count(), 1, "rank 0 alone answers: {told}");
            serde_json::from_str::<Value>(&told).expect("one JSON object")
        });
        assert_eq!((&alone["ranks"], &together["ranks"]), (&json!(1), &json!(2)));
        together["ranks"] = json!(1);
        assert_eq!(alone, together);
        match protocol[0] {
            "knn" => assert_eq!((&alone["k"], &alone["temperature"]), (&json!(7), &json!(0.1))),
            _ => {
                assert_eq!((&alone["recipe"], &alone["epochs"]), (&json!("paper"), &json!(12)));
                assert_eq!((&alone["batch"], &alone["base_lr"]), (&alone["n_train"], &json!(20.0)));
                assert_eq!(alone["top5"], json!(1.0), "five guesses at three classes");
            }
        }
    }
    Ok(())
}

/// A shard of `samples` pictures in three shades, the classes in turn, of which those numbered in `broken` are no
/// pictures.
fn shard(path: &Path, samples: u32, broken: &[u32]) -> Outcome {
    shades(path, samples, broken, 0)
}

/// The same with other names for the shades: class (shade + turn) mod 3.
fn shades(path: &Path, samples: u32, broken: &[u32], turn: u32) -> Outcome {
    let mut tar = tar::Builder::new(std::fs::File::create(path)?);
    let mut append = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes)
    };
    for number in 0..samples {
        let shade = number % 3;
        let picture = image::GrayImage::from_fn(16, 16, |x, y| {
            let noise = (x * 31 + y * 17 + number * 101).wrapping_mul(2_654_435_761) >> 26;
            image::Luma([(20 + 70 * shade + noise) as u8])
        });
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut bytes, image::ImageFormat::Png)?;
        let bytes = if broken.contains(&number) { b"no picture".to_vec() } else { bytes.into_inner() };
        append(format!("{number:03}.png"), &bytes)?;
        append(format!("{number:03}.cls"), ((shade + turn) % 3).to_string().as_bytes())?;
    }
    Ok(tar.finish()?)
}

fn what_cannot_be_decoded_is_left_out_and_counted() -> Outcome {
    let place = tempfile::tempdir()?;
    let [train, test] = ["train.tar", "test.tar"].map(|name| place.path().join(name));
    shard(&train, 61, &[0])?;
    shard(&test, 31, &[3, 30])?;
    for (probe, learned, left_out) in
        [(Probe::Nearest(Vote::default()), 60, 3), (Probe::Fast, 60, 3), (short(2, 20), 61, 2)]
    {
        let question = ask(probe, &train, &test);
        let one = answer(&question, 1);
        assert_eq!((one.n_train, one.n_test, one.n_left_out), (learned, 29, left_out), "{probe:?}");
        let share = one.top1 * 29.0;
        assert!((share - share.round()).abs() < 1e-9, "a share of 29: {}", one.top1);
        assert_eq!(Answer { ranks: 1, ..answer(&question, 3) }, one);
    }
    Ok(())
}

fn a_set_of_which_nothing_can_be_decoded_is_refused() -> Outcome {
    let place = tempfile::tempdir()?;
    let [good, bad] = ["good.tar", "bad.tar"].map(|name| place.path().join(name));
    shard(&good, 20, &[])?;
    shard(&bad, 2, &[0, 1])?;
    for (train, test) in [(&good, &bad), (&bad, &good)] {
        let fault = alone(&ask(Probe::Nearest(Vote::default()), train, test)).expect_err("nothing to judge");
        assert_eq!(fault.code, Code::Corrupt);
        assert!(fault.message.contains("bad.tar could be decoded"), "{fault}");
    }
    Ok(())
}

fn the_paper_s_recipe_learns() -> Outcome {
    let place = tempfile::tempdir()?;
    let [train, test] = ["train.tar", "test.tar"].map(|name| place.path().join(name));
    shard(&train, 90, &[])?;
    shard(&test, 60, &[])?;
    let one = alone(&ask(short(20, 15), &train, &test))?;
    assert!(one.top1 >= 0.8, "three shades: {}", one.top1);
    // No accident of the features: whoever learns from turned labels answers with turned labels.
    shades(&train, 90, &[], 1)?;
    let turned = alone(&ask(short(20, 15), &train, &test))?;
    assert!(turned.top1 <= 0.2, "turned labels: {}", turned.top1);
    Ok(())
}

/// Every sample's pixels by id in one epoch of a seed.
fn views(augmentation: Augmentation, seed: u64) -> std::result::Result<BTreeMap<u64, Vec<u8>>, Failed> {
    let (config, method, _) = state::model(&checkpoint::open(&text(undisturbed(0).folder()))?, Device::Cpu)?;
    let set = samples::open(&text(data().join("test")))?;
    let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
    let ranks = Ranks::join(&world, 60.0, 60.0)?;
    let mut found = BTreeMap::new();
    for rows in samples::epoch(&set, augmentation, (1, set.len()), seed, &config, *method.grid(), &ranks)? {
        let rows = rows?;
        found.insert(rows.ids[0], Vec::<u8>::try_from(rows.pixels.flatten(0, -1))?);
    }
    assert_eq!(found.len() as u64, set.len(), "every sample once");
    Ok(found)
}

fn the_paper_s_views_change_with_every_epoch() -> Outcome {
    let views = [(Augmentation::Paper, 1), (Augmentation::Paper, 2), (Augmentation::Run, 1)];
    let views = views.map(|(augmentation, seed)| self::views(augmentation, seed));
    let [first, second, run] = views;
    let (first, second, run) = (first?, second?, run?);
    let alike =
        |a: &BTreeMap<u64, Vec<u8>>, b: &BTreeMap<u64, Vec<u8>>| a.iter().filter(|(id, x)| b[id] == **x).count();
    assert!(alike(&first, &second) < first.len() / 4, "two epochs show the same");
    assert!(alike(&first, &run) < first.len() / 4, "the paper's boxes are the run's");
    assert_eq!(first, self::views(Augmentation::Paper, 1)?, "an epoch shows the same to everyone");
    Ok(())
}

fn a_class_without_a_name_is_refused() -> Outcome {
    let place = tempfile::tempdir()?;
    shard(&place.path().join("a.tar"), 12, &[])?;
    let manifest = json!({"name": "two", "samples": 12, "classes": ["one", "two"]});
    std::fs::write(place.path().join("dataset.json"), manifest.to_string())?;
    let fault = alone(&ask(short(2, 12), place.path(), place.path())).expect_err("three classes, two names");
    assert_eq!(fault.code, Code::Usage);
    assert!(fault.message.contains("label 2") && fault.message.contains("classes 0 to 1"), "{fault}");
    Ok(())
}

fn ranks_that_ask_different_questions_are_refused() -> Outcome {
    let [train, test] = ["train", "test"].map(|part| data().join(part));
    let plain = ask(Probe::Nearest(Vote::default()), &train, &test);
    let other_k = Question { probe: Probe::Nearest(Vote { k: 3, ..Vote::default() }), ..plain.clone() };
    let other_set = Question { test: text(&train), ..plain.clone() };
    let untrained = Subject { random: true, ..plain.subject.clone() };
    let other_weights = Question { subject: untrained, ..plain.clone() };
    for (other, label) in [(other_k, "probe"), (other_set, "test set"), (other_weights, "weights")] {
        let faults: Vec<Fault> = threads(2, |world| {
            let question = [&plain, &other][world.rank()];
            evaluate(question, &world).expect_err("two questions")
        });
        for fault in faults {
            assert_eq!(fault.code, Code::Disagree, "{fault}");
            assert!(fault.message.contains(&format!("  {label}: ")), "no {label} in: {fault}");
        }
    }
    Ok(())
}

/// The program refuses these words, with one message that says so.
fn wrong(words: &[&str], told: &[&str]) -> Outcome {
    let [train, test] = ["train", "test"].map(|part| text(data().join(part)));
    let run = text(undisturbed(0).folder());
    let mut all = vec!["evaluate", "--checkpoint", &run, "--train", &train, "--test", &test, "--protocol"];
    all.extend(words);
    let output = occlude(&all).output()?;
    refused(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), told);
    assert!(output.stdout.is_empty());
    Ok(())
}

fn an_option_of_another_protocol_is_refused() -> Outcome {
    wrong(&["knn", "--recipe", "fast"], &["--recipe belongs to --protocol linear"])?;
    wrong(&["knn", "--epochs", "3"], &["--epochs belongs to --protocol linear --recipe paper"])?;
    wrong(&["linear", "--k", "3"], &["--k belongs to --protocol knn"])?;
    wrong(&["linear", "--recipe", "paper", "--temperature", "1"], &["--temperature belongs to --protocol knn"])?;
    for (option, value) in
        [("--epochs", "3"), ("--batch", "8"), ("--base-lr", "1"), ("--warmup-epochs", "1"), ("--augmentation", "run")]
    {
        wrong(&["linear", option, value], &[&format!("{option} belongs to --recipe paper")])?;
    }
    Ok(())
}

fn a_number_out_of_range_is_refused() -> Outcome {
    wrong(&["knn", "--k", "0"], &["--k is 0", "at least one"])?;
    wrong(&["knn", "--temperature", "0"], &["--temperature is 0", "above 0"])?;
    let paper = |option: &str, value: &str, told: &[&str]| {
        wrong(&["linear", "--recipe", "paper", &format!("{option}={value}")], told)
    };
    paper("--epochs", "10", &["--warmup-epochs is 10", "of --epochs 10", "less"])?;
    paper("--epochs", "0", &["--epochs is 0"])?;
    paper("--batch", "1", &["--batch is 1", "two samples"])?;
    paper("--base-lr", "-0.1", &["--base-lr is -0.1", "above 0"])?;
    paper("--warmup-epochs", "-1", &["--warmup-epochs is -1"])
}
