//! transformers' `ViTMAEForPreTraining`. Three sets of names are about: that of 4.x, which every version reads and which
//! is therefore written; that of 5.x in memory; and what 5.x saves, which is 4.x but for the decoder's blocks.

use super::about::{About, numbers};
use super::file::Sheet;
use super::mae::CUSTOM;
use super::model::Model;
use super::names::{Layers, Names, Pairs, Settings};
use crate::config::Config;
use crate::fault::{Fault, Result};
use crate::op::layer_norm::EPS;
use crate::part::view::crop::Interpolation;
use serde_json::{Value, json};

const OUTSIDE: Pairs = &[
    ("encoder.cls_token", "vit.embeddings.cls_token"),
    ("encoder.embed", "vit.embeddings.patch_embeddings.projection"),
    ("encoder.norm", "vit.layernorm"),
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.embed", "decoder.decoder_embed"),
    ("decoder.norm", "decoder.decoder_norm"),
    ("decoder.pred", "decoder.decoder_pred"),
];

const POSITIONS: Pairs = &[("encoder", "vit.embeddings.position_embeddings"), ("decoder", "decoder.decoder_pos_embed")];

const LOAD: &str = "ViTMAEForPreTraining.from_pretrained(\"FOLDER\")";

const LAYERS_4: Layers = &[
    ("norm1", &["layernorm_before"]),
    ("attn.qkv", &["attention.attention.query", "attention.attention.key", "attention.attention.value"]),
    ("attn.proj", &["attention.output.dense"]),
    ("norm2", &["layernorm_after"]),
    ("mlp.fc1", &["intermediate.dense"]),
    ("mlp.fc2", &["output.dense"]),
];

const LAYERS_5: Layers = &[
    ("norm1", &["layernorm_before"]),
    ("attn.qkv", &["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
    ("attn.proj", &["attention.o_proj"]),
    ("norm2", &["layernorm_after"]),
    ("mlp.fc1", &["mlp.fc1"]),
    ("mlp.fc2", &["mlp.fc2"]),
];

pub const NAMES: Names = Names {
    title: "transformers' (4.x)",
    custom: &CUSTOM,
    cubes: false,
    outside: OUTSIDE,
    blocks: &[("encoder.blocks.", "vit.encoder.layer."), ("decoder.blocks.", "decoder.decoder_layers.")],
    layers: LAYERS_4,
    positions: POSITIONS,
    about,
    settings,
    load: LOAD,
};

pub const SAVED_BY_5: Names = Names {
    title: "transformers' (5.x, saved)",
    custom: &CUSTOM,
    cubes: false,
    outside: OUTSIDE,
    blocks: &[("encoder.blocks.", "vit.encoder.layer."), ("decoder.blocks.", "decoder.decoder_encoder.layer.")],
    layers: LAYERS_4,
    positions: POSITIONS,
    about,
    settings,
    load: LOAD,
};

pub const IN_MEMORY_5: Names = Names {
    title: "transformers' (5.x, in memory)",
    custom: &CUSTOM,
    cubes: false,
    outside: OUTSIDE,
    blocks: &[("encoder.blocks.", "vit.layers."), ("decoder.blocks.", "decoder.decoder_layers.")],
    layers: LAYERS_5,
    positions: POSITIONS,
    about,
    settings,
    load: LOAD,
};

/// Refuses a `config.json` of a model that cannot run here; else what the user should know.
pub fn fits_here(config: &Value, model_type: &str) -> Result<Vec<String>> {
    let other = |key: &str, wanted: &str| {
        Err(Fault::usage(format!("config.json beside the file says {key} = {}; this model has {wanted}", config[key])))
    };
    if config["model_type"].as_str().is_some_and(|found| found != model_type) {
        return other("model_type", &format!("{model_type:?} alone"));
    }
    if config["hidden_act"].as_str().is_some_and(|found| found != "gelu") {
        return other("hidden_act", "\"gelu\"");
    }
    if config["qkv_bias"] == Value::Bool(false) {
        return other("qkv_bias", "biases");
    }
    match config["layer_norm_eps"].as_f64().filter(|&eps| eps != EPS) {
        Some(eps) if eps > 10.0 * EPS => other("layer_norm_eps", &format!("{EPS:e}")),
        Some(eps) => Ok(vec![format!(
            "config.json says layer_norm_eps {eps:e}; here it is {EPS:e}, as in the official code: outputs differ where a \
             token hardly varies"
        )]),
        None => Ok(Vec::new()),
    }
}

/// What `config.json` and `preprocessor_config.json` say, or why the model is none that can run here.
fn about(sheet: &Sheet) -> Result<About> {
    let (config, preprocessor) = (&sheet.config, &sheet.preprocessor);
    Ok(About {
        heads: config["num_attention_heads"].as_i64(),
        decoder_heads: config["decoder_num_attention_heads"].as_i64(),
        normalize: config["norm_pix_loss"].as_bool(),
        ratio: config["mask_ratio"].as_f64(),
        mean: numbers(&preprocessor["image_mean"]),
        std: numbers(&preprocessor["image_std"]),
        notes: fits_here(config, "vit_mae")?,
        ..About::default()
    })
}

fn settings(config: &Config, model: &Model) -> Result<Settings> {
    let input = &config.input;
    let mut value = encoder_and_decoder(model);
    let own = json!({
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae",
        "image_size": input.height, "patch_size": input.patch, "num_channels": input.channels,
    });
    value.as_object_mut().expect("an object").extend(own.as_object().expect("an object").clone());
    Ok(vec![("config.json", value), ("preprocessor_config.json", preprocessor(config)?)])
}

/// The keys of `config.json` that all of transformers' masked autoencoders share.
pub fn encoder_and_decoder(model: &Model) -> Value {
    let (encoder, decoder) = (&model.encoder, &model.decoder);
    json!({
        "hidden_size": encoder.width, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_ratio * encoder.width,
        "decoder_hidden_size": decoder.width, "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads, "decoder_intermediate_size": decoder.mlp_ratio * decoder.width,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": true,
        "layer_norm_eps": EPS, "initializer_range": 0.02, "mask_ratio": model.ratio,
        "norm_pix_loss": model.normalize, "torch_dtype": "float32",
    })
}

/// `preprocessor_config.json`, with the statistics that the model was trained with: transformers' own default is 0.5.
fn preprocessor(config: &Config) -> Result<Value> {
    let (mean, std) = config.input.scale()?;
    let size = json!({"height": config.input.height, "width": config.input.width});
    Ok(json!({
        "image_processor_type": "ViTImageProcessor", "do_resize": true, "size": size, "resample": resample(config),
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true, "image_mean": mean, "image_std": std,
    }))
}

/// Pillow's number of the kernel that pixels are resized with.
pub fn resample(config: &Config) -> i64 {
    match config.view.crop.interpolation {
        Interpolation::Bilinear => 2,
        Interpolation::Bicubic => 3,
    }
}
