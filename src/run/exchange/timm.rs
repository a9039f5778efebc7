//! timm's `VisionTransformer`: the encoder alone. An exported folder is what `timm.create_model("local-dir:FOLDER",
//! pretrained=True)` opens.

use super::about::{About, numbers};
use super::mae::CUSTOM;
use super::model::Model;
use super::names::{Layers, Names};
use crate::config::Config;
use crate::fault::Result;
use serde_json::{Value, json};

/// A block's layers are called alike here, in timm and in the official MAE repository, which took timm's.
pub const LAYERS: Layers = &[
    ("norm1", &["norm1"]),
    ("attn.qkv", &["attn.qkv"]),
    ("attn.proj", &["attn.proj"]),
    ("norm2", &["norm2"]),
    ("mlp.fc1", &["mlp.fc1"]),
    ("mlp.fc2", &["mlp.fc2"]),
];

pub const NAMES: Names = Names {
    title: "timm's",
    custom: &CUSTOM,
    cubes: false,
    outside: &[("encoder.cls_token", "cls_token"), ("encoder.embed", "patch_embed.proj"), ("encoder.norm", "norm")],
    blocks: &[("encoder.blocks.", "blocks.")],
    layers: LAYERS,
    positions: &[("encoder", "pos_embed")],
    about: |sheet| Ok(about(&sheet.config)),
    settings: |config, model| Ok(vec![("config.json", settings(config, model)?)]),
    load: "timm.create_model(\"local-dir:FOLDER\", pretrained=True)",
};

/// What timm's `config.json` says. An architecture without arguments has the heads of its name.
fn about(config: &Value) -> About {
    let statistics = &config["pretrained_cfg"];
    About {
        heads: config["model_args"]["num_heads"].as_i64(),
        mean: numbers(&statistics["mean"]),
        std: numbers(&statistics["std"]),
        ..About::default()
    }
}

/// `config.json`: a registered architecture with every argument written out, so that any size loads.
fn settings(config: &Config, model: &Model) -> Result<Value> {
    let (input, encoder) = (&config.input, &model.encoder);
    let (mean, std) = input.scale()?;
    Ok(json!({
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "token",
        "model_args": {
            "img_size": [input.height, input.width], "patch_size": input.patch, "in_chans": input.channels,
            "embed_dim": encoder.width, "depth": encoder.depth, "num_heads": encoder.heads,
            "mlp_ratio": encoder.mlp_ratio, "num_classes": 0, "global_pool": "token",
        },
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [input.channels, input.height, input.width], "fixed_input_size": true,
            "interpolation": config.view.crop.interpolation, "crop_pct": config.view.center, "mean": mean, "std": std,
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }))
}
