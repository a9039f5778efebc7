//! What a step has to do: floating-point operations against PyTorch's counter on other people's models, and the roofline
//! against an independent count.

use crate::support::{Outcome, oracle};
use occlude::config::Config;
use occlude::method::catalog;
use occlude::part::work::How;
use occlude::run::roof::peak::data_sheet;
use serde_json::{Value, json};
use tch::Kind;

crate::trials![
    operations_are_those_that_pytorch_counts_less_what_is_not_computed,
    pairs_cost_what_pytorch_counts_less_what_is_not_computed,
    the_published_shapes_cost_what_was_worked_out_by_hand,
    windows_cost_what_their_tokens_do,
    the_roofline_lies_where_an_independent_count_has_it,
    a_data_sheet_is_found_by_the_devices_name,
];

/// A model's numbers, by which both sides are built.
struct Case {
    method: &'static str,
    side: i64,
    channels: i64,
    frames: i64,
    patch: i64,
    patch_frames: i64,
    ratio: f64,
    /// Width, depth, heads.
    encoder: [i64; 3],
    decoder: [i64; 3],
}

const MAE_B: Case = Case {
    method: "mae",
    side: 224,
    channels: 3,
    frames: 1,
    patch: 16,
    patch_frames: 1,
    ratio: 0.75,
    encoder: [768, 12, 12],
    decoder: [512, 8, 16],
};

fn cases() -> [Case; 5] {
    [
        MAE_B,
        Case { encoder: [1024, 24, 16], ..MAE_B },
        Case { encoder: [1280, 32, 16], patch: 14, ..MAE_B },
        Case { side: 40, channels: 1, patch: 8, ratio: 0.6, encoder: [60, 3, 5], decoder: [36, 2, 3], ..MAE_B },
        Case {
            method: "videomae",
            side: 48,
            frames: 6,
            patch: 12,
            patch_frames: 2,
            encoder: [48, 3, 4],
            decoder: [36, 2, 3],
            ..MAE_B
        },
    ]
}

impl Case {
    fn config(&self) -> Config {
        let shape = |[width, depth, heads]: [i64; 3]| json!({"width": width, "depth": depth, "heads": heads});
        let method = json!({
            "encoder": shape(self.encoder), "decoder": shape(self.decoder), "mask": {"ratio": self.ratio},
        });
        let config = json!({
            "about": {"title": "a test", "source": "none", "measured": "never"},
            "input": {
                "channels": self.channels, "frames": self.frames, "height": self.side, "width": self.side,
                "patch": self.patch, "patch_frames": self.patch_frames,
            },
            "method": {self.method: method}, "optim": {"lr": 0.001}, "data": {"train": "none"},
            "train": {"steps": 1, "global_batch": 1},
        });
        Config::parse(&config.to_string(), &[]).expect("a config")
    }

    /// Tokens, those kept, and values of a patch.
    fn tokens(&self) -> [i64; 3] {
        let (places, slots) = ((self.side / self.patch).pow(2), self.frames / self.patch_frames);
        let kept = match self.method {
            "mae" => (places as f64 * (1.0 - self.ratio)) as i64,
            _ => slots * (places - (places as f64 * self.ratio) as i64),
        };
        [places * slots, kept, self.patch * self.patch * self.patch_frames * self.channels]
    }

    fn theirs(&self) -> Value {
        let ([width, depth, heads], [inner, layers, parts]) = (self.encoder, self.decoder);
        let [tokens, kept, _] = self.tokens();
        let mut numbers = json!({
            "model": if self.method == "mae" { "vit_mae" } else { "videomae" }, "hidden": tokens - kept,
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "intermediate_size": 4 * width, "image_size": self.side, "patch_size": self.patch,
            "num_channels": self.channels, "decoder_hidden_size": inner, "decoder_num_hidden_layers": layers,
            "decoder_num_attention_heads": parts, "decoder_intermediate_size": 4 * inner,
        });
        let own = match self.method {
            "mae" => json!({"mask_ratio": self.ratio, "norm_pix_loss": true}),
            _ => json!({"num_frames": self.frames, "tubelet_size": self.patch_frames, "norm_pix_loss": false}),
        };
        numbers.as_object_mut().expect("an object").extend(own.as_object().expect("an object").clone());
        numbers
    }

    /// What they compute and we do not, forward and backward: hidden patches are embedded (their input wants no
    /// gradient), and the visible tokens go through the last decoder block behind its keys and values, and in MAE
    /// through the head.
    fn beyond(&self) -> [f64; 2] {
        let [tokens, kept, values] = self.tokens();
        let ([width, ..], [inner, ..]) = (self.encoder, self.decoder);
        let class = i64::from(self.method == "mae");
        let (seen, all) = (kept + class, tokens + class);
        let embed = (2 * (tokens - kept) * values * width) as f64;
        let head = if class > 0 { 2 * seen * inner * values } else { 0 };
        let block = (2 * seen * 9 * inner * inner + 4 * seen * all * inner + head) as f64;
        [embed + block, embed + 2.0 * block]
    }
}

fn operations_are_those_that_pytorch_counts_less_what_is_not_computed() -> Outcome {
    let cases = cases();
    let asked: Vec<Value> = cases.iter().map(Case::theirs).collect();
    let told = oracle("flops.py", &[&json!(asked).to_string()])?;
    assert_eq!(told.lines().count(), cases.len(), "{told}");
    for (case, line) in cases.iter().zip(told.lines()) {
        let config = case.config();
        let ours = config.method.build(&config.input)?.work(1).flops();
        let theirs: Value = serde_json::from_str(line)?;
        for (way, name) in ["forward", "backward"].into_iter().enumerate() {
            let counted = theirs[name].as_f64().expect("a number");
            let what = format!("{} {:?}, {name}", case.method, case.encoder);
            assert_eq!(ours[way] + case.beyond()[way], counted, "{what}: theirs, and ours with what we leave out");
        }
    }
    Ok(())
}

/// Two towers, and the batch that each pair is compared with. They embed hidden patches too.
fn pairs_cost_what_pytorch_counts_less_what_is_not_computed() -> Outcome {
    const PAIRS: u64 = 5;
    let (sides, patch, length, embed, vocabulary) = ([40, 64], 8, 9, 20, 50);
    for (ratio, [width, depth, heads], [words, layers, parts]) in
        [(0.5, [48, 3, 4], [36, 2, 3]), (0.75, [64, 1, 2], [40, 3, 5])]
    {
        let shape = |width: i64, depth: i64, heads: i64| json!({"width": width, "depth": depth, "heads": heads});
        let method = json!({
            "encoder": shape(width, depth, heads), "embed": embed, "mask": {"ratio": ratio},
            "text": {"shape": shape(words, layers, parts), "vocabulary": vocabulary, "length": length},
        });
        let input = json!({"height": sides[0], "width": sides[1], "patch": patch});
        let method: catalog::Config = serde_json::from_value(json!({"flip": method}))?;
        let ours = method.build(&serde_json::from_value(input)?)?.work(PAIRS).flops();
        let theirs = json!([{
            "model": "clip", "pairs": PAIRS, "embed": embed,
            "vision": {
                "layers": depth, "width": width, "head_width": width / heads, "patch_size": patch,
                "image_size": sides, "patch_dropout": ratio,
            },
            "text": {
                "context_length": length, "vocab_size": vocabulary, "width": words, "heads": parts, "layers": layers,
            },
        }]);
        let told: Value = serde_json::from_str(&oracle("flops.py", &[&theirs.to_string()])?)?;
        let tokens = sides[0] / patch * (sides[1] / patch);
        let hidden = tokens - (tokens as f64 * (1.0 - ratio)) as i64;
        let embedded = (2 * hidden * 3 * patch * patch * width) as f64;
        for (way, name) in ["forward", "backward"].into_iter().enumerate() {
            let counted = told[name].as_f64().expect("a number") / PAIRS as f64;
            assert_eq!(ours[way] + embedded, counted, "{name} of {width} and {words}: theirs, and ours with the rest");
        }
    }
    Ok(())
}

/// GFLOP of a training step by the independent count: with work left out as here, but for the queries of visible tokens in
/// the last decoder block, which our packed projection computes; and tokens of those.
const BY_HAND: [(&str, f64, i64, i64); 5] = [
    (include_str!("../configs/mae_vit_b16_in1k.json"), 57.1, 50, 512),
    (include_str!("../configs/mae_vit_l16_in1k.json"), 122.8, 50, 512),
    (include_str!("../configs/mae_vit_h14_in1k.json"), 289.2, 65, 512),
    (include_str!("../configs/videomae_vit_b16_k400.json"), 199.7, 160, 384),
    // A pair by itself, and no decoder.
    (include_str!("../configs/flip_vit_l16_laion.json"), 199.0, 0, 0),
];

/// Floating-point operations of Audio-MAE's windows, counted layer by layer.
fn windows_cost_what_their_tokens_do() -> Outcome {
    let text = include_str!("../configs/audio_mae_vit_b16_audioset.json");
    let config = Config::parse(text, &[])?;
    let work = config.method.build(&config.input)?.work(1);
    let [all, kept, hidden] = [512.0, 102.0, 410.0];
    let linear = |rows: f64, inputs: f64, outputs: f64| 2.0 * rows * inputs * outputs;
    let attention = |queries: f64, keys: f64, width: f64| 4.0 * queries * keys * width;
    let encoder = 12.0 * (linear(kept + 1.0, 768.0, 12.0 * 768.0) + attention(kept + 1.0, kept + 1.0, 768.0));
    let embed = linear(kept, 256.0, 768.0);
    let half = |rows: f64| linear(rows, 512.0, 9.0 * 512.0);
    let blocks =
        16.0 * (linear(all, 512.0, 3.0 * 512.0) + attention(all, 16.0, 512.0)) + 15.0 * half(all) + half(hidden);
    let ends = linear(kept, 768.0, 512.0) + linear(hidden, 512.0, 256.0);
    let forward = encoder + embed + blocks + ends;
    assert_eq!(work.flops(), [forward, 2.0 * forward - embed]);
    // An independent count has 17.9 and 52.0 GFLOP for all tokens of all layers, and 208.1 for a step that leaves out what
    // nobody reads.
    let giga = work.training_flops() / 1e9;
    assert!((giga - 208.1).abs() < 1.5, "{giga:.1} GFLOP");
    Ok(())
}

fn the_published_shapes_cost_what_was_worked_out_by_hand() -> Outcome {
    for (text, giga, seen, inner) in BY_HAND {
        let config = Config::parse(text, &[])?;
        let queries = 3.0 * (2 * seen * inner * inner) as f64;
        let ours = (config.method.build(&config.input)?.work(1).training_flops() - queries) / 1e9;
        assert!((ours - giga).abs() < 0.051, "{}: {ours:.2} GFLOP, by hand {giga}", config.about.title);
    }
    Ok(())
}

/// On a device of 788 TFLOP/s and 4.3 TB/s: between all operations by themselves and all of them fused, GELU too, which
/// our kernels leave to itself.
fn the_roofline_lies_where_an_independent_count_has_it() -> Outcome {
    let bounds = [
        (512, 9165.0, 11602.0),
        (256, 4662.0, 5629.0),
        (128, 2119.0, 2471.0),
        (64, 2646.0, 3226.0),
        (256, 3037.0, 3574.0),
    ];
    for ((text, ..), (batch, eager, fused)) in BY_HAND.into_iter().zip(bounds) {
        let config = Config::parse(text, &[])?;
        let work = config.method.build(&config.input)?.work(batch);
        let rate = |fused: bool| {
            let kernels = work.kernels(&How { batch: batch as i64, element: 2, fused });
            let seconds: f64 =
                kernels.iter().flatten().map(|load| (load.flops / 788e12).max(load.bytes / 4.3e12)).sum();
            batch as f64 / seconds
        };
        let (ours, plain) = (rate(true), rate(false));
        assert!(eager < ours && ours < fused, "{}: {ours:.0} samples/s", config.about.title);
        assert!(plain < ours, "{}: unfused {plain:.0}, fused {ours:.0}", config.about.title);
    }
    Ok(())
}

fn a_data_sheet_is_found_by_the_devices_name() -> Outcome {
    let bf16 = |name| data_sheet(name, Kind::BFloat16);
    assert_eq!(bf16("NVIDIA H200"), Some(989.5e12));
    assert_eq!(bf16("NVIDIA H100 80GB HBM3"), Some(989.5e12));
    assert_eq!(bf16("NVIDIA H100 PCIe"), Some(756.5e12));
    assert_eq!(bf16("NVIDIA A100-SXM4-80GB"), Some(312e12));
    assert_eq!(data_sheet("NVIDIA A100-PCIE-40GB", Kind::Float), Some(19.5e12));
    assert_eq!([bf16("NVIDIA RTX A1000"), bf16("NVIDIA GeForce RTX 4090"), bf16("CPU, 2 threads")], [None; 3]);
    Ok(())
}
