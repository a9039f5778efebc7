//! transformers' `ViTMAEForPreTraining`. Three sets of names are about: that of 4.x, which every version reads and which
//! is therefore written; that of 5.x in memory; and what 5.x saves, which is 4.x but for the decoder's blocks.

use super::about::{About, numbers};
use super::names::{Names, Pairs};
use crate::config::Config;
use crate::fault::{Fault, Result};
use crate::method::mae;
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

const LAYERS_4: &[(&str, &[&str])] = &[
    ("norm1", &["layernorm_before"]),
    ("attn.qkv", &["attention.attention.query", "attention.attention.key", "attention.attention.value"]),
    ("attn.proj", &["attention.output.dense"]),
    ("norm2", &["layernorm_after"]),
    ("mlp.fc1", &["intermediate.dense"]),
    ("mlp.fc2", &["output.dense"]),
];

const LAYERS_5: &[(&str, &[&str])] = &[
    ("norm1", &["layernorm_before"]),
    ("attn.qkv", &["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
    ("attn.proj", &["attention.o_proj"]),
    ("norm2", &["layernorm_after"]),
    ("mlp.fc1", &["mlp.fc1"]),
    ("mlp.fc2", &["mlp.fc2"]),
];

pub const NAMES: Names = Names {
    title: "transformers' (4.x)",
    outside: OUTSIDE,
    blocks: &[("encoder.blocks.", "vit.encoder.layer."), ("decoder.blocks.", "decoder.decoder_layers.")],
    layers: LAYERS_4,
    positions: POSITIONS,
};

pub const SAVED_BY_5: Names = Names {
    title: "transformers' (5.x, saved)",
    outside: OUTSIDE,
    blocks: &[("encoder.blocks.", "vit.encoder.layer."), ("decoder.blocks.", "decoder.decoder_encoder.layer.")],
    layers: LAYERS_4,
    positions: POSITIONS,
};

pub const IN_MEMORY_5: Names = Names {
    title: "transformers' (5.x, in memory)",
    outside: OUTSIDE,
    blocks: &[("encoder.blocks.", "vit.layers."), ("decoder.blocks.", "decoder.decoder_layers.")],
    layers: LAYERS_5,
    positions: POSITIONS,
};

/// What `config.json` and `preprocessor_config.json` say, or why the model is none that can run here.
pub fn about(config: &Value, preprocessor: &Value) -> Result<About> {
    let other = |key: &str, wanted: &str| {
        Err(Fault::usage(format!("config.json beside the file says {key} = {}; this model has {wanted}", config[key])))
    };
    if config["model_type"].as_str().is_some_and(|found| found != "vit_mae") {
        return other("model_type", "\"vit_mae\" alone");
    }
    if config["hidden_act"].as_str().is_some_and(|found| found != "gelu") {
        return other("hidden_act", "\"gelu\"");
    }
    if config["qkv_bias"] == Value::Bool(false) {
        return other("qkv_bias", "biases");
    }
    let mut notes = Vec::new();
    if let Some(eps) = config["layer_norm_eps"].as_f64().filter(|&eps| eps != EPS) {
        if eps > 10.0 * EPS {
            return other("layer_norm_eps", &format!("{EPS:e}"));
        }
        notes.push(format!(
            "config.json says layer_norm_eps {eps:e}; here it is {EPS:e}, as in the official code: outputs differ \
             where a token hardly varies"
        ));
    }
    Ok(About {
        heads: config["num_attention_heads"].as_i64(),
        decoder_heads: config["decoder_num_attention_heads"].as_i64(),
        normalize: config["norm_pix_loss"].as_bool(),
        ratio: config["mask_ratio"].as_f64(),
        mean: numbers(&preprocessor["image_mean"]),
        std: numbers(&preprocessor["image_std"]),
        notes,
    })
}

/// `config.json` of a `ViTMAEForPreTraining`.
pub fn settings(config: &Config, method: &mae::Config) -> Value {
    let (input, encoder, decoder) = (&config.input, &method.encoder, &method.decoder);
    json!({
        "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae",
        "image_size": input.height, "patch_size": input.patch, "num_channels": input.channels,
        "hidden_size": encoder.width, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_ratio * encoder.width,
        "decoder_hidden_size": decoder.width, "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads, "decoder_intermediate_size": decoder.mlp_ratio * decoder.width,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": true,
        "layer_norm_eps": EPS, "initializer_range": 0.02, "mask_ratio": method.mask.ratio,
        "norm_pix_loss": method.target.normalize, "torch_dtype": "float32",
    })
}

/// `preprocessor_config.json`, with the statistics that the model was trained with: transformers' own default is 0.5.
pub fn preprocessor(config: &Config) -> Result<Value> {
    let (mean, std) = config.input.scale()?;
    // Pillow's number of the kernel.
    let resample = match config.view.crop.interpolation {
        Interpolation::Bilinear => 2,
        Interpolation::Bicubic => 3,
    };
    let size = json!({"height": config.input.height, "width": config.input.width});
    Ok(json!({
        "image_processor_type": "ViTImageProcessor", "do_resize": true, "size": size, "resample": resample,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true, "image_mean": mean, "image_std": std,
    }))
}
