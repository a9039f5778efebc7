//! Tests of import and export of VideoMAE by outputs: the same clips through the model of transformers and through
//! ours.

use crate::support::method_ext::{MethodExt, sample};
use crate::support::{Outcome, Tensors, normal, oracle, path_text, read, write};
use libtest_mimic::Failed;
use occlude::checkpoint;
use occlude::checkpoint::weights::{self, SavedModel};
use occlude::error::{Error, ExitCode};
use occlude::grid::Grid;
use occlude::interop;
use occlude::interop::{ImportOptions, WeightFormat};
use occlude::method::Batch;
use occlude::op::shuffle::SampleKey;
use occlude::part::mask::TubeMask;
use serde_json::{Value, json};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor, no_grad};
use tempfile::TempDir;

crate::trials![
    imported_weights_give_the_same_outputs_under_either_naming,
    exported_weights_give_the_same_outputs_and_round_trip,
    missing_settings_take_defaults_with_a_notice,
    wrong_methods_and_formats_are_rejected_with_the_right_one,
];

const BATCH: u64 = 3;
const RATIO: f64 = 0.75;

fn numbers() -> Value {
    json!({
        "image_size": 30, "patch_size": 6, "num_channels": 3, "num_frames": 6, "tubelet_size": 2, "norm_pix_loss": false,
        "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 240,
        "decoder_hidden_size": 36, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 144,
    })
}

/// A model of odd sizes in both file formats, its inputs, and the outputs of transformers.
struct Reference {
    place: TempDir,
    answer: Tensors,
}

fn batch() -> Batch {
    let keys: Vec<SampleKey> = (0..BATCH).map(|id| SampleKey { id, epoch: 0, repeat: 0 }).collect();
    Batch::new(normal(4, &[BATCH as i64, 3, 6, 30, 30]), &keys, 0)
}

impl Reference {
    fn make() -> Result<Reference, Failed> {
        let mut reference = Reference { place: tempfile::tempdir()?, answer: Tensors::new() };
        let grid = Grid { frames: 3, rows: 5, cols: 5, channels: 3, patch_frames: 2, patch: 6 };
        let drop = sample(&TubeMask { ratio: RATIO }, &grid, &batch()).drop;
        write(&reference.at("request"), &[("input".into(), batch().views.remove(0)), ("drop".into(), drop)])?;
        reference.answer =
            reference.ask(&["make", &path_text(reference.place.path())], Some(&numbers().to_string()))?;
        Ok(reference)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn ask(&self, label: &[&str], then: Option<&str>) -> Result<Tensors, Failed> {
        let request = path_text(self.at("request"));
        let reply = path_text(self.at("reply"));
        let words: Vec<&str> = label.iter().copied().chain([request.as_str(), &reply]).chain(then).collect();
        oracle("videomae.py", &words)?;
        read(&self.at("reply"))
    }

    fn import(&self, format: WeightFormat, file: &str, out: &str, set: &[&str]) -> Result<Vec<String>, Error> {
        let overrides = set.iter().map(ToString::to_string).collect();
        interop::import(&ImportOptions {
            format,
            from: self.at(file),
            out: path_text(self.at(out)),
            config: None,
            overrides,
        })
    }

    /// Returns the outputs of our model from a checkpoint.
    fn ours(&self, run: &str) -> Result<Tensors, Failed> {
        let loaded = checkpoint::load_from_url(&path_text(self.at(run)))?;
        let SavedModel { method, flat, .. } = weights::load_model(&loaded, Device::Cpu)?;
        let features = no_grad(|| method.encode(&flat.leaves, &batch()))?;
        assert!(features.class.is_none());
        let sum = no_grad(|| method.terms(&flat.leaves, &batch()))?.remove(0).sum.reshape([1]);
        let loss = sum / method.denominators(&batch())?.hidden_tokens;
        Ok([("mean".to_owned(), features.mean), ("loss".to_owned(), loss)].into())
    }
}

#[track_caller]
fn assert_outputs_match(reference: &Tensors, ours: &Tensors) {
    assert_eq!(reference.len(), 2, "{:?}", reference.keys());
    for (name, reference) in reference {
        let difference = (reference - &ours[name]).norm().double_value(&[]) / reference.norm().double_value(&[]);
        assert!(difference <= 1e-5, "{name} is off by {difference:e}");
    }
}

fn has_line(lines: &[String], label: &str) -> bool {
    lines.iter().any(|line| line.contains(label))
}

const HEADS: [&str; 2] = ["method.videomae.encoder.heads=5", "method.videomae.decoder.heads=3"];
const MASK: &str = "method.videomae.mask.ratio=0.75";

fn imported_weights_give_the_same_outputs_under_either_naming() -> Outcome {
    let reference = Reference::make()?;
    let output = reference.import(WeightFormat::Transformers, "transformers", "one", &[MASK])?;
    assert_outputs_match(&reference.answer, &reference.ours("one")?);
    assert!(!has_line(&output, "nothing says") && !has_line(&output, "newly initialized"), "{output:?}");
    assert!(has_line(&output, "last normalization"), "{output:?}");
    let output = reference.import(WeightFormat::Videomae, "checkpoint-3.pth", "two", &HEADS)?;
    assert_outputs_match(&reference.answer, &reference.ours("two")?);
    assert!(!has_line(&output, "nothing says"), "its arguments were ignored: {output:?}");
    let [one, two] = ["one", "two"].map(|run| checkpoint::load_from_url(&path_text(reference.at(run))));
    let one = one?;
    let two = two?;
    assert_eq!(one.tensors, two.tensors, "the two files hold the same");
    let config = weights::saved_config(&one)?.to_json();
    assert_eq!(config["input"]["frames"], 6);
    assert_eq!(config["method"], weights::saved_config(&two)?.to_json()["method"]);
    Ok(())
}

fn exported_weights_give_the_same_outputs_and_round_trip() -> Outcome {
    let reference = Reference::make()?;
    reference.import(WeightFormat::Transformers, "transformers", "run", &[MASK])?;
    let ours = reference.ours("run")?;
    let before = checkpoint::load_from_url(&path_text(reference.at("run")))?;
    for (format, kind) in [(WeightFormat::Videomae, "official"), (WeightFormat::Transformers, "transformers")] {
        let out = reference.at(&format!("{kind}-out"));
        let second = format!("{kind}-again");
        let output = interop::export(format, &path_text(reference.at("run")), &out)?;
        assert!(has_line(&output, &format!("{}", out.display())) && !has_line(&output, "no place"), "{output:?}");
        assert_outputs_match(&reference.ask(&["load", kind, &path_text(&out)], None)?, &ours);
        let output = reference.import(format, &format!("{kind}-out"), &second, &[])?;
        assert!(!has_line(&output, "nothing says"), "{output:?}");
        let after = checkpoint::load_from_url(&path_text(reference.at(&second)))?;
        assert_eq!(before.tensors, after.tensors, "changed in a round trip through {kind}");
        let before = weights::saved_config(&before)?;
        let after = weights::saved_config(&after)?;
        assert_eq!(before.input.grid()?, after.input.grid()?, "through {kind}");
        assert_eq!(before.input.mean_std()?, after.input.mean_std()?, "through {kind}");
        assert_eq!(before.method, after.method, "through {kind}");
    }
    Ok(())
}

fn missing_settings_take_defaults_with_a_notice() -> Outcome {
    let reference = Reference::make()?;
    let size = ["input.frames=6", "input.height=30", "input.width=30", MASK, "method.videomae.target.normalize=false"];
    let output = reference.import(WeightFormat::Videomae, "plain.safetensors", "run", &[&HEADS[..], &size].concat())?;
    assert_outputs_match(&reference.answer, &reference.ours("run")?);
    assert!(!has_line(&output, "what the model saw") && !has_line(&output, "heads"), "{output:?}");
    // The default is 224 pixels, which cubes of 6 do not divide and cubes of 8 do.
    let error = reference.import(WeightFormat::Videomae, "plain.safetensors", "no", &[]).expect_err("224 / 6");
    assert!(error.message.contains("input.height is 224"), "{error}");
    let mut tensors = read(&reference.at("plain.safetensors"))?;
    let float = (Kind::Float, Device::Cpu);
    for (name, shape) in [
        ("encoder.patch_embed.proj.weight", &[60, 3, 2, 8, 8][..]),
        ("decoder.head.weight", &[384, 36]),
        ("decoder.head.bias", &[384]),
    ] {
        tensors.insert(name.into(), Tensor::zeros(shape, float));
    }
    write(&reference.at("eight"), &tensors.into_iter().collect::<Vec<_>>())?;
    let heads = ["method.videomae.encoder.heads=3", "method.videomae.decoder.heads=2"];
    let output = reference.import(WeightFormat::Videomae, "eight", "large", &heads)?;
    assert!(
        has_line(&output, "assumed 16 frames of 224 × 224 pixels") && has_line(&output, "assumed yes"),
        "{output:?}"
    );
    Ok(())
}

fn wrong_methods_and_formats_are_rejected_with_the_right_one() -> Outcome {
    let reference = Reference::make()?;
    let refused = |output: Result<Vec<String>, Error>, words: &str| {
        let error = output.expect_err("refused");
        assert!(error.code == ExitCode::Usage && error.message.contains(words), "no {words:?} in: {error}");
    };
    refused(reference.import(WeightFormat::Mae, "plain.safetensors", "no", &[]), "--format videomae");
    refused(reference.import(WeightFormat::Timm, "transformers", "no", &[]), "--format transformers");
    reference.import(WeightFormat::Transformers, "transformers", "run", &[])?;
    for format in [WeightFormat::Mae, WeightFormat::Timm] {
        refused(
            interop::export(format, &path_text(reference.at("run")), &reference.at("no")),
            "has no such model; use --format transformers or videomae",
        );
    }
    let image = crate::support::root().join("configs/tiny/mae.json");
    let order = ImportOptions {
        format: WeightFormat::Videomae,
        from: reference.at("plain.safetensors"),
        out: path_text(reference.at("no")),
        config: Some(image),
        overrides: vec![],
    };
    refused(interop::import(&order), "of method.videomae, and the config has method.mae");
    assert!(!reference.at("no").exists());
    Ok(())
}
