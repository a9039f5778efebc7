//! Tests of the cost of a step: floating-point operations against the counter of PyTorch on other implementations, and
//! the roofline against an independent count.

use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, oracle};
use occlude::config::Config;
use occlude::error::Error;
use occlude::method::catalog;
use occlude::part::cost::{Execution, ModelCost};
use occlude::timing::peak::data_sheet_flops;
use serde_json::{Value, json};
use tch::Kind;

crate::trials![
    flops_match_the_pytorch_counter_minus_skipped_work,
    dual_encoder_flops_match_the_pytorch_counter_minus_skipped_work,
    flops_of_published_shapes_match_a_manual_count,
    window_attention_costs_follow_its_tokens,
    costs_of_heads_and_second_decoders_follow_their_layers,
    costs_of_colors_and_contrasts_follow_their_layers,
    the_roofline_matches_an_independent_count,
    data_sheets_are_found_by_device_name,
];

/// Numbers of a model, from which both sides are built.
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

    /// Returns the tokens, the kept tokens, and the values of a patch.
    fn tokens(&self) -> [i64; 3] {
        let positions = (self.side / self.patch).pow(2);
        let slots = self.frames / self.patch_frames;
        let kept = match self.method {
            "mae" => (positions as f64 * (1.0 - self.ratio)) as i64,
            _ => slots * (positions - (positions as f64 * self.ratio) as i64),
        };
        [positions * slots, kept, self.patch * self.patch * self.patch_frames * self.channels]
    }

    fn reference_config(&self) -> Value {
        let [width, depth, heads] = self.encoder;
        let [inner, layers, parts] = self.decoder;
        let [tokens, kept, _] = self.tokens();
        let mut numbers = json!({
            "model": if self.method == "mae" { "vit_mae" } else { "videomae" }, "hidden": tokens - kept,
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "intermediate_size": 4 * width, "image_size": self.side, "patch_size": self.patch,
            "num_channels": self.channels, "decoder_hidden_size": inner, "decoder_num_hidden_layers": layers,
            "decoder_num_attention_heads": parts, "decoder_intermediate_size": 4 * inner,
        });
        let local = match self.method {
            "mae" => json!({"mask_ratio": self.ratio, "norm_pix_loss": true}),
            _ => json!({"num_frames": self.frames, "tubelet_size": self.patch_frames, "norm_pix_loss": false}),
        };
        numbers.as_object_mut().expect("an object").extend(local.as_object().expect("an object").clone());
        numbers
    }

    /// Returns the forward and backward operations that PyTorch counts and we skip: embedding hidden patches (their
    /// input needs no gradient), and passing visible tokens through the last decoder block after its keys and values,
    /// and in MAE through the head.
    fn skipped_flops(&self) -> [f64; 2] {
        let [tokens, kept, values] = self.tokens();
        let [width, ..] = self.encoder;
        let [inner, ..] = self.decoder;
        let class = i64::from(self.method == "mae");
        let visible = kept + class;
        let all = tokens + class;
        let embed = (2 * (tokens - kept) * values * width) as f64;
        let head = if class > 0 { 2 * visible * inner * values } else { 0 };
        let block = (2 * visible * 9 * inner * inner + 4 * visible * all * inner + head) as f64;
        [embed + block, embed + 2.0 * block]
    }
}

/// Returns the cost of a training step on one sample that fills the grid.
fn model_cost(config: &Config, global_batch: u64) -> Result<ModelCost, Error> {
    let method = config.method.build(&config.input)?;
    Ok(method.cost(&method.grid(), global_batch))
}

fn flops_match_the_pytorch_counter_minus_skipped_work() -> Outcome {
    let cases = cases();
    let request: Vec<Value> = cases.iter().map(Case::reference_config).collect();
    let output = oracle("flops.py", &[&json!(request).to_string()])?;
    assert_eq!(output.lines().count(), cases.len(), "{output}");
    for (case, line) in cases.iter().zip(output.lines()) {
        let config = case.config();
        let ours = model_cost(&config, 1)?.flops();
        let theirs: Value = serde_json::from_str(line)?;
        for (way, name) in ["forward", "backward"].into_iter().enumerate() {
            let counted = theirs[name].as_f64().expect("a number");
            let label = format!("{} {:?}, {name}", case.method, case.encoder);
            assert_eq!(
                ours[way] + case.skipped_flops()[way],
                counted,
                "{label}: the reference, and ours with the skipped work"
            );
        }
    }
    Ok(())
}

/// Two towers, and the batch with which each pair is compared. open_clip embeds hidden patches too.
fn dual_encoder_flops_match_the_pytorch_counter_minus_skipped_work() -> Outcome {
    const PAIRS: u64 = 5;
    let sides = [40, 64];
    let patch = 8;
    let length = 9;
    let embed = 20;
    let vocabulary = 50;
    for (ratio, [width, depth, heads], [words, layers, parts]) in
        [(0.5, [48, 3, 4], [36, 2, 3]), (0.75, [64, 1, 2], [40, 3, 5])]
    {
        let shape = |width: i64, depth: i64, heads: i64| json!({"width": width, "depth": depth, "heads": heads});
        let method = json!({
            "encoder": shape(width, depth, heads), "embed_dim": embed, "mask": {"ratio": ratio},
            "text": {"shape": shape(words, layers, parts), "vocab_size": vocabulary, "context_length": length},
        });
        let input = json!({"height": sides[0], "width": sides[1], "patch": patch});
        let method: catalog::Config = serde_json::from_value(json!({"flip": method}))?;
        let ours = {
            let method = method.build(&serde_json::from_value(input)?)?;
            method.cost(&method.grid(), PAIRS).flops()
        };
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
        let output: Value = serde_json::from_str(&oracle("flops.py", &[&theirs.to_string()])?)?;
        let tokens = sides[0] / patch * (sides[1] / patch);
        let hidden = tokens - (tokens as f64 * (1.0 - ratio)) as i64;
        let embedded = (2 * hidden * 3 * patch * patch * width) as f64;
        for (way, name) in ["forward", "backward"].into_iter().enumerate() {
            let counted = output[name].as_f64().expect("a number") / PAIRS as f64;
            assert_eq!(
                ours[way] + embedded,
                counted,
                "{name} of {width} and {words}: the reference, and ours with the skipped work"
            );
        }
    }
    Ok(())
}

/// GFLOP of a training step by an independent count, without the skipped work except for the queries of visible tokens
/// in the last decoder block, which our packed projection computes; and the number of those tokens and the decoder
/// width.
const BY_HAND: [(&str, f64, i64, i64); 5] = [
    (include_str!("../../configs/mae_vit_b16_in1k.json"), 57.1, 50, 512),
    (include_str!("../../configs/mae_vit_l16_in1k.json"), 122.8, 50, 512),
    (include_str!("../../configs/mae_vit_h14_in1k.json"), 289.2, 65, 512),
    (include_str!("../../configs/videomae_vit_b16_k400.json"), 199.7, 160, 384),
    // A pair by itself, and no decoder.
    (include_str!("../../configs/flip_vit_l16_laion.json"), 199.0, 0, 0),
];

/// Counts the floating-point operations of the windows of Audio-MAE layer by layer.
fn window_attention_costs_follow_its_tokens() -> Outcome {
    let text = include_str!("../../configs/audiomae_vit_b16_audioset.json");
    let config = Config::parse(text, &[])?;
    let cost = model_cost(&config, 1)?;
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
    assert_eq!(cost.flops(), [forward, 2.0 * forward - embed]);
    // An independent count has 17.9 and 52.0 GFLOP for all tokens of all layers, and 208.1 for a step without unused
    // work.
    let giga = cost.training_flops() / 1e9;
    assert!((giga - 208.1).abs() < 1.5, "{giga:.1} GFLOP");
    Ok(())
}

/// Counts the forward pass of a stack of blocks, of which the last computes `outputs` tokens after attention.
fn stack_flops(tokens: f64, outputs: f64, width: f64, depth: f64) -> f64 {
    let block = |outputs: f64| 2.0 * width * width * (3.0 * tokens + 9.0 * outputs) + 4.0 * outputs * tokens * width;
    (depth - 1.0) * block(tokens) + block(outputs)
}

/// Counts layer by layer what methods have beside an encoder and a decoder of pixels.
fn costs_of_heads_and_second_decoders_follow_their_layers() -> Outcome {
    let linear = |rows: f64, inputs: f64, outputs: f64| 2.0 * rows * inputs * outputs;
    let forward = |config: &str| -> Result<[f64; 2], libtest_mimic::Failed> {
        let text = std::fs::read_to_string(crate::support::root().join("configs").join(config))?;
        Ok(model_cost(&Config::parse(&text, &[])?, 1)?.flops())
    };
    // SupMAE: 49 visible and 147 hidden tokens, one block in the decoder, a head of two layers.
    let encoder = linear(49.0, 768.0, 768.0) + stack_flops(50.0, 50.0, 768.0, 12.0);
    let decoder = |inputs: f64, outputs: f64, depth: f64| {
        linear(inputs, 768.0, 512.0) + stack_flops(197.0, outputs, 512.0, depth) + linear(outputs, 512.0, 768.0)
    };
    let head = linear(1.0, 768.0, 3072.0) + linear(1.0, 3072.0, 1000.0);
    let expected = encoder + decoder(50.0, 147.0, 1.0) + head;
    let data = linear(49.0, 768.0, 768.0);
    assert_eq!(forward("supmae_vit_b16_in1k.json")?, [expected, 2.0 * expected - data]);
    // R-MAE: the complement has 147 visible tokens, which its decoder predicts.
    let second = linear(147.0, 768.0, 768.0) + stack_flops(148.0, 148.0, 768.0, 12.0) + decoder(148.0, 147.0, 8.0);
    let expected = encoder + decoder(50.0, 147.0, 8.0) + second;
    let data = linear(196.0, 768.0, 768.0);
    assert_eq!(forward("rmae_vit_b16_in1k.json")?, [expected, 2.0 * expected - data]);
    // MaskFeat: 118 visible tokens are embedded, all are encoded, 78 hidden ones are predicted.
    let expected = linear(118.0, 768.0, 768.0) + stack_flops(197.0, 78.0, 768.0, 12.0) + linear(78.0, 768.0, 108.0);
    let data = linear(118.0, 768.0, 768.0);
    assert_eq!(forward("maskfeat_vit_b16_in1k.json")?, [expected, 2.0 * expected - data]);
    // MFM: all tokens, of which the class token is not predicted.
    let expected = linear(196.0, 768.0, 768.0) + stack_flops(197.0, 196.0, 768.0, 12.0) + linear(196.0, 768.0, 768.0);
    let data = linear(196.0, 768.0, 768.0);
    assert_eq!(forward("mfm_vit_b16_in1k.json")?, [expected, 2.0 * expected - data]);
    Ok(())
}

/// Counts iGPT's blocks over all pixels, and C-MAE's two views, heads and comparisons.
fn costs_of_colors_and_contrasts_follow_their_layers() -> Outcome {
    let linear = |rows: f64, inputs: f64, outputs: f64| 2.0 * rows * inputs * outputs;
    let flops = |config: &str| -> Result<[f64; 2], libtest_mimic::Failed> {
        let text = std::fs::read_to_string(crate::support::root().join("configs").join(config))?;
        Ok(model_cost(&Config::parse(&text, &[])?, 1)?.flops())
    };
    for (config, tokens, width, depth) in
        [("igpt_s_in1k_32.json", 1024.0, 512.0, 24.0), ("igpt_l_in1k_48.json", 2304.0, 1536.0, 48.0)]
    {
        let expected = stack_flops(tokens, tokens, width, depth) + linear(tokens, width, 512.0);
        assert_eq!(flops(config)?, [expected, 2.0 * expected]);
    }
    // 49 patches in one view and 147 in the other, 197 tokens in the two blocks of each, and a pair by itself.
    let view = |visible: f64| {
        let encoder = linear(visible, 768.0, 768.0) + stack_flops(visible + 1.0, visible + 1.0, 768.0, 12.0);
        let filler = linear(visible + 1.0, 768.0, 512.0) + stack_flops(197.0, 196.0, 512.0, 2.0);
        let head = linear(1.0, 512.0, 4096.0) + linear(1.0, 4096.0, 4096.0) + linear(1.0, 4096.0, 256.0);
        encoder + filler + head + linear(1.0, 256.0, 1.0)
    };
    let expected = view(49.0) + view(147.0);
    assert_eq!(flops("contrastive_mae_vit_b16_in1k.json")?, [expected, 2.0 * expected - linear(196.0, 768.0, 768.0)]);
    Ok(())
}

fn flops_of_published_shapes_match_a_manual_count() -> Outcome {
    for (text, giga, visible, inner) in BY_HAND {
        let config = Config::parse(text, &[])?;
        let queries = 3.0 * (2 * visible * inner * inner) as f64;
        let ours = (model_cost(&config, 1)?.training_flops() - queries) / 1e9;
        assert!((ours - giga).abs() < 0.051, "{}: {ours:.2} GFLOP, by hand {giga}", config.about.title);
    }
    Ok(())
}

/// On a device with 788 TFLOP/s and 4.3 TB/s: between all operations separate and all of them fused, including GELU,
/// which our kernels do not fuse.
fn the_roofline_matches_an_independent_count() -> Outcome {
    let bounds = [
        (512, 9165.0, 11602.0),
        (256, 4662.0, 5629.0),
        (128, 2119.0, 2471.0),
        (64, 2646.0, 3226.0),
        (256, 3037.0, 3574.0),
    ];
    for ((text, ..), (batch, eager, fused)) in BY_HAND.into_iter().zip(bounds) {
        let config = Config::parse(text, &[])?;
        let cost = model_cost(&config, batch)?;
        let rate = |fused: bool| {
            let kernels = cost.kernel_costs(&Execution { batch: batch as i64, element_bytes: 2, fused });
            let seconds: f64 =
                kernels.iter().flatten().map(|load| (load.flops / 788e12).max(load.bytes / 4.3e12)).sum();
            batch as f64 / seconds
        };
        let ours = rate(true);
        let plain = rate(false);
        assert!(eager < ours && ours < fused, "{}: {ours:.0} samples/s", config.about.title);
        assert!(plain < ours, "{}: unfused {plain:.0}, fused {ours:.0}", config.about.title);
    }
    Ok(())
}

fn data_sheets_are_found_by_device_name() -> Outcome {
    let bf16 = |name| data_sheet_flops(name, Kind::BFloat16);
    assert_eq!(bf16("NVIDIA H200"), Some(989.5e12));
    assert_eq!(bf16("NVIDIA H100 80GB HBM3"), Some(989.5e12));
    assert_eq!(bf16("NVIDIA H100 PCIe"), Some(756.5e12));
    assert_eq!(bf16("NVIDIA A100-SXM4-80GB"), Some(312e12));
    assert_eq!(data_sheet_flops("NVIDIA A100-PCIE-40GB", Kind::Float), Some(19.5e12));
    assert_eq!([bf16("NVIDIA RTX A1000"), bf16("NVIDIA GeForce RTX 4090"), bf16("CPU, 2 threads")], [None; 3]);
    Ok(())
}
