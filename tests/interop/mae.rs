//! Tests of import and export of MAE by outputs: the same input through the model of transformers or timm and through
//! ours.

use crate::support::method_ext::MethodExt;
use crate::support::training_job::{Run, occlude_command, shared_data, tiny_config};
use crate::support::{Outcome, Tensors, normal, oracle, path_text, read, write};
use libtest_mimic::Failed;
use occlude::checkpoint;
use occlude::checkpoint::weights::{self, SavedModel};
use occlude::error::ExitCode;
use occlude::grid::{Grid, InputConfig};
use occlude::interop;
use occlude::interop::{ImportOptions, WeightFormat};
use occlude::method::Batch;
use occlude::op::shuffle::SampleKey;
use occlude::part::mask;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor, no_grad};
use tempfile::TempDir;

crate::trials![
    imported_transformers_weights_give_the_same_outputs,
    transformers_version_5_names_are_imported,
    imported_timm_weights_give_the_same_outputs,
    an_official_pth_is_imported_with_its_arguments,
    half_precision_is_stored_as_fp32,
    exported_weights_give_the_same_outputs,
    export_and_import_round_trip_bit_for_bit,
    positions_are_interpolated_for_another_grid,
    training_continues_from_imported_weights_on_any_number_of_ranks,
    mismatched_tensors_are_rejected_by_name_and_nothing_is_written,
];

const BATCH: i64 = 3;
const RATIO: f64 = 0.6;

/// A model of odd sizes, its inputs, and the outputs of the reference code.
struct Reference {
    place: TempDir,
    numbers: Value,
    answer: Tensors,
}

/// Two odd sizes, grayscale.
fn grayscale_case() -> Value {
    json!({"size": [20, 20], "patch": 4, "channels": 1, "encoder": [24, 2, 3], "decoder": [16, 1, 2], "normalize": false})
}
fn color_case() -> Value {
    json!({"size": [42, 42], "patch": 6, "channels": 3, "encoder": [60, 3, 5], "decoder": [36, 2, 3], "normalize": true})
}
fn wide_case() -> Value {
    json!({"size": [24, 56], "patch": 8, "channels": 3, "encoder": [44, 2, 11]})
}

fn origins() -> Vec<SampleKey> {
    (0..BATCH as u64).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect()
}

impl Reference {
    fn make(kind: &str, numbers: Value) -> Result<Reference, Failed> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join("theirs"))?;
        let mut reference = Reference { place: folder, numbers, answer: Tensors::new() };
        reference.write_request()?;
        let numbers = reference.numbers.to_string();
        reference.answer = reference.call("make", kind, &reference.at("theirs"), Some(&numbers))?;
        Ok(reference)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn pixels(&self) -> Tensor {
        let number = |value: &Value| value.as_i64().expect("a number");
        let size = &self.numbers["size"];
        normal(4, &[BATCH, number(&self.numbers["channels"]), number(&size[0]), number(&size[1])])
    }

    /// Writes the input, and the noise whose ascending order is our order of tokens.
    fn write_request(&self) -> Outcome {
        let input: InputConfig = serde_json::from_value(json!({
            "channels": self.numbers["channels"], "height": self.numbers["size"][0], "width": self.numbers["size"][1],
            "patch": self.numbers["patch"],
        }))?;
        let grid: Grid = input.grid()?;
        let mask = mask::random_keep(&grid, grid.visible(RATIO), 0, &SampleKey::stack(&origins(), Device::Cpu));
        let noise = mask.restore().to_kind(Kind::Float) / grid.tokens();
        write(&self.at("request"), &[("input".into(), self.pixels()), ("noise".into(), noise)])
    }

    fn call(&self, label: &str, kind: &str, folder: &Path, numbers: Option<&str>) -> Result<Tensors, Failed> {
        let folder = path_text(folder);
        let request = path_text(self.at("request"));
        let reply = path_text(self.at("reply"));
        let mut words = vec![label, kind, &folder, &request, &reply];
        words.extend(numbers);
        oracle("interop.py", &words)?;
        read(&self.at("reply"))
    }

    fn import(&self, format: WeightFormat, file: &str, set: &[&str]) -> Result<Vec<String>, occlude::error::Error> {
        let mut overrides: Vec<String> = set.iter().map(ToString::to_string).collect();
        overrides.push(format!("method.mae.mask.ratio={RATIO}"));
        let from = self.at("theirs").join(file);
        interop::import(&ImportOptions { format, from, out: path_text(self.at("ours")), config: None, overrides })
    }

    /// Returns the outputs of our model from a checkpoint.
    fn ours(&self) -> Result<Tensors, Failed> {
        let loaded = checkpoint::load_from_url(&path_text(self.at("ours")))?;
        let SavedModel { method, flat, .. } = weights::load_model(&loaded, Device::Cpu)?;
        let batch = Batch::new(self.pixels().unsqueeze(2), &origins(), 0);
        Ok(no_grad(|| -> occlude::error::Result<Tensors> {
            let features = method.encode(&flat.leaves, &batch)?;
            let sum = method.terms(&flat.leaves, &batch)?.remove(0).sum.reshape([1]);
            let loss = sum / method.denominators(&batch)?.hidden_tokens;
            let named = [("class", features.class.expect("a class token")), ("mean", features.mean), ("loss", loss)];
            Ok(named.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect())
        })?)
    }
}

/// Asserts that every reference output is matched to within 1e-5 of its norm.
#[track_caller]
fn assert_outputs_match(reference: &Tensors, ours: &Tensors, expected: usize) {
    assert_eq!(reference.len(), expected, "{:?}", reference.keys());
    for (name, reference) in reference {
        let difference = (reference - &ours[name]).norm().double_value(&[]) / reference.norm().double_value(&[]);
        assert!(difference <= 1e-5, "{name} is off by {difference:e}");
    }
}

fn mentions(lines: &[String], label: &str) -> bool {
    lines.iter().any(|line| line.contains(label))
}

fn imported_transformers_weights_give_the_same_outputs() -> Outcome {
    for numbers in [grayscale_case(), color_case()] {
        let reference = Reference::make("transformers", numbers.clone())?;
        let output = reference.import(WeightFormat::Transformers, "", &[])?;
        assert_outputs_match(&reference.answer, &reference.ours()?, 3);
        assert!(!mentions(&output, "nothing says") && !mentions(&output, "newly initialized"), "{output:?}");
        let config = weights::saved_config(&checkpoint::load_from_url(&path_text(reference.at("ours")))?)?.to_json();
        assert_eq!(config["input"]["mean"], json!(vec![0.4; numbers["channels"].as_u64().unwrap() as usize]));
        assert_eq!(config["method"]["mae"]["target"]["normalize"], numbers["normalize"]);
    }
    Ok(())
}

fn transformers_version_5_names_are_imported() -> Outcome {
    for version in [json!(5), json!("memory")] {
        let mut numbers = grayscale_case();
        numbers["version"] = version;
        let reference = Reference::make("transformers", numbers)?;
        reference.import(WeightFormat::Transformers, "model.safetensors", &[])?;
        assert_outputs_match(&reference.answer, &reference.ours()?, 3);
    }
    Ok(())
}

fn imported_timm_weights_give_the_same_outputs() -> Outcome {
    for (numbers, heads) in [(wide_case(), 11), (color_case(), 5)] {
        let reference = Reference::make("timm", numbers)?;
        let heads = format!("method.mae.encoder.heads={heads}");
        let output = reference.import(WeightFormat::Timm, "model.safetensors", &[&heads])?;
        assert_outputs_match(&reference.answer, &reference.ours()?, 2);
        assert!(mentions(&output, "the file has no decoder: "), "{output:?}");
    }
    Ok(())
}

/// The complete file of a training: optimizer, arguments and all.
fn an_official_pth_is_imported_with_its_arguments() -> Outcome {
    for (numbers, heads) in [(grayscale_case(), [3, 2]), (color_case(), [5, 3])] {
        let reference = Reference::make("mae", numbers.clone())?;
        let [encoder, decoder] = heads;
        let set = [format!("method.mae.encoder.heads={encoder}"), format!("method.mae.decoder.heads={decoder}")];
        reference.import(WeightFormat::Mae, "checkpoint-3.pth", &[&set[0], &set[1]])?;
        assert_outputs_match(&reference.answer, &reference.ours()?, 3);
        let loaded = checkpoint::load_from_url(&path_text(reference.at("ours")))?;
        let normalize = &weights::saved_config(&loaded)?.to_json()["method"]["mae"]["target"]["normalize"];
        assert_eq!(*normalize, numbers["normalize"], "the saved arguments were ignored");
        std::fs::rename(reference.at("ours"), reference.at("from-pth"))?;
        let output = reference.import(WeightFormat::Mae, "plain.safetensors", &[])?;
        assert!(
            mentions(&output, "how many heads the encoder has") && mentions(&output, "were normalized"),
            "{output:?}"
        );
        let plain = checkpoint::load_from_url(&path_text(reference.at("ours")))?;
        assert_eq!(plain.tensors, loaded.tensors, "the two files hold the same");
    }
    Ok(())
}

fn half_precision_is_stored_as_fp32() -> Outcome {
    for dtype in ["bfloat16", "float16"] {
        let mut numbers = grayscale_case();
        numbers["dtype"] = dtype.into();
        let reference = Reference::make("transformers", numbers)?;
        reference.import(WeightFormat::Transformers, "", &[])?;
        let loaded = checkpoint::load_from_url(&path_text(reference.at("ours")))?;
        assert!(loaded.tensors.values().all(|tensor| tensor.dtype == safetensors::Dtype::F32));
        // The reference model computes with positions rounded to its dtype, ours with the table itself.
        let ours = reference.ours()?;
        let difference = (&reference.answer["loss"] / &ours["loss"] - 1.0).abs().double_value(&[0]);
        assert!(difference < 1e-2, "the loss is off by {difference:e}");
        let query =
            read(&reference.at("theirs/model.safetensors"))?["vit.encoder.layer.1.attention.attention.query.weight"]
                .to_kind(Kind::Float);
        let held = &loaded.tensors["weight.encoder.blocks.1.attn.qkv.weight"];
        assert_eq!(held.bytes[..24 * 24 * 4], *occlude::bridge::bytes(&query), "not the same values");
    }
    Ok(())
}

fn exported_weights_give_the_same_outputs() -> Outcome {
    for numbers in [grayscale_case(), color_case()] {
        let reference = Reference::make("transformers", numbers)?;
        reference.import(WeightFormat::Transformers, "", &[])?;
        let ours = reference.ours()?;
        for (format, kind, replies) in [
            (WeightFormat::Transformers, "transformers", 3),
            (WeightFormat::Timm, "timm", 2),
            (WeightFormat::Mae, "mae", 3),
        ] {
            let out = reference.at(kind);
            interop::export(format, &path_text(reference.at("ours")), &out)?;
            assert_outputs_match(&reference.call("load", kind, &out, None)?, &ours, replies);
            let head = std::fs::read(out.join("model.safetensors"))?;
            let (_, read) = safetensors::SafeTensors::read_metadata(&head)?;
            assert_eq!(read.metadata().as_ref().and_then(|found| found.get("format")).map(String::as_str), Some("pt"));
        }
        let preprocessor: Value =
            serde_json::from_slice(&std::fs::read(reference.at("transformers/preprocessor_config.json"))?)?;
        assert_eq!(preprocessor["image_mean"][0], 0.4, "not the statistics of the run");
    }
    let reference = Reference::make("timm", wide_case())?;
    reference.import(WeightFormat::Timm, "model.safetensors", &["method.mae.encoder.heads=11"])?;
    interop::export(WeightFormat::Timm, &path_text(reference.at("ours")), &reference.at("out"))?;
    assert_outputs_match(&reference.call("load", "timm", &reference.at("out"), None)?, &reference.ours()?, 2);
    let error =
        interop::export(WeightFormat::Transformers, &path_text(reference.at("ours")), &reference.at("no")).unwrap_err();
    assert!(error.code == ExitCode::Usage && error.message.contains("squares"), "{error}");
    assert!(!reference.at("no").exists());
    Ok(())
}

fn export_and_import_round_trip_bit_for_bit() -> Outcome {
    let reference = Reference::make("transformers", color_case())?;
    reference.import(WeightFormat::Transformers, "", &[])?;
    let before = checkpoint::load_from_url(&path_text(reference.at("ours")))?;
    for (format, kind) in
        [(WeightFormat::Mae, "mae"), (WeightFormat::Transformers, "transformers"), (WeightFormat::Timm, "timm")]
    {
        let out = reference.at(kind);
        let second = path_text(reference.at(&format!("{kind}-again")));
        interop::export(format, &path_text(reference.at("ours")), &out)?;
        let order = ImportOptions { format, from: out, out: second.clone(), config: None, overrides: vec![] };
        interop::import(&order)?;
        let after = checkpoint::load_from_url(&second)?;
        for (name, tensor) in before.tensors.iter().filter(|(name, _)| kind != "timm" || name.contains("encoder")) {
            assert!(after.tensors.get(name) == Some(tensor), "{name} changed in a round trip through {kind}");
        }
        let shape = |loaded| weights::saved_config(loaded).map(|c| c.to_json()["method"]["mae"]["encoder"].clone());
        assert_eq!(shape(&before)?, shape(&after)?);
    }
    Ok(())
}

fn positions_are_interpolated_for_another_grid() -> Outcome {
    let reference = Reference::make("transformers", grayscale_case())?;
    let output = reference.import(WeightFormat::Transformers, "", &["input.height=28", "input.width=36"])?;
    assert!(mentions(&output, "for 5 × 5 patches; they are interpolated to 7 × 9"), "{output:?}");
    interop::export(WeightFormat::Timm, &path_text(reference.at("ours")), &reference.at("out"))?;
    let out = read(&reference.at("out/model.safetensors"))?;
    assert_eq!(out["pos_embed"].size(), [1, 64, 24]);
    let source = path_text(reference.at("theirs/model.safetensors"));
    let expected = reference.at("wanted.safetensors");
    let name = "vit.embeddings.position_embeddings";
    oracle("interpolate.py", &[&source, name, "5", "5", "7", "9", &path_text(expected.clone())])?;
    let difference = (&out["pos_embed"] - &read(&expected)?["positions"]).abs().max().double_value(&[]);
    assert!(difference < 1e-5, "off by {difference}");
    // The config records it, and a training from it must too.
    let loaded = checkpoint::load_from_url(&path_text(reference.at("ours")))?;
    assert_eq!(weights::saved_config(&loaded)?.to_json()["method"]["mae"]["trained_grid"], serde_json::json!([5, 5]));
    Ok(())
}

/// The loss of the first step is that of the imported weights, on one rank and on two; the commands open the imported
/// run.
fn training_continues_from_imported_weights_on_any_number_of_ranks() -> Outcome {
    let mut config = tiny_config();
    config["train"]["steps"] = 4.into();
    let source = Run::new(&config);
    source.finish(0, &[]);
    let folder = tempfile::tempdir()?;
    let at = |name: &str| path_text(folder.path().join(name));
    let run_occlude = |words: &[&str]| -> Result<String, Failed> {
        let output = occlude_command(words).output()?;
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let trained = path_text(source.folder());
    let text = run_occlude(&["export", "--format", "mae", "--checkpoint", &trained, "--out", &at("mae")])?;
    assert!(text.contains("MaskedAutoencoderViT"), "{text}");
    let text = run_occlude(&["import", "--format", "mae", "--from", &at("mae"), "--out", &at("run")])?;
    assert!(text.contains("a checkpoint of step 0"), "{text}");

    // Mean and standard deviation are the same by default, and the recipe differs.
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
        assert!((loss / fresh.lines()[0].loss - 1.0).abs() > 1e-3, "the weights are newly initialized");
    }
    let train = path_text(shared_data().join("train"));
    let test = path_text(shared_data().join("test"));
    let words = ["evaluate", "--checkpoint", &at("run"), "--train", &train, "--test", &test, "--protocol", "knn"];
    assert!(run_occlude(&words)?.contains("\"step\":0"));
    let image = path_text(shared_data().join("in/stripes-0/000.png"));
    run_occlude(&["reconstruct", "--checkpoint", &at("run"), "--input", &image, "--out", &at("pictures")])?;
    Ok(())
}

fn mismatched_tensors_are_rejected_by_name_and_nothing_is_written() -> Outcome {
    let reference = Reference::make("transformers", grayscale_case())?;
    let full = read(&reference.at("theirs/model.safetensors"))?;
    let refused = |format: WeightFormat, file: &str, set: &[&str], expected: &[&str]| {
        let error = reference.import(format, file, set).expect_err("refused");
        assert_eq!(error.code, ExitCode::Usage, "{error}");
        for word in expected {
            assert!(error.message.contains(word), "no {word:?} in: {error}");
        }
        assert!(!reference.at("ours").exists(), "something was written");
    };
    let save = |name: &str, change: &dyn Fn(&mut Tensors)| {
        let mut tensors: Tensors = full.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        change(&mut tensors);
        write(&reference.at("theirs").join(name), &tensors.into_iter().collect::<Vec<_>>())
    };
    let format = WeightFormat::Transformers;
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
    refused(WeightFormat::Mae, "model.safetensors", &[], &["--format transformers"]);
    refused(format, "absent", &[], &["absent"]);
    std::fs::write(reference.at("theirs/text"), "hello, world")?;
    refused(format, "text", &[], &["neither a safetensors file nor a PyTorch checkpoint"]);
    reference.import(format, "model.safetensors", &[])?;
    let error = reference.import(format, "model.safetensors", &[]).expect_err("it exists already");
    assert!(error.message.contains("holds checkpoints already"), "{error}");
    interop::export(format, &path_text(reference.at("ours")), &reference.at("out"))?;
    let error =
        interop::export(format, &path_text(reference.at("ours")), &reference.at("out")).expect_err("it exists already");
    assert!(error.message.contains("exists already"), "{error}");
    Ok(())
}
