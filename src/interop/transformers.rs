//! transformers' `ViTMAEForPreTraining`. There are three sets of names: that of 4.x, which every version reads and
//! which is therefore written; that of 5.x in memory; and the files of 5.x, which differ from 4.x in the decoder's
//! blocks.

use super::mae::DEFAULTS;
use super::metadata::{SourceMetadata, number_list};
use super::model::ModelSettings;
use super::name_map::{BlockLayers, NameMap, NamePairs, SidecarFiles};
use super::state_dict::StateDict;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::op::layer_norm::EPS;
use crate::view::crop::Interpolation;
use serde_json::{Value, json};

const TOP_LEVEL: NamePairs = &[
    ("encoder.cls_token", "vit.embeddings.cls_token"),
    ("encoder.embed", "vit.embeddings.patch_embeddings.projection"),
    ("encoder.norm", "vit.layernorm"),
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.embed", "decoder.decoder_embed"),
    ("decoder.norm", "decoder.decoder_norm"),
    ("decoder.pred", "decoder.decoder_pred"),
];

const POSITION_TABLES: NamePairs =
    &[("encoder", "vit.embeddings.position_embeddings"), ("decoder", "decoder.decoder_pos_embed")];

const LOAD_SNIPPET: &str = "ViTMAEForPreTraining.from_pretrained(\"FOLDER\")";

const BLOCK_LAYERS_4: BlockLayers = &[
    ("norm1", &["layernorm_before"]),
    ("attn.qkv", &["attention.attention.query", "attention.attention.key", "attention.attention.value"]),
    ("attn.proj", &["attention.output.dense"]),
    ("norm2", &["layernorm_after"]),
    ("mlp.fc1", &["intermediate.dense"]),
    ("mlp.fc2", &["output.dense"]),
];

const BLOCK_LAYERS_5: BlockLayers = &[
    ("norm1", &["layernorm_before"]),
    ("attn.qkv", &["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
    ("attn.proj", &["attention.o_proj"]),
    ("norm2", &["layernorm_after"]),
    ("mlp.fc1", &["mlp.fc1"]),
    ("mlp.fc2", &["mlp.fc2"]),
];

/// The names of transformers 4.x.
pub const NAMES: NameMap = NameMap {
    title: "transformers' (4.x)",
    defaults: &DEFAULTS,
    conv3d: false,
    top_level: TOP_LEVEL,
    block_prefixes: &[("encoder.blocks.", "vit.encoder.layer."), ("decoder.blocks.", "decoder.decoder_layers.")],
    block_layers: BLOCK_LAYERS_4,
    position_tables: POSITION_TABLES,
    read_metadata,
    sidecar_files,
    load_snippet: LOAD_SNIPPET,
};

/// The names in files saved by transformers 5.x.
pub const NAMES_5_SAVED: NameMap = NameMap {
    title: "transformers' (5.x, saved)",
    block_prefixes: &[("encoder.blocks.", "vit.encoder.layer."), ("decoder.blocks.", "decoder.decoder_encoder.layer.")],
    ..NAMES
};

/// The names of transformers 5.x in memory (`state_dict()`).
pub const NAMES_5_IN_MEMORY: NameMap = NameMap {
    title: "transformers' (5.x, in memory)",
    block_prefixes: &[("encoder.blocks.", "vit.layers."), ("decoder.blocks.", "decoder.decoder_layers.")],
    block_layers: BLOCK_LAYERS_5,
    ..NAMES
};

/// Checks that a `config.json` describes a model that can be represented here, and returns notes for the user.
pub fn check_config(config: &Value, model_type: &str) -> Result<Vec<String>> {
    let mismatch = |key: &str, wanted: &str| {
        Err(Error::usage(format!(
            "config.json in the folder of the weights says {key} = {}; this model needs {wanted}",
            config[key]
        )))
    };
    if config["model_type"].as_str().is_some_and(|found| found != model_type) {
        return mismatch("model_type", &format!("{model_type:?}"));
    }
    if config["hidden_act"].as_str().is_some_and(|found| found != "gelu") {
        return mismatch("hidden_act", "\"gelu\"");
    }
    if config["qkv_bias"] == Value::Bool(false) {
        return mismatch("qkv_bias", "biases");
    }
    match config["layer_norm_eps"].as_f64().filter(|&eps| eps != EPS) {
        Some(eps) if eps > 10.0 * EPS => mismatch("layer_norm_eps", &format!("{EPS:e}")),
        Some(eps) => Ok(vec![format!(
            "config.json says layer_norm_eps {eps:e}; here it is {EPS:e}, as in the official code: outputs differ for \
             tokens of very low variance"
        )]),
        None => Ok(Vec::new()),
    }
}

/// Reads `config.json` and `preprocessor_config.json`.
fn read_metadata(weights: &StateDict) -> Result<SourceMetadata> {
    let config = &weights.config;
    let preprocessor = &weights.preprocessor;
    Ok(SourceMetadata {
        heads: config["num_attention_heads"].as_i64(),
        decoder_heads: config["decoder_num_attention_heads"].as_i64(),
        normalize_target: config["norm_pix_loss"].as_bool(),
        mask_ratio: config["mask_ratio"].as_f64(),
        mean: number_list(&preprocessor["image_mean"]),
        std: number_list(&preprocessor["image_std"]),
        notes: check_config(config, "vit_mae")?,
        ..SourceMetadata::default()
    })
}

fn sidecar_files(config: &Config, model: &ModelSettings) -> Result<SidecarFiles> {
    let input = &config.input;
    let mut value = shared_config(model);
    value["architectures"] = json!(["ViTMAEForPreTraining"]);
    value["model_type"] = json!("vit_mae");
    value["image_size"] = json!(input.height);
    value["patch_size"] = json!(input.patch);
    value["num_channels"] = json!(input.channels);
    Ok(vec![("config.json", value), ("preprocessor_config.json", preprocessor_config(config)?)])
}

/// Builds the keys of `config.json` that all masked autoencoders of transformers share.
pub fn shared_config(model: &ModelSettings) -> Value {
    let encoder = &model.encoder;
    let decoder = &model.decoder;
    json!({
        "hidden_size": encoder.width, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_ratio * encoder.width,
        "decoder_hidden_size": decoder.width, "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads, "decoder_intermediate_size": decoder.mlp_ratio * decoder.width,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": true,
        "layer_norm_eps": EPS, "initializer_range": 0.02, "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.normalize_target, "torch_dtype": "float32",
    })
}

/// Builds `preprocessor_config.json` with the pixel statistics of the training; the default of transformers is 0.5.
fn preprocessor_config(config: &Config) -> Result<Value> {
    let (mean, std) = config.input.mean_std()?;
    Ok(json!({
        "image_processor_type": "ViTImageProcessor", "do_resize": true,
        "size": {"height": config.input.height, "width": config.input.width}, "resample": pillow_resample(config),
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true, "image_mean": mean, "image_std": std,
    }))
}

/// Returns Pillow's number for the interpolation of the config's view.
pub fn pillow_resample(config: &Config) -> i64 {
    match config.view.crop.interpolation {
        Interpolation::Bilinear => 2,
        Interpolation::Bicubic => 3,
    }
}
