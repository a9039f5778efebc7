//! Weights in and out, judged by outputs: the same input through transformers' or timm's model and through ours.

use crate::job::{Run, data, occlude, tiny};
use crate::refuse::text;
use crate::support::{Outcome, Tensors, normal, oracle, read, write};
use libtest_mimic::Failed;
use occlude::fault::Code;
use occlude::grid::{Grid, Input};
use occlude::method::Batch;
use occlude::op::shuffle::Origin;
use occlude::part::mask;
use occlude::run::exchange::{self, Format, Order};
use occlude::run::{checkpoint, state};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor, no_grad};
use tempfile::TempDir;

crate::trials![
    transformers_weights_say_here_what_they_say_there,
    the_names_of_version_5_are_read_as_well,
    timms_weights_say_here_what_they_say_there,
    an_official_pth_is_read_with_its_arguments,
    half_precision_is_stored_as_fp32,
    an_export_says_there_what_it_says_here,
    what_goes_out_and_comes_in_again_is_the_same_to_the_bit,
    another_grid_gets_interpolated_positions,
    training_goes_on_from_imported_weights_on_any_number_of_ranks,
    what_does_not_fit_is_refused_by_name_and_nothing_is_written,
];

const BATCH: i64 = 3;
const RATIO: f64 = 0.6;

/// A model of odd sizes, what it is asked, and what its makers' code answers.
struct Theirs {
    place: TempDir,
    numbers: Value,
    answer: Tensors,
}

/// Two odd sizes.
fn grey() -> Value {
    json!({"size": [20, 20], "patch": 4, "channels": 1, "encoder": [24, 2, 3], "decoder": [16, 1, 2], "normalize": false})
}
fn colour() -> Value {
    json!({"size": [42, 42], "patch": 6, "channels": 3, "encoder": [60, 3, 5], "decoder": [36, 2, 3], "normalize": true})
}
fn wide() -> Value {
    json!({"size": [24, 56], "patch": 8, "channels": 3, "encoder": [44, 2, 11]})
}

fn origins() -> Vec<Origin> {
    (0..BATCH as u64).map(|id| Origin { id, epoch: 0, repeat: 0 }).collect()
}

impl Theirs {
    fn make(kind: &str, numbers: Value) -> Result<Theirs, Failed> {
        let place = tempfile::tempdir()?;
        std::fs::create_dir(place.path().join("theirs"))?;
        let mut theirs = Theirs { place, numbers, answer: Tensors::new() };
        theirs.ask()?;
        let numbers = theirs.numbers.to_string();
        theirs.answer = theirs.call("make", kind, &theirs.at("theirs"), Some(&numbers))?;
        Ok(theirs)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn pixels(&self) -> Tensor {
        let number = |value: &Value| value.as_i64().expect("a number");
        let size = &self.numbers["size"];
        normal(4, &[BATCH, number(&self.numbers["channels"]), number(&size[0]), number(&size[1])])
    }

    /// The input, and the noise whose ascending order is our order of tokens.
    fn ask(&self) -> Outcome {
        let input: Input = serde_json::from_value(json!({
            "channels": self.numbers["channels"], "height": self.numbers["size"][0], "width": self.numbers["size"][1],
            "patch": self.numbers["patch"],
        }))?;
        let grid: Grid = input.grid()?;
        let mask = mask::random(&grid, RATIO, 0, &Origin::table(&origins(), Device::Cpu));
        let noise = mask.restore().to_kind(Kind::Float) / grid.tokens();
        write(&self.at("request"), &[("input".into(), self.pixels()), ("noise".into(), noise)])
    }

    fn call(&self, what: &str, kind: &str, folder: &Path, numbers: Option<&str>) -> Result<Tensors, Failed> {
        let (folder, request, reply) = (text(folder), text(self.at("request")), text(self.at("reply")));
        let mut words = vec![what, kind, &folder, &request, &reply];
        words.extend(numbers);
        oracle("exchange.py", &words)?;
        read(&self.at("reply"))
    }

    fn import(&self, format: Format, file: &str, set: &[&str]) -> Result<Vec<String>, occlude::fault::Fault> {
        let mut set: Vec<String> = set.iter().map(ToString::to_string).collect();
        set.push(format!("method.mae.mask.ratio={RATIO}"));
        let from = self.at("theirs").join(file);
        exchange::import(&Order { format, from, out: text(self.at("ours")), config: None, set })
    }

    /// What our model answers from a checkpoint.
    fn ours(&self) -> Result<Tensors, Failed> {
        let loaded = checkpoint::open(&text(self.at("ours")))?;
        let (_, method, flat) = state::model(&loaded, Device::Cpu)?;
        let batch = Batch::new(self.pixels().unsqueeze(2), &origins(), 0);
        Ok(no_grad(|| -> occlude::fault::Result<Tensors> {
            let features = method.features(&flat.leaves, &batch)?;
            let sum = method.loss(&flat.leaves, &batch)?.remove(0).sum.reshape([1]);
            let loss = sum / method.counts(BATCH)[0].1;
            let named = [("class", features.class.expect("a class token")), ("mean", features.mean), ("loss", loss)];
            Ok(named.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect())
        })?)
    }
}

/// Every answer of theirs is ours to within 1e-5 of its size.
#[track_caller]
fn agree(theirs: &Tensors, ours: &Tensors, wanted: usize) {
    assert_eq!(theirs.len(), wanted, "{:?}", theirs.keys());
    for (name, theirs) in theirs {
        let off = (theirs - &ours[name]).norm().double_value(&[]) / theirs.norm().double_value(&[]);
        assert!(off <= 1e-5, "{name} is off by {off:e}");
    }
}

fn said(lines: &[String], what: &str) -> bool {
    lines.iter().any(|line| line.contains(what))
}

fn transformers_weights_say_here_what_they_say_there() -> Outcome {
    for numbers in [grey(), colour()] {
        let theirs = Theirs::make("transformers", numbers.clone())?;
        let told = theirs.import(Format::Transformers, "", &[])?;
        agree(&theirs.answer, &theirs.ours()?, 3);
        assert!(!said(&told, "nothing says") && !said(&told, "freshly drawn"), "{told:?}");
        let config = state::config(&checkpoint::open(&text(theirs.at("ours")))?)?.resolved();
        assert_eq!(config["input"]["mean"], json!(vec![0.4; numbers["channels"].as_u64().unwrap() as usize]));
        assert_eq!(config["method"]["mae"]["target"]["normalize"], numbers["normalize"]);
    }
    Ok(())
}

fn the_names_of_version_5_are_read_as_well() -> Outcome {
    for dialect in [json!(5), json!("memory")] {
        let mut numbers = grey();
        numbers["dialect"] = dialect;
        let theirs = Theirs::make("transformers", numbers)?;
        theirs.import(Format::Transformers, "model.safetensors", &[])?;
        agree(&theirs.answer, &theirs.ours()?, 3);
    }
    Ok(())
}

fn timms_weights_say_here_what_they_say_there() -> Outcome {
    for (numbers, heads) in [(wide(), 11), (colour(), 5)] {
        let theirs = Theirs::make("timm", numbers)?;
        let heads = format!("method.mae.encoder.heads={heads}");
        let told = theirs.import(Format::Timm, "model.safetensors", &[&heads])?;
        agree(&theirs.answer, &theirs.ours()?, 2);
        assert!(said(&told, "the file has no decoder: "), "{told:?}");
    }
    Ok(())
}

/// The whole of a training's file: optimizer, arguments and all.
fn an_official_pth_is_read_with_its_arguments() -> Outcome {
    for (numbers, heads) in [(grey(), [3, 2]), (colour(), [5, 3])] {
        let theirs = Theirs::make("mae", numbers.clone())?;
        let [encoder, decoder] = heads;
        let set = [format!("method.mae.encoder.heads={encoder}"), format!("method.mae.decoder.heads={decoder}")];
        theirs.import(Format::Mae, "checkpoint-3.pth", &[&set[0], &set[1]])?;
        agree(&theirs.answer, &theirs.ours()?, 3);
        let loaded = checkpoint::open(&text(theirs.at("ours")))?;
        let normalize = &state::config(&loaded)?.resolved()["method"]["mae"]["target"]["normalize"];
        assert_eq!(*normalize, numbers["normalize"], "the saved arguments were not heard");
        std::fs::rename(theirs.at("ours"), theirs.at("from-pth"))?;
        let told = theirs.import(Format::Mae, "plain.safetensors", &[])?;
        assert!(said(&told, "how many heads the encoder has") && said(&told, "were normalised"), "{told:?}");
        let plain = checkpoint::open(&text(theirs.at("ours")))?;
        assert_eq!(plain.tensors, loaded.tensors, "the two files hold the same");
    }
    Ok(())
}

fn half_precision_is_stored_as_fp32() -> Outcome {
    for dtype in ["bfloat16", "float16"] {
        let mut numbers = grey();
        numbers["dtype"] = dtype.into();
        let theirs = Theirs::make("transformers", numbers)?;
        theirs.import(Format::Transformers, "", &[])?;
        let loaded = checkpoint::open(&text(theirs.at("ours")))?;
        assert!(loaded.tensors.values().all(|tensor| tensor.dtype == safetensors::Dtype::F32));
        // The makers' model computes with positions rounded to its dtype, ours with the table itself.
        let ours = theirs.ours()?;
        let off = (&theirs.answer["loss"] / &ours["loss"] - 1.0).abs().double_value(&[0]);
        assert!(off < 1e-2, "the loss is off by {off:e}");
        let query =
            read(&theirs.at("theirs/model.safetensors"))?["vit.encoder.layer.1.attention.attention.query.weight"]
                .to_kind(Kind::Float);
        let held = &loaded.tensors["weight.encoder.blocks.1.attn.qkv.weight"];
        assert_eq!(held.bytes[..24 * 24 * 4], *occlude::bridge::bytes(&query), "not the same values");
    }
    Ok(())
}

fn an_export_says_there_what_it_says_here() -> Outcome {
    for numbers in [grey(), colour()] {
        let theirs = Theirs::make("transformers", numbers)?;
        theirs.import(Format::Transformers, "", &[])?;
        let ours = theirs.ours()?;
        for (format, kind, answers) in
            [(Format::Transformers, "transformers", 3), (Format::Timm, "timm", 2), (Format::Mae, "mae", 3)]
        {
            let out = theirs.at(kind);
            exchange::export(format, &text(theirs.at("ours")), &out)?;
            agree(&theirs.call("load", kind, &out, None)?, &ours, answers);
            let head = std::fs::read(out.join("model.safetensors"))?;
            let (_, read) = safetensors::SafeTensors::read_metadata(&head)?;
            assert_eq!(read.metadata().as_ref().and_then(|found| found.get("format")).map(String::as_str), Some("pt"));
        }
        let preprocessor: Value =
            serde_json::from_slice(&std::fs::read(theirs.at("transformers/preprocessor_config.json"))?)?;
        assert_eq!(preprocessor["image_mean"][0], 0.4, "not the statistics of the run");
    }
    let theirs = Theirs::make("timm", wide())?;
    theirs.import(Format::Timm, "model.safetensors", &["method.mae.encoder.heads=11"])?;
    exchange::export(Format::Timm, &text(theirs.at("ours")), &theirs.at("out"))?;
    agree(&theirs.call("load", "timm", &theirs.at("out"), None)?, &theirs.ours()?, 2);
    let fault = exchange::export(Format::Transformers, &text(theirs.at("ours")), &theirs.at("no")).unwrap_err();
    assert!(fault.code == Code::Usage && fault.message.contains("squares"), "{fault}");
    assert!(!theirs.at("no").exists());
    Ok(())
}

fn what_goes_out_and_comes_in_again_is_the_same_to_the_bit() -> Outcome {
    let theirs = Theirs::make("transformers", colour())?;
    theirs.import(Format::Transformers, "", &[])?;
    let before = checkpoint::open(&text(theirs.at("ours")))?;
    for (format, kind) in [(Format::Mae, "mae"), (Format::Transformers, "transformers"), (Format::Timm, "timm")] {
        let (out, again) = (theirs.at(kind), text(theirs.at(&format!("{kind}-again"))));
        exchange::export(format, &text(theirs.at("ours")), &out)?;
        let order = Order { format, from: out, out: again.clone(), config: None, set: vec![] };
        exchange::import(&order)?;
        let after = checkpoint::open(&again)?;
        for (name, tensor) in before.tensors.iter().filter(|(name, _)| kind != "timm" || name.contains("encoder")) {
            assert!(after.tensors.get(name) == Some(tensor), "{name} changed on its way through {kind}");
        }
        let shape = |loaded| state::config(loaded).map(|c| c.resolved()["method"]["mae"]["encoder"].clone());
        assert_eq!(shape(&before)?, shape(&after)?);
    }
    Ok(())
}

fn another_grid_gets_interpolated_positions() -> Outcome {
    let theirs = Theirs::make("transformers", grey())?;
    let told = theirs.import(Format::Transformers, "", &["input.height=28", "input.width=36"])?;
    assert!(said(&told, "for 5 × 5 patches; they are interpolated to 7 × 9"), "{told:?}");
    exchange::export(Format::Timm, &text(theirs.at("ours")), &theirs.at("out"))?;
    let out = read(&theirs.at("out/model.safetensors"))?;
    assert_eq!(out["pos_embed"].size(), [1, 64, 24]);
    let (source, wanted) = (text(theirs.at("theirs/model.safetensors")), theirs.at("wanted.safetensors"));
    let name = "vit.embeddings.position_embeddings";
    oracle("interpolate.py", &[&source, name, "5", "5", "7", "9", &text(wanted.clone())])?;
    let off = (&out["pos_embed"] - &read(&wanted)?["positions"]).abs().max().double_value(&[]);
    assert!(off < 1e-5, "off by {off}");
    // The config says so, and a training from it must.
    let loaded = checkpoint::open(&text(theirs.at("ours")))?;
    assert_eq!(state::config(&loaded)?.resolved()["method"]["mae"]["trained_grid"], serde_json::json!([5, 5]));
    Ok(())
}

/// The first step's loss is that of the imported weights, on one rank and on two; the verbs open what was imported.
fn training_goes_on_from_imported_weights_on_any_number_of_ranks() -> Outcome {
    let mut config = tiny();
    config["train"]["steps"] = 4.into();
    let source = Run::new(&config);
    source.finish(0, &[]);
    let place = tempfile::tempdir()?;
    let at = |name: &str| text(place.path().join(name));
    let say = |words: &[&str]| -> Result<String, Failed> {
        let output = occlude(words).output()?;
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let trained = text(source.folder());
    let told = say(&["export", "--format", "mae", "--checkpoint", &trained, "--out", &at("mae")])?;
    assert!(told.contains("MaskedAutoencoderViT"), "{told}");
    let told = say(&["import", "--format", "mae", "--from", &at("mae"), "--out", &at("run")])?;
    assert!(told.contains("a checkpoint of step 0"), "{told}");

    // Mean and deviation are the same here and there by default, and the recipe is another.
    config["optim"]["lr"] = 1e-4.into();
    let mut first = Vec::new();
    for ranks in [0, 1, 2] {
        let run = Run::new(&config);
        run.finish(ranks, &["--resume", &at("run")]);
        first.push(run.lines()[0].loss);
    }
    let fresh = Run::new(&config);
    fresh.finish(0, &[]);
    for loss in &first {
        assert!((loss / first[0] - 1.0).abs() < 1e-5, "{first:?}");
        assert!((loss / fresh.lines()[0].loss - 1.0).abs() > 1e-3, "the weights are freshly drawn");
    }
    let (train, test) = (text(data().join("train")), text(data().join("test")));
    let words = ["evaluate", "--checkpoint", &at("run"), "--train", &train, "--test", &test, "--protocol", "knn"];
    assert!(say(&words)?.contains("\"step\":0"));
    let picture = text(data().join("in/stripes-0/000.png"));
    say(&["reconstruct", "--checkpoint", &at("run"), "--input", &picture, "--out", &at("pictures")])?;
    Ok(())
}

fn what_does_not_fit_is_refused_by_name_and_nothing_is_written() -> Outcome {
    let theirs = Theirs::make("transformers", grey())?;
    let whole = read(&theirs.at("theirs/model.safetensors"))?;
    let refused = |format: Format, file: &str, set: &[&str], wanted: &[&str]| {
        let fault = theirs.import(format, file, set).expect_err("refused");
        assert_eq!(fault.code, Code::Usage, "{fault}");
        for word in wanted {
            assert!(fault.message.contains(word), "no {word:?} in: {fault}");
        }
        assert!(!theirs.at("ours").exists(), "something was written");
    };
    let save = |name: &str, change: &dyn Fn(&mut Tensors)| {
        let mut tensors: Tensors = whole.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        change(&mut tensors);
        write(&theirs.at("theirs").join(name), &tensors.into_iter().collect::<Vec<_>>())
    };
    let format = Format::Transformers;
    save("missing", &|t| drop(t.remove("vit.encoder.layer.1.layernorm_before.bias")))?;
    refused(format, "missing", &[], &["lacks vit.encoder.layer.1.layernorm_before.bias"]);
    save("misspelt", &|t| {
        let tensor = t.remove("vit.layernorm.bias").expect("it is there");
        t.insert("vit.layer_norm.bias".into(), tensor);
    })?;
    refused(format, "misspelt", &[], &["lacks vit.layernorm.bias (nearest: vit.layer_norm.bias)"]);
    save("more", &|t| drop(t.insert("classifier.weight".into(), Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)))))?;
    refused(format, "more", &[], &["does not know: classifier.weight"]);
    save("half", &|t| t.retain(|name, _| !name.starts_with("decoder.decoder_layers")))?;
    refused(format, "half", &[], &["decoder"]);
    save("learned", &|t| drop(t.get_mut("vit.embeddings.position_embeddings").expect("there").g_add_scalar_(0.1)))?;
    refused(format, "learned", &[], &["vit.embeddings.position_embeddings", "learned"]);
    save("whole", &|t| {
        drop(t.insert("decoder.mask_token".into(), Tensor::zeros([1, 1, 16], (Kind::Int64, Device::Cpu))))
    })?;
    refused(format, "whole", &[], &["decoder.mask_token is I64"]);
    refused(format, "model.safetensors", &["method.mae.encoder.width=48"], &["another shape", "wanted [48"]);
    refused(format, "model.safetensors", &["method.mae.encoder.heads=4"], &["encoder.heads is 4", "says 3"]);
    refused(Format::Mae, "model.safetensors", &[], &["--format transformers"]);
    refused(format, "absent", &[], &["absent"]);
    std::fs::write(theirs.at("theirs/text"), "hello, world")?;
    refused(format, "text", &[], &["neither a safetensors file nor a PyTorch checkpoint"]);
    theirs.import(format, "model.safetensors", &[])?;
    let fault = theirs.import(format, "model.safetensors", &[]).expect_err("it is there already");
    assert!(fault.message.contains("holds checkpoints already"), "{fault}");
    exchange::export(format, &text(theirs.at("ours")), &theirs.at("out"))?;
    let fault = exchange::export(format, &text(theirs.at("ours")), &theirs.at("out")).expect_err("it is there already");
    assert!(fault.message.contains("is there already"), "{fault}");
    Ok(())
}
