//! Captions from their shards to a model that has learned them: feeding, training, zero-shot classification, retrieval.

use crate::job::occlude;
use crate::refuse::{refused, text};
use crate::server::Server;
use crate::support::Outcome;
use libtest_mimic::Failed;
use occlude::data::caption::{LONGEST, Tokenizer};
use occlude::data::mix::Mix;
use occlude::data::order::Order;
use occlude::data::set::DataSet;
use occlude::device::World;
use occlude::device::solo::{Solo, threads};
use occlude::fault::Code;
use occlude::feed::{Feed, Rows, Source};
use occlude::grid::Grid;
use occlude::part::view::View;
use occlude::rng::{Draw, Purpose};
use occlude::run::evaluate::captions::{Answer, Found, Question, Task, evaluate};
use occlude::run::evaluate::subject::Subject;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;
use tch::Device;
use tempfile::TempDir;

crate::trials![
    captions_travel_from_disk_and_store_alike,
    a_sample_without_a_readable_caption_is_replaced,
    a_training_learns_to_match_and_is_judged_alike_on_any_ranks,
    another_training_begins_from_the_weights_alone,
    what_makes_no_sense_is_refused,
    what_a_model_has_not_learned_is_refused,
];

const COLOURS: [(&str, [u8; 3]); 4] =
    [("red", [220, 30, 30]), ("green", [30, 200, 40]), ("blue", [40, 50, 220]), ("yellow", [230, 220, 30])];
const SHAPES: [&str; 3] = ["square", "bar", "pillar"];

/// Captioned pictures of twelve kinds, packed into `train/` and `test/`, with a vocabulary learned from the captions.
pub fn place() -> PathBuf {
    let mut made = SET.lock().unwrap_or_else(PoisonError::into_inner);
    made.get_or_insert_with(|| self::made().expect("captioned pictures")).path().to_owned()
}

static SET: Mutex<Option<TempDir>> = Mutex::new(None);

/// Removes what the tests shared.
pub fn clean() {
    drop(SET.lock().unwrap_or_else(PoisonError::into_inner).take());
}

fn made() -> Result<TempDir, Failed> {
    let folder = tempfile::tempdir()?;
    let mut list = String::new();
    for number in 0..300u64 {
        let mut draw = Draw::new(1, number, 0, Purpose::Order, 0);
        let ((name, colour), shape) = (COLOURS[number as usize % 4], number as usize / 4 % 3);
        let (left, top) = (draw.below(8) as u32 + 4, draw.below(8) as u32 + 4);
        let [width, height] = [[12, 12], [16, 5], [5, 16]][shape];
        let picture = image::RgbImage::from_fn(32, 32, |x, y| {
            let inside = (left..left + width).contains(&x) && (top..top + height).contains(&y);
            let noise = draw.below(30) as u8;
            image::Rgb(if inside { colour.map(|c| c.saturating_add(noise)) } else { [noise; 3] })
        });
        picture.save(folder.path().join(format!("{number}.png")))?;
        let caption = format!("{} {name} {}", ["a", "the", "one"][number as usize / 12 % 3], SHAPES[shape]);
        list += &(json!({"path": format!("{number}.png"), "label": name, "caption": caption}).to_string() + "\n");
    }
    let source = text(folder.path().join("list.jsonl"));
    std::fs::write(&source, list)?;
    let (tokenizer, out) = (text(folder.path().join("tokenizer.json")), text(folder.path().join("shards")));
    let learns = ["--train-tokenizer", "90", "--tokenizer-out", &tokenizer];
    let shape = ["--name", "kinds", "--samples-per-shard", "60", "--test-share", "0.3"];
    run(&[&["pack", &source, &out][..], &shape, &learns].concat())?;
    Ok(folder)
}

pub fn run(words: &[&str]) -> Result<String, Failed> {
    let output = occlude(words).output()?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
    }
}

fn set(part: &str) -> String {
    text(place().join("shards").join(part))
}

fn source(url: &str) -> Result<Source, Failed> {
    let grid = Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 8 };
    let view = View::default();
    Ok(Source {
        set: Arc::new(Mix::one(DataSet::open(url)?)),
        cache: None,
        captions: Some(Arc::new(Tokenizer::open(&text(place().join("tokenizer.json")), 6)?)),
        medium: Default::default(),
        view: Arc::new(move |picture, id, epoch, _, out| view.train(&grid, picture, 11, id, epoch, 0, out)),
        shape: grid.pixels(),
        stills: Vec::new(),
        limits: Default::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_bad_share: 0.1,
    })
}

fn rows(source: Source) -> Result<Vec<Rows>, Failed> {
    let order = Order::mixed(&source.set.sizes(), 11, 2);
    let feed = Feed::train(source, order, 10, 0, 1, 0..12)?;
    Ok(feed.map(|rows| rows.map(|rows| Rows { waited: Duration::ZERO, ..rows })).collect::<Result<_, _>>()?)
}

fn captions_travel_from_disk_and_store_alike() -> Outcome {
    let source_of = source(&set("train"))?;
    let (set_of, captions) = (source_of.set.clone(), source_of.captions.clone().expect("a tokenizer"));
    let disk = rows(source_of)?;
    // Each row's ids are those of its own sample's caption.
    let set = &set_of.sets()[0];
    let by_id = |id: u64| (0..set.len()).find(|&index| set.id(index).is_ok_and(|own| own == id)).expect("a sample");
    for step in &disk {
        let ids = step.text.as_ref().expect("captions");
        assert_eq!(ids.size(), [10, 6]);
        for (row, &id) in step.ids.iter().enumerate() {
            let (shard, at) = set.sample(by_id(id))?;
            let own = captions.caption(&shard.read(at, &["txt"])?)?;
            assert_eq!(Vec::<i64>::try_from(ids.get(row as i64))?, own, "{}", shard.key(at));
        }
    }
    let server = Server::start();
    server.upload(Path::new(&self::set("train")), "b/kinds")?;
    let store = rows(source(&server.http("b/kinds"))?)?;
    assert!(store == disk, "the store's rows are others");
    Ok(())
}

fn a_sample_without_a_readable_caption_is_replaced() -> Outcome {
    let folder = tempfile::tempdir()?;
    std::fs::create_dir_all(folder.path().join("shards"))?;
    // A tar of somebody else's: every tenth caption is no text, another tenth is missing, one more is a book.
    let mut tar = tar::Builder::new(std::fs::File::create(folder.path().join("shards/x-000000.tar"))?);
    let mut add = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        tar.append_data(&mut header, name, bytes)
    };
    let picture = std::fs::read(place().join("0.png"))?;
    for number in 0..40 {
        add(format!("{number:03}.png"), &picture)?;
        match number % 10 {
            3 => add(format!("{number:03}.txt"), b"\xc3\x28 no text")?,
            7 => {}
            9 => add(format!("{number:03}.txt"), &vec![b'a'; LONGEST + 1])?,
            _ => add(format!("{number:03}.txt"), b"a red square")?,
        }
    }
    tar.finish()?;
    let source = Source { max_bad_share: 0.5, ..source(&text(folder.path().join("shards")))? };
    let seen = rows(source)?;
    let known =
        seen.iter().all(|step| step.ids.len() == 10 && step.text.as_ref().is_some_and(|ids| ids.size() == [10, 6]));
    assert!(known, "every row has a caption");
    let strict = Source { max_bad_share: 0.2, ..self::source(&text(folder.path().join("shards")))? };
    let order = Order::mixed(&strict.set.sizes(), 1, 1);
    let fault = Feed::train(strict, order, 10, 0, 1, 0..12)?.find_map(Result::err).expect("too many");
    assert!(
        fault.code == Code::Corrupt && fault.message.contains("UTF-8") && fault.message.contains(".txt"),
        "{fault}"
    );
    Ok(())
}

pub fn config() -> Value {
    let shape = json!({"width": 48, "depth": 2, "heads": 4});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"height": 32, "width": 32, "patch": 8},
        "view": {
            "crop": {"scale": [0.8, 1.0]}, "flip": 0.5, "center": 1.0,
            "caption": {"tokenizer": place().join("tokenizer.json"), "length": 6},
        },
        "method": {"flip": {
            "encoder": shape, "embed": 32, "mask": {"ratio": 0.5},
            "text": {"shape": {"width": 32, "depth": 1, "heads": 2}, "vocabulary": 90, "length": 6},
        }},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": set("train"), "threads": 1},
        "train": {"steps": 150, "global_batch": 48, "seed": 5},
    })
}

/// The training that the tests share.
static TRAINED: LazyLock<PathBuf> = LazyLock::new(|| {
    let file = place().join("config.json");
    std::fs::write(&file, config().to_string()).expect("a config");
    let folder = place().join("run");
    run(&["train", "--config", &text(&file), "--run", &text(&folder)]).expect("a training");
    folder
});

fn ask(task: Task, random: bool) -> Question {
    let subject = Subject { checkpoint: text(&*TRAINED), random, seed: None };
    Question { subject, test: set("test"), task, tokenizer: None }
}

fn answer(question: &Question, size: usize) -> Answer {
    let answers = threads(size, |world| evaluate(question, &world).expect("an answer"));
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    answers.into_iter().next().expect("a rank")
}

fn a_training_learns_to_match_and_is_judged_alike_on_any_ranks() -> Outcome {
    let templates = place().join("templates.txt");
    std::fs::write(&templates, "a {} square\nthe {} bar\n\none {} pillar\n")?;
    let named = Task::ZeroShot { classes: None, templates: Some(templates) };
    for task in [named, Task::Retrieval] {
        let world: Arc<dyn World> = Arc::new(Solo::new(Device::Cpu));
        let alone = evaluate(&ask(task.clone(), false), &world)?;
        assert_eq!(alone.n_test + alone.n_left_out, DataSet::open(&set("test"))?.len() as i64);
        for ranks in [2, 3] {
            assert_eq!(answer(&ask(task.clone(), false), ranks), Answer { ranks, ..alone.clone() });
        }
        let random = evaluate(&ask(task, true), &world)?;
        match (alone.found, random.found) {
            (Found::ZeroShot { classes: 4, templates: 3, top1, top5 }, Found::ZeroShot { top1: by_chance, .. }) => {
                assert!(top1 > 0.8 && top5 == 1.0 && by_chance < 0.6, "zero-shot: {top1}, {top5}, random {by_chance}");
            }
            // Three articles, and about seven samples of each kind: of one kind's, chance finds its own.
            (
                Found::Retrieval { image_to_text: there, text_to_image: back },
                Found::Retrieval { image_to_text: by_chance, .. },
            ) => {
                assert!(there.r10 > 0.5 && back.r10 > 0.5 && by_chance.r10 < 0.3, "{there:?} {back:?} {by_chance:?}");
                assert!(there.r1 <= there.r5 && there.r5 <= there.r10);
            }
            other => panic!("{other:?}"),
        }
    }
    let words = ["evaluate", "--checkpoint", &text(&*TRAINED), "--test", &set("test"), "--protocol", "zero-shot"];
    let line = run(&words)?;
    let found: Value = serde_json::from_str(line.lines().last().expect("a line"))?;
    assert!(found["protocol"] == "zero-shot" && found["templates"] == 7 && found["classes"] == 4, "{found}");
    // The image tower alone is an encoder like any other.
    let (from, train, test) = (text(&*TRAINED), set("train"), set("test"));
    let found = run(&["evaluate", "--checkpoint", &from, "--train", &train, "--test", &test, "--protocol", "knn"])?;
    let found: Value = serde_json::from_str(found.lines().last().expect("a line"))?;
    assert!(found["top1"].as_f64().expect("a share") > 0.6, "{found}");
    Ok(())
}

fn another_training_begins_from_the_weights_alone() -> Outcome {
    let (file, tuned) = (text(place().join("config.json")), text(place().join("tuned")));
    let from = text(&*TRAINED);
    let sets = ["--set", "method.flip.mask.ratio=0", "--set", "train.steps=4", "--set", "optim.lr=1e-9"];
    let words = [&["train", "--config", &file, "--run", &tuned, "--init", &from][..], &sets].concat();
    run(&words)?;
    let weights = |run: &str| -> Result<_, Failed> { Ok(occlude::run::checkpoint::open(run)?) };
    let (before, after) = (weights(&from)?, weights(&tuned)?);
    assert_eq!(after.manifest.step, 4);
    let name = "weight.image.blocks.0.attn.qkv.weight";
    let number = |bytes: &[u8]| f32::from_le_bytes(bytes[..4].try_into().expect("four"));
    let (was, is) = (number(&before.tensors[name].bytes), number(&after.tensors[name].bytes));
    assert!((was - is).abs() < 1e-5 && was != 0.0, "{was} became {is}");
    let steps = number(&after.tensors["steps"].bytes);
    assert_eq!(steps, 4.0, "the moments began anew");
    // Given again, it goes on where it stands.
    run(&words)?;
    // Weights of another model are none to begin from.
    let other = text(place().join("other"));
    let words = ["train", "--config", &file, "--run", &other, "--init", &from, "--set", "method.flip.embed=16"];
    let output = occlude(&words).output()?;
    refused(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), &["image_projection.weight"]);
    Ok(())
}

fn what_makes_no_sense_is_refused() -> Outcome {
    let file = text(place().join("refused.json"));
    std::fs::write(&file, config().to_string())?;
    let run = text(place().join("never"));
    for (set, told) in [
        ("train.micro_batch=8", &["train.micro_batch", "leave it out"][..]),
        ("view.caption.length=7", &["view.caption.length is 7", "text.length 6"]),
        ("method.flip.text.vocabulary=40", &["tokens and the model's text tower 40"]),
        ("method.flip.mask.ratio=0.99", &["method.flip.mask.ratio"]),
        ("method.flip.embed=0", &["method.flip.embed is 0"]),
        ("view.caption.tokenizer=/nowhere.json", &["/nowhere.json"]),
    ] {
        let output = occlude(&["train", "--config", &file, "--run", &run, "--set", set]).output()?;
        refused(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), told);
    }
    let mut silent = config();
    silent["view"].as_object_mut().expect("a view").remove("caption");
    for (config, told) in [
        (silent, "view.caption"),
        (
            {
                let mut other = crate::job::tiny();
                other["view"]["caption"] = config()["view"]["caption"].clone();
                other
            },
            "reads no captions",
        ),
    ] {
        let fault = occlude::config::Config::parse(&config.to_string(), &[]).expect_err("no config");
        assert!(fault.code == Code::Usage && fault.message.contains(told), "{fault}");
    }
    let plain = text(crate::job::data().join("plain"));
    let output =
        occlude(&["train", "--config", &file, "--run", &run, "--set", &format!("data.train={plain}")]).output()?;
    refused(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), &["no captions"]);
    // Shares of a batch.
    let config = occlude::config::Config::parse(&config().to_string(), &["train.global_batch=50".into()])?;
    let faults = threads(3, |world| {
        let never = occlude::run::open::Resume::Never;
        occlude::run::open::open(&config, &run, &never, &world).err().expect("no equal shares").message
    });
    assert!(faults.iter().all(|fault| fault.contains("give 48 or 51")), "{faults:?}");
    Ok(())
}

fn what_a_model_has_not_learned_is_refused() -> Outcome {
    let (pair, alone) = (text(&*TRAINED), text(crate::job::undisturbed(0).folder()));
    let (picture, out) = (text(place().join("0.png")), text(place().join("nothing")));
    let (test, labelled) = (set("test"), text(crate::job::data().join("test")));
    for (words, told) in [
        (&["reconstruct", "--checkpoint", &pair, "--input", &picture, "--out", &out][..], "guesses no pixels"),
        (&["export", "--checkpoint", &pair, "--format", "timm", "--out", &out], "no format for weights of method.flip"),
        (
            &["evaluate", "--checkpoint", &alone, "--test", &labelled, "--protocol", "zero-shot"],
            "has not learned to match",
        ),
        (
            &["evaluate", "--checkpoint", &pair, "--test", &test, "--protocol", "retrieval", "--k", "5"],
            "--k belongs to",
        ),
        (&["evaluate", "--checkpoint", &pair, "--test", &test, "--protocol", "knn"], "--train is missing"),
        (&["evaluate", "--checkpoint", &pair, "--test", &labelled, "--protocol", "retrieval"], "no captions"),
    ] {
        let output = occlude(words).output()?;
        refused(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), &[told]);
    }
    Ok(())
}
