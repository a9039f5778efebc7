//! timm's `VisionTransformer`: the encoder alone. `timm.create_model("local-dir:FOLDER", pretrained=True)` opens an
//! exported folder.

use super::mae::{BLOCK_LAYERS, DEFAULTS};
use super::metadata::{SourceMetadata, number_list};
use super::model::ModelSettings;
use super::name_map::NameMap;
use crate::config::Config;
use crate::error::Result;
use serde_json::{Value, json};

/// The names of `VisionTransformer`.
pub const NAMES: NameMap = NameMap {
    title: "timm's",
    defaults: &DEFAULTS,
    conv3d: false,
    top_level: &[("encoder.cls_token", "cls_token"), ("encoder.embed", "patch_embed.proj"), ("encoder.norm", "norm")],
    block_prefixes: &[("encoder.blocks.", "blocks.")],
    block_layers: BLOCK_LAYERS,
    position_tables: &[("encoder", "pos_embed")],
    read_metadata: |weights| Ok(read_metadata(&weights.config)),
    sidecar_files: |config, model| Ok(vec![("config.json", timm_config(config, model)?)]),
    load_snippet: "timm.create_model(\"local-dir:FOLDER\", pretrained=True)",
};

/// Reads timm's `config.json`.
fn read_metadata(config: &Value) -> SourceMetadata {
    let pretrained = &config["pretrained_cfg"];
    SourceMetadata {
        heads: config["model_args"]["num_heads"].as_i64(),
        mean: number_list(&pretrained["mean"]),
        std: number_list(&pretrained["std"]),
        ..SourceMetadata::default()
    }
}

/// Builds `config.json`: a registered architecture with every argument overridden, so that any size loads.
fn timm_config(config: &Config, model: &ModelSettings) -> Result<Value> {
    let input = &config.input;
    let encoder = &model.encoder;
    let (mean, std) = input.mean_std()?;
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
            "interpolation": config.view.crop.interpolation, "crop_pct": config.view.center_crop, "mean": mean,
            "std": std, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }))
}
