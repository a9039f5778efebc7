//! Tests of captioned images from shards to a trained model: loading, training, zero-shot classification, retrieval.

use crate::cli::usage_errors::assert_rejected;
use crate::support::object_store::Server;
use crate::support::training_job::occlude_command;
use crate::support::{Outcome, path_text};
use libtest_mimic::Failed;
use occlude::data::caption::{MAX_CAPTION_BYTES, Tokenizer};
use occlude::data::mixture::Mixture;
use occlude::data::order::SampleOrder;
use occlude::data::set::DataSet;
use occlude::dist::World;
use occlude::dist::solo::{SoloWorld, run_on_threads};
use occlude::error::ExitCode;
use occlude::evaluate::captions::{CaptionEvalOptions, CaptionEvalReport, CaptionMetrics, Task, evaluate};
use occlude::evaluate::model_source::ModelSource;
use occlude::grid::Grid;
use occlude::loader::{DataLoader, Labels, LoadedRows, LoaderOptions};
use occlude::rng::{Philox, Purpose};
use occlude::train::session::{Resume, Session};
use occlude::view::{View, ViewKey};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;
use tch::Device;
use tempfile::TempDir;

crate::trials![
    captions_are_read_alike_from_disk_and_store,
    a_sample_without_a_readable_caption_is_replaced,
    training_learns_and_evaluates_alike_on_any_number_of_ranks,
    fine_tuning_starts_from_the_weights_alone,
    invalid_settings_are_rejected,
    evaluations_that_the_model_does_not_support_are_rejected,
];

const COLORS: [(&str, [u8; 3]); 4] =
    [("red", [220, 30, 30]), ("green", [30, 200, 40]), ("blue", [40, 50, 220]), ("yellow", [230, 220, 30])];
const SHAPES: [&str; 3] = ["square", "bar", "pillar"];

/// Returns a folder with captioned images of twelve kinds, packed into `train/` and `test/`, and a tokenizer trained on
/// the captions.
pub fn shared_folder() -> PathBuf {
    let mut output = SET.lock().unwrap_or_else(PoisonError::into_inner);
    output.get_or_insert_with(|| self::make_data().expect("captioned images")).path().to_owned()
}

static SET: Mutex<Option<TempDir>> = Mutex::new(None);

/// Removes the shared data of the tests.
pub fn remove_shared_data() {
    drop(SET.lock().unwrap_or_else(PoisonError::into_inner).take());
}

fn make_data() -> Result<TempDir, Failed> {
    let folder = tempfile::tempdir()?;
    let mut list = String::new();
    for number in 0..300u64 {
        let mut draw = Philox::new(1, number, 0, Purpose::Order, 0);
        let (name, color) = COLORS[number as usize % 4];
        let shape = number as usize / 4 % 3;
        let left = draw.uniform_int(8) as u32 + 4;
        let top = draw.uniform_int(8) as u32 + 4;
        let [width, height] = [[12, 12], [16, 5], [5, 16]][shape];
        let image = image::RgbImage::from_fn(32, 32, |x, y| {
            let inside = (left..left + width).contains(&x) && (top..top + height).contains(&y);
            let noise = draw.uniform_int(30) as u8;
            image::Rgb(if inside { color.map(|c| c.saturating_add(noise)) } else { [noise; 3] })
        });
        image.save(folder.path().join(format!("{number}.png")))?;
        let caption = format!("{} {name} {}", ["a", "the", "one"][number as usize / 12 % 3], SHAPES[shape]);
        list += &(json!({"path": format!("{number}.png"), "label": name, "caption": caption}).to_string() + "\n");
    }
    let source = path_text(folder.path().join("list.jsonl"));
    std::fs::write(&source, list)?;
    let tokenizer = path_text(folder.path().join("tokenizer.json"));
    let out = path_text(folder.path().join("shards"));
    let learns = ["--train-tokenizer", "90", "--tokenizer-out", &tokenizer];
    let shape = ["--name", "kinds", "--samples-per-shard", "60", "--test-fraction", "0.3"];
    run_program(&[&["pack", &source, &out][..], &shape, &learns].concat())?;
    Ok(folder)
}

pub fn run_program(words: &[&str]) -> Result<String, Failed> {
    let output = occlude_command(words).output()?;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout)?)
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    }
}

fn set(part: &str) -> String {
    path_text(shared_folder().join("shards").join(part))
}

fn source(url: &str) -> Result<LoaderOptions, Failed> {
    let grid = Grid { frames: 1, rows: 2, cols: 2, channels: 3, patch_frames: 1, patch: 8 };
    let view = View::default();
    Ok(LoaderOptions {
        labels: Labels::Ignored,
        mixture: Arc::new(Mixture::from_set(DataSet::open(url)?)),
        cache: None,
        tokenizer: Some(Arc::new(Tokenizer::open(&path_text(shared_folder().join("tokenizer.json")), 6)?)),
        modality: Default::default(),
        view: Arc::new(move |image, id, epoch, _, out| {
            view.train_view(&grid, image, ViewKey { seed: 11, id, epoch }, 0, out)
        }),
        shape: grid.pixel_shape(),
        single_frame_sets: Vec::new(),
        limits: Default::default(),
        seed: 11,
        threads: 2,
        prefetch_bytes: 1 << 20,
        max_corrupt_fraction: 0.1,
    })
}

fn rows(source: LoaderOptions) -> Result<Vec<LoadedRows>, Failed> {
    let order = SampleOrder::with_sources(&source.mixture.weighted_sizes(), 11, 2);
    let loader = DataLoader::for_training(source, order, 10, 0, 1, 0..12)?;
    Ok(loader
        .map(|rows| rows.map(|rows| LoadedRows { wait_time: Duration::ZERO, ..rows }))
        .collect::<Result<_, _>>()?)
}

fn captions_are_read_alike_from_disk_and_store() -> Outcome {
    let source_of = source(&set("train"))?;
    let set_of = source_of.mixture.clone();
    let captions = source_of.tokenizer.clone().expect("a tokenizer");
    let disk = rows(source_of)?;
    // The ids of each row are those of the caption of its sample.
    let set = &set_of.sets()[0];
    let by_id = |id: u64| (0..set.len()).find(|&index| set.id(index).is_ok_and(|local| local == id)).expect("a sample");
    for step in &disk {
        let ids = step.side.captions.as_ref().expect("captions");
        assert_eq!(ids.size(), [10, 6]);
        for (row, &id) in step.ids.iter().enumerate() {
            let (shard, at) = set.find_sample(by_id(id))?;
            let expected = captions.encode_caption(&shard.read(at, &["txt"])?)?;
            assert_eq!(Vec::<i64>::try_from(ids.get(row as i64))?, expected, "{}", shard.key(at));
        }
    }
    let server = Server::start();
    server.upload(Path::new(&self::set("train")), "b/kinds")?;
    let store = rows(source(&server.http("b/kinds"))?)?;
    assert!(store == disk, "the rows from the store differ");
    Ok(())
}

fn a_sample_without_a_readable_caption_is_replaced() -> Outcome {
    let folder = tempfile::tempdir()?;
    std::fs::create_dir_all(folder.path().join("shards"))?;
    // A foreign tar: every tenth caption is not text, another tenth is missing, and one is as long as a book.
    let mut tar = tar::Builder::new(std::fs::File::create(folder.path().join("shards/x-000000.tar"))?);
    let mut add = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        tar.append_data(&mut header, name, bytes)
    };
    let image = std::fs::read(shared_folder().join("0.png"))?;
    for number in 0..40 {
        add(format!("{number:03}.png"), &image)?;
        match number % 10 {
            3 => add(format!("{number:03}.txt"), b"\xc3\x28 no text")?,
            7 => {}
            9 => add(format!("{number:03}.txt"), &vec![b'a'; MAX_CAPTION_BYTES + 1])?,
            _ => add(format!("{number:03}.txt"), b"a red square")?,
        }
    }
    tar.finish()?;
    let source = LoaderOptions { max_corrupt_fraction: 0.5, ..source(&path_text(folder.path().join("shards")))? };
    let visible = rows(source)?;
    let known = visible
        .iter()
        .all(|step| step.ids.len() == 10 && step.side.captions.as_ref().is_some_and(|ids| ids.size() == [10, 6]));
    assert!(known, "every row has a caption");
    let strict = LoaderOptions { max_corrupt_fraction: 0.2, ..self::source(&path_text(folder.path().join("shards")))? };
    let order = SampleOrder::with_sources(&strict.mixture.weighted_sizes(), 1, 1);
    let error = DataLoader::for_training(strict, order, 10, 0, 1, 0..12)?.find_map(Result::err).expect("too many");
    assert!(
        error.code == ExitCode::Corrupt && error.message.contains("UTF-8") && error.message.contains(".txt"),
        "{error}"
    );
    Ok(())
}

pub fn config() -> Value {
    let shape = json!({"width": 48, "depth": 2, "heads": 4});
    json!({
        "about": {"title": "a test", "source": "none", "measured": "never"},
        "input": {"height": 32, "width": 32, "patch": 8},
        "view": {
            "crop": {"scale": [0.8, 1.0]}, "hflip": 0.5, "center_crop": 1.0,
            "caption": {"tokenizer": shared_folder().join("tokenizer.json"), "context_length": 6},
        },
        "method": {"flip": {
            "encoder": shape, "embed_dim": 32, "mask": {"ratio": 0.5},
            "text": {"shape": {"width": 32, "depth": 1, "heads": 2}, "vocab_size": 90, "context_length": 6},
        }},
        "optim": {"lr": 2e-3, "warmup": {"steps": 10}},
        "data": {"train": set("train"), "threads": 1},
        "train": {"steps": 150, "global_batch": 48, "seed": 5},
    })
}

/// The training that the tests share.
static TRAINED: LazyLock<PathBuf> = LazyLock::new(|| {
    let file = shared_folder().join("config.json");
    std::fs::write(&file, config().to_string()).expect("a config");
    let folder = shared_folder().join("run");
    run_program(&["train", "--config", &path_text(&file), "--run", &path_text(&folder)]).expect("a training");
    folder
});

fn eval_options(task: Task, random: bool) -> CaptionEvalOptions {
    let subject = ModelSource { checkpoint: path_text(&*TRAINED), random_init: random, seed: None };
    CaptionEvalOptions { model: subject, test: set("test"), task, tokenizer: None }
}

fn evaluate_on(options: &CaptionEvalOptions, size: usize) -> CaptionEvalReport {
    let replies = run_on_threads(size, |world| evaluate(options, &world).expect("a result"));
    assert!(replies.iter().all(|reply| *reply == replies[0]), "{replies:?}");
    replies.into_iter().next().expect("a rank")
}

fn training_learns_and_evaluates_alike_on_any_number_of_ranks() -> Outcome {
    let templates = shared_folder().join("templates.txt");
    std::fs::write(&templates, "a {} square\nthe {} bar\n\none {} pillar\n")?;
    let named = Task::ZeroShot { classes: None, templates: Some(templates) };
    for task in [named, Task::Retrieval] {
        let world: Arc<dyn World> = Arc::new(SoloWorld::new(Device::Cpu));
        let alone = evaluate(&eval_options(task.clone(), false), &world)?;
        assert_eq!(alone.n_test + alone.n_skipped, DataSet::open(&set("test"))?.len() as i64);
        for ranks in [2, 3] {
            assert_eq!(
                evaluate_on(&eval_options(task.clone(), false), ranks),
                CaptionEvalReport { ranks, ..alone.clone() }
            );
        }
        let random = evaluate(&eval_options(task, true), &world)?;
        match (alone.metrics, random.metrics) {
            (
                CaptionMetrics::ZeroShot { classes: 4, templates: 3, top1, top5 },
                CaptionMetrics::ZeroShot { top1: by_chance, .. },
            ) => {
                assert!(top1 > 0.8 && top5 == 1.0 && by_chance < 0.6, "zero-shot: {top1}, {top5}, random {by_chance}");
            }
            // Three articles, and about seven samples of each kind: chance finds one of the same kind.
            (
                CaptionMetrics::Retrieval { image_to_text: there, text_to_image: back },
                CaptionMetrics::Retrieval { image_to_text: by_chance, .. },
            ) => {
                assert!(there.r10 > 0.5 && back.r10 > 0.5 && by_chance.r10 < 0.3, "{there:?} {back:?} {by_chance:?}");
                assert!(there.r1 <= there.r5 && there.r5 <= there.r10);
            }
            other => panic!("{other:?}"),
        }
    }
    let words = ["evaluate", "--checkpoint", &path_text(&*TRAINED), "--test", &set("test"), "--protocol", "zero-shot"];
    let line = run_program(&words)?;
    let found: Value = serde_json::from_str(line.lines().last().expect("a line"))?;
    assert!(found["protocol"] == "zero-shot" && found["templates"] == 7 && found["classes"] == 4, "{found}");
    // The image tower alone is an ordinary encoder.
    let from = path_text(&*TRAINED);
    let train = set("train");
    let test = set("test");
    let found =
        run_program(&["evaluate", "--checkpoint", &from, "--train", &train, "--test", &test, "--protocol", "knn"])?;
    let found: Value = serde_json::from_str(found.lines().last().expect("a line"))?;
    assert!(found["top1"].as_f64().expect("a number") > 0.6, "{found}");
    Ok(())
}

fn fine_tuning_starts_from_the_weights_alone() -> Outcome {
    let file = path_text(shared_folder().join("config.json"));
    let tuned = path_text(shared_folder().join("tuned"));
    let from = path_text(&*TRAINED);
    let sets = ["--set", "method.flip.mask.ratio=0", "--set", "train.steps=4", "--set", "optim.lr=1e-9"];
    let words = [&["train", "--config", &file, "--run", &tuned, "--init", &from][..], &sets].concat();
    run_program(&words)?;
    let weights = |run: &str| -> Result<_, Failed> { Ok(occlude::checkpoint::load_from_url(run)?) };
    let before = weights(&from)?;
    let after = weights(&tuned)?;
    assert_eq!(after.manifest.step, 4);
    let name = "weight.image.blocks.0.attn.qkv.weight";
    let number = |bytes: &[u8]| f32::from_le_bytes(bytes[..4].try_into().expect("four"));
    let was = number(&before.tensors[name].bytes);
    let is = number(&after.tensors[name].bytes);
    assert!((was - is).abs() < 1e-5 && was != 0.0, "{was} became {is}");
    let steps = number(&after.tensors["steps"].bytes);
    assert_eq!(steps, 4.0, "the moments were reset");
    // The same command again resumes the run.
    run_program(&words)?;
    // Weights of another model are rejected as initial weights.
    let other = path_text(shared_folder().join("other"));
    let words = ["train", "--config", &file, "--run", &other, "--init", &from, "--set", "method.flip.embed_dim=16"];
    let output = occlude_command(&words).output()?;
    assert_rejected(
        output.status.code().unwrap_or(-1),
        &String::from_utf8_lossy(&output.stderr),
        &["image_projection.weight"],
    );
    Ok(())
}

fn invalid_settings_are_rejected() -> Outcome {
    let file = path_text(shared_folder().join("refused.json"));
    std::fs::write(&file, config().to_string())?;
    let run = path_text(shared_folder().join("never"));
    for (set, text) in [
        ("train.micro_batch=8", &["train.micro_batch", "leave it out"][..]),
        ("view.caption.context_length=7", &["view.caption.context_length is 7", "text.context_length 6"]),
        ("method.flip.text.vocab_size=40", &["tokens and the model's text encoder 40"]),
        ("method.flip.mask.ratio=0.99", &["method.flip.mask.ratio"]),
        ("method.flip.embed_dim=0", &["method.flip.embed_dim is 0"]),
        ("view.caption.tokenizer=/nowhere.json", &["/nowhere.json"]),
    ] {
        let output = occlude_command(&["train", "--config", &file, "--run", &run, "--set", set]).output()?;
        assert_rejected(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), text);
    }
    let mut silent = config();
    silent["view"].as_object_mut().expect("a view").remove("caption");
    for (config, text) in [
        (silent, "view.caption"),
        (
            {
                let mut other = crate::support::training_job::tiny_config();
                other["view"]["caption"] = config()["view"]["caption"].clone();
                other
            },
            "reads no captions",
        ),
    ] {
        let error = occlude::config::Config::parse(&config.to_string(), &[]).expect_err("no config");
        assert!(error.code == ExitCode::Usage && error.message.contains(text), "{error}");
    }
    let plain = path_text(crate::support::training_job::shared_data().join("plain"));
    let output = occlude_command(&["train", "--config", &file, "--run", &run, "--set", &format!("data.train={plain}")])
        .output()?;
    assert_rejected(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), &["no captions"]);
    // Local batches must be equal.
    let config = occlude::config::Config::parse(&config().to_string(), &["train.global_batch=50".into()])?;
    let errors = run_on_threads(3, |world| {
        Session::open(&config, &run, &Resume::Never, &world).err().expect("unequal local batches").message
    });
    assert!(errors.iter().all(|error| error.contains("give 48 or 51")), "{errors:?}");
    Ok(())
}

fn evaluations_that_the_model_does_not_support_are_rejected() -> Outcome {
    let pair = path_text(&*TRAINED);
    let alone = path_text(crate::support::training_job::reference_run(0).folder());
    let image = path_text(shared_folder().join("0.png"));
    let out = path_text(shared_folder().join("nothing"));
    let test = set("test");
    let labeled = path_text(crate::support::training_job::shared_data().join("test"));
    for (words, text) in [
        (&["reconstruct", "--checkpoint", &pair, "--input", &image, "--out", &out][..], "predicts no pixels"),
        (&["export", "--checkpoint", &pair, "--format", "timm", "--out", &out], "no format for weights of method.flip"),
        (
            &["evaluate", "--checkpoint", &alone, "--test", &labeled, "--protocol", "zero-shot"],
            "has not learned to match",
        ),
        (
            &["evaluate", "--checkpoint", &pair, "--test", &test, "--protocol", "retrieval", "--k", "5"],
            "--k belongs to",
        ),
        (&["evaluate", "--checkpoint", &pair, "--test", &test, "--protocol", "knn"], "--train is missing"),
        (&["evaluate", "--checkpoint", &pair, "--test", &labeled, "--protocol", "retrieval"], "no captions"),
    ] {
        let output = occlude_command(words).output()?;
        assert_rejected(output.status.code().unwrap_or(-1), &String::from_utf8_lossy(&output.stderr), &[text]);
    }
    Ok(())
}
