//! VideoMAE's weights in and out, judged by outputs: the same clips through transformers' model and through ours.

use crate::refuse::text;
use crate::support::{Outcome, Tensors, normal, oracle, read, write};
use libtest_mimic::Failed;
use occlude::fault::{Code, Fault};
use occlude::grid::Grid;
use occlude::method::Batch;
use occlude::op::shuffle::Origin;
use occlude::part::mask;
use occlude::run::exchange::{self, Format, Order};
use occlude::run::{checkpoint, state};
use serde_json::{Value, json};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor, no_grad};
use tempfile::TempDir;

crate::trials![
    weights_say_here_what_they_say_there_under_either_name,
    an_export_says_there_what_it_says_here_and_comes_back_the_same,
    what_files_do_not_say_is_taken_by_custom_and_told,
    other_methods_and_formats_are_refused_with_the_right_one,
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

/// A model of odd sizes in the files of either maker, what it is asked, and what transformers' code answers.
struct Theirs {
    place: TempDir,
    answer: Tensors,
}

fn batch() -> Batch {
    let origins: Vec<Origin> = (0..BATCH).map(|id| Origin { id, epoch: 0, repeat: 0 }).collect();
    Batch::new(normal(4, &[BATCH as i64, 3, 6, 30, 30]), &origins, 0)
}

impl Theirs {
    fn make() -> Result<Theirs, Failed> {
        let mut theirs = Theirs { place: tempfile::tempdir()?, answer: Tensors::new() };
        let grid = Grid { frames: 3, rows: 5, cols: 5, channels: 3, patch_frames: 2, patch: 6 };
        let drop = mask::tube(&grid, RATIO, 0, &batch().origins).drop;
        write(&theirs.at("request"), &[("input".into(), batch().pixels), ("drop".into(), drop)])?;
        theirs.answer = theirs.ask(&["make", &text(theirs.place.path())], Some(&numbers().to_string()))?;
        Ok(theirs)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn ask(&self, what: &[&str], then: Option<&str>) -> Result<Tensors, Failed> {
        let (request, reply) = (text(self.at("request")), text(self.at("reply")));
        let words: Vec<&str> = what.iter().copied().chain([request.as_str(), &reply]).chain(then).collect();
        oracle("videomae.py", &words)?;
        read(&self.at("reply"))
    }

    fn import(&self, format: Format, file: &str, out: &str, set: &[&str]) -> Result<Vec<String>, Fault> {
        let set = set.iter().map(ToString::to_string).collect();
        exchange::import(&Order { format, from: self.at(file), out: text(self.at(out)), config: None, set })
    }

    /// What our model answers from a checkpoint.
    fn ours(&self, run: &str) -> Result<Tensors, Failed> {
        let loaded = checkpoint::open(&text(self.at(run)))?;
        let (_, method, flat) = state::model(&loaded, Device::Cpu)?;
        let features = no_grad(|| method.features(&flat.leaves, &batch()))?;
        assert!(features.class.is_none());
        let sum = no_grad(|| method.loss(&flat.leaves, &batch()))?.remove(0).sum.reshape([1]);
        let loss = sum / method.counts(BATCH as i64)[0].1;
        Ok([("mean".to_owned(), features.mean), ("loss".to_owned(), loss)].into())
    }
}

#[track_caller]
fn agree(theirs: &Tensors, ours: &Tensors) {
    assert_eq!(theirs.len(), 2, "{:?}", theirs.keys());
    for (name, theirs) in theirs {
        let off = (theirs - &ours[name]).norm().double_value(&[]) / theirs.norm().double_value(&[]);
        assert!(off <= 1e-5, "{name} is off by {off:e}");
    }
}

fn said(lines: &[String], what: &str) -> bool {
    lines.iter().any(|line| line.contains(what))
}

const HEADS: [&str; 2] = ["method.videomae.encoder.heads=5", "method.videomae.decoder.heads=3"];
const MASK: &str = "method.videomae.mask.ratio=0.75";

fn weights_say_here_what_they_say_there_under_either_name() -> Outcome {
    let theirs = Theirs::make()?;
    let told = theirs.import(Format::Transformers, "transformers", "one", &[MASK])?;
    agree(&theirs.answer, &theirs.ours("one")?);
    assert!(!said(&told, "nothing says") && !said(&told, "freshly drawn"), "{told:?}");
    assert!(said(&told, "last normalisation"), "{told:?}");
    let told = theirs.import(Format::Videomae, "checkpoint-3.pth", "two", &HEADS)?;
    agree(&theirs.answer, &theirs.ours("two")?);
    assert!(!said(&told, "nothing says"), "its arguments were not heard: {told:?}");
    let [one, two] = ["one", "two"].map(|run| checkpoint::open(&text(theirs.at(run))));
    let (one, two) = (one?, two?);
    assert_eq!(one.tensors, two.tensors, "the two files hold the same");
    let config = state::config(&one)?.resolved();
    assert_eq!(config["input"]["frames"], 6);
    assert_eq!(config["method"], state::config(&two)?.resolved()["method"]);
    Ok(())
}

fn an_export_says_there_what_it_says_here_and_comes_back_the_same() -> Outcome {
    let theirs = Theirs::make()?;
    theirs.import(Format::Transformers, "transformers", "run", &[MASK])?;
    let (ours, before) = (theirs.ours("run")?, checkpoint::open(&text(theirs.at("run")))?);
    for (format, kind) in [(Format::Videomae, "official"), (Format::Transformers, "transformers")] {
        let (out, again) = (theirs.at(&format!("{kind}-out")), format!("{kind}-again"));
        let told = exchange::export(format, &text(theirs.at("run")), &out)?;
        assert!(said(&told, &format!("{}", out.display())) && !said(&told, "no place"), "{told:?}");
        agree(&theirs.ask(&["load", kind, &text(&out)], None)?, &ours);
        let told = theirs.import(format, &format!("{kind}-out"), &again, &[])?;
        assert!(!said(&told, "nothing says"), "{told:?}");
        let after = checkpoint::open(&text(theirs.at(&again)))?;
        assert_eq!(before.tensors, after.tensors, "changed on the way through {kind}");
        let (before, after) = (state::config(&before)?, state::config(&after)?);
        assert_eq!(before.input.grid()?, after.input.grid()?, "through {kind}");
        assert_eq!(before.input.scale()?, after.input.scale()?, "through {kind}");
        assert_eq!(before.method, after.method, "through {kind}");
    }
    Ok(())
}

fn what_files_do_not_say_is_taken_by_custom_and_told() -> Outcome {
    let theirs = Theirs::make()?;
    let size = ["input.frames=6", "input.height=30", "input.width=30", MASK, "method.videomae.target.normalize=false"];
    let told = theirs.import(Format::Videomae, "plain.safetensors", "run", &[&HEADS[..], &size].concat())?;
    agree(&theirs.answer, &theirs.ours("run")?);
    assert!(!said(&told, "what the model saw") && !said(&told, "heads"), "{told:?}");
    // Custom has 224 pixels, which cubes of 6 do not divide and cubes of 8 do.
    let fault = theirs.import(Format::Videomae, "plain.safetensors", "no", &[]).expect_err("224 / 6");
    assert!(fault.message.contains("input.height is 224"), "{fault}");
    let mut tensors = read(&theirs.at("plain.safetensors"))?;
    let float = (Kind::Float, Device::Cpu);
    for (name, shape) in [
        ("encoder.patch_embed.proj.weight", &[60, 3, 2, 8, 8][..]),
        ("decoder.head.weight", &[384, 36]),
        ("decoder.head.bias", &[384]),
    ] {
        tensors.insert(name.into(), Tensor::zeros(shape, float));
    }
    write(&theirs.at("eight"), &tensors.into_iter().collect::<Vec<_>>())?;
    let heads = ["method.videomae.encoder.heads=3", "method.videomae.decoder.heads=2"];
    let told = theirs.import(Format::Videomae, "eight", "large", &heads)?;
    assert!(said(&told, "taken as 16 frames of 224 × 224 pixels") && said(&told, "taken as so"), "{told:?}");
    Ok(())
}

fn other_methods_and_formats_are_refused_with_the_right_one() -> Outcome {
    let theirs = Theirs::make()?;
    let refused = |told: Result<Vec<String>, Fault>, words: &str| {
        let fault = told.expect_err("refused");
        assert!(fault.code == Code::Usage && fault.message.contains(words), "no {words:?} in: {fault}");
    };
    refused(theirs.import(Format::Mae, "plain.safetensors", "no", &[]), "--format videomae");
    refused(theirs.import(Format::Timm, "transformers", "no", &[]), "--format transformers");
    theirs.import(Format::Transformers, "transformers", "run", &[])?;
    for format in [Format::Mae, Format::Timm] {
        refused(
            exchange::export(format, &text(theirs.at("run")), &theirs.at("no")),
            "has no such model; use --format transformers or videomae",
        );
    }
    let image = crate::support::root().join("configs/tiny/mae.json");
    let order = Order {
        format: Format::Videomae,
        from: theirs.at("plain.safetensors"),
        out: text(theirs.at("no")),
        config: Some(image),
        set: vec![],
    };
    refused(exchange::import(&order), "of method.videomae, and the config has method.mae");
    assert!(!theirs.at("no").exists());
    Ok(())
}
