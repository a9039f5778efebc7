//! VideoMAE: the names of the official repository and of transformers' `VideoMAEForPreTraining`. Neither stores its
//! positions, which run through all tokens, so frames, height and width come from the sidecar files or from the
//! defaults.

use super::metadata::{SourceMetadata, number_list};
use super::model::{Defaults, ModelSettings, VIDEOMAE};
use super::name_map::{BlockLayers, NameMap};
use super::state_dict::StateDict;
use super::transformers::{check_config, pillow_resample, shared_config};
use crate::config::Config;
use crate::error::Result;
use serde_json::{Value, json};

/// The defaults of the official repository.
pub const DEFAULTS: Defaults = Defaults {
    method: VIDEOMAE,
    recipe: include_str!("../../configs/videomae_vit_b16_k400.json"),
    paper: "Tong et al. 2022",
    heads: |part, width| match (part, width) {
        ("encoder", 1280) => 16,
        ("decoder", 640) => 8,
        _ => (width / 64).max(1),
    },
    normalize_target: true,
    image_size: 224,
    frames: 16,
};

const BLOCK_LAYERS: BlockLayers = &[
    ("norm1", &["norm1"]),
    ("attn.qkv", &["attn.qkv"]),
    ("attn", &["attn"]),
    ("attn.proj", &["attn.proj"]),
    ("norm2", &["norm2"]),
    ("mlp.fc1", &["mlp.fc1"]),
    ("mlp.fc2", &["mlp.fc2"]),
];

/// The names of `PretrainVisionTransformer` (MCG-NJU/VideoMAE).
pub const NAMES: NameMap = NameMap {
    title: "the official VideoMAE repository's",
    defaults: &DEFAULTS,
    conv3d: true,
    top_level: &[
        ("encoder.embed", "encoder.patch_embed.proj"),
        ("encoder.norm", "encoder.norm"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.embed", "encoder_to_decoder"),
        ("decoder.norm", "decoder.norm"),
        ("decoder.pred", "decoder.head"),
    ],
    block_prefixes: &[("encoder.blocks.", "encoder.blocks."), ("decoder.blocks.", "decoder.blocks.")],
    block_layers: BLOCK_LAYERS,
    position_tables: &[],
    read_metadata: |weights| Ok(read_metadata(&weights.config, &weights.train_args)),
    sidecar_files: |config, model| Ok(vec![("config.json", model_arguments(config, model))]),
    load_snippet: "PretrainVisionTransformer(**json.load(open(\"FOLDER/config.json\"))[\"arguments\"], \
                   norm_layer=partial(nn.LayerNorm, eps=1e-6))\
                   .load_state_dict(safetensors.torch.load_file(\"FOLDER/model.safetensors\"))",
};

/// The names of transformers' `VideoMAEForPreTraining`.
pub const TRANSFORMERS_NAMES: NameMap = NameMap {
    title: "transformers' (VideoMAE)",
    defaults: &DEFAULTS,
    conv3d: true,
    top_level: &[
        ("encoder.embed", "videomae.embeddings.patch_embeddings.projection"),
        ("encoder.norm", "videomae.layernorm"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.embed", "encoder_to_decoder"),
        ("decoder.norm", "decoder.norm"),
        ("decoder.pred", "decoder.head"),
    ],
    block_prefixes: &[("encoder.blocks.", "videomae.encoder.layer."), ("decoder.blocks.", "decoder.decoder_layers.")],
    block_layers: &[
        ("norm1", &["layernorm_before"]),
        ("attn.qkv", &["attention.attention.query", "attention.attention.key", "attention.attention.value"]),
        ("attn", &["attention.attention"]),
        ("attn.proj", &["attention.output.dense"]),
        ("norm2", &["layernorm_after"]),
        ("mlp.fc1", &["intermediate.dense"]),
        ("mlp.fc2", &["output.dense"]),
    ],
    position_tables: &[],
    read_metadata: read_transformers_metadata,
    sidecar_files: |config, model| {
        Ok(vec![
            ("config.json", transformers_config(config, model)),
            ("preprocessor_config.json", preprocessor_config(config)?),
        ])
    },
    load_snippet: "VideoMAEForPreTraining.from_pretrained(\"FOLDER\"), then set .decoder.norm.eps = 1e-6, which the \
                   config cannot express",
};

/// Reads `config.json` as `export` writes it, or the arguments that a training saved in its `.pth`.
fn read_metadata(config: &Value, train_args: &Value) -> SourceMetadata {
    let arguments = &config["arguments"];
    SourceMetadata {
        heads: arguments["encoder_num_heads"].as_i64(),
        decoder_heads: arguments["decoder_num_heads"].as_i64(),
        // "normlize" is the repository's spelling.
        normalize_target: config["normlize_target"].as_bool().or(train_args["normlize_target"].as_bool()),
        mask_ratio: config["mask_ratio"].as_f64().or(train_args["mask_ratio"].as_f64()),
        frames: config["num_frames"].as_i64().or(train_args["num_frames"].as_i64()),
        image_size: image_size(&arguments["img_size"]).or(image_size(&train_args["input_size"])),
        ..SourceMetadata::default()
    }
}

/// Builds `config.json`: the arguments of the repository's `PretrainVisionTransformer`, and those of its training
/// script. The repository always uses 16 frames.
fn model_arguments(config: &Config, model: &ModelSettings) -> Value {
    let input = &config.input;
    let encoder = &model.encoder;
    let decoder = &model.decoder;
    json!({
        "model": "PretrainVisionTransformer",
        "arguments": {
            "img_size": [input.height, input.width], "patch_size": input.patch, "tubelet_size": input.patch_frames,
            "encoder_in_chans": input.channels, "encoder_embed_dim": encoder.width, "encoder_depth": encoder.depth,
            "encoder_num_heads": encoder.heads, "encoder_num_classes": 0,
            "decoder_num_classes": input.patch_frames * input.patch * input.patch * input.channels,
            "decoder_embed_dim": decoder.width, "decoder_depth": decoder.depth, "decoder_num_heads": decoder.heads,
            "mlp_ratio": encoder.mlp_ratio, "qkv_bias": true,
        },
        "num_frames": input.frames, "mask_ratio": model.mask_ratio, "normlize_target": model.normalize_target,
    })
}

/// Reads `config.json` and `preprocessor_config.json` of a `VideoMAEForPreTraining`.
fn read_transformers_metadata(weights: &StateDict) -> Result<SourceMetadata> {
    let config = &weights.config;
    let preprocessor = &weights.preprocessor;
    let mut notes = check_config(config, "videomae")?;
    notes.push(
        "transformers adds 1e-5 to the variance in the decoder's last normalization, regardless of its config; here it \
         is 1e-6, as in the official code"
            .into(),
    );
    Ok(SourceMetadata {
        heads: config["num_attention_heads"].as_i64(),
        decoder_heads: config["decoder_num_attention_heads"].as_i64(),
        normalize_target: config["norm_pix_loss"].as_bool(),
        mask_ratio: config["mask_ratio"].as_f64(),
        frames: config["num_frames"].as_i64(),
        image_size: image_size(&config["image_size"]),
        mean: number_list(&preprocessor["image_mean"]),
        std: number_list(&preprocessor["image_std"]),
        notes,
    })
}

/// Builds `config.json` of a `VideoMAEForPreTraining`.
fn transformers_config(config: &Config, model: &ModelSettings) -> Value {
    let input = &config.input;
    let mut value = shared_config(model);
    value["architectures"] = json!(["VideoMAEForPreTraining"]);
    value["model_type"] = json!("videomae");
    value["image_size"] =
        if input.height == input.width { json!(input.height) } else { json!([input.height, input.width]) };
    value["patch_size"] = json!(input.patch);
    value["num_channels"] = json!(input.channels);
    value["num_frames"] = json!(input.frames);
    value["tubelet_size"] = json!(input.patch_frames);
    value["use_mean_pooling"] = json!(false);
    value
}

/// Builds `preprocessor_config.json` of a `VideoMAEForPreTraining`.
fn preprocessor_config(config: &Config) -> Result<Value> {
    let (mean, std) = config.input.mean_std()?;
    let height = config.input.height;
    let width = config.input.width;
    Ok(json!({
        "image_processor_type": "VideoMAEImageProcessor", "do_resize": true,
        "size": {"shortest_edge": height.min(width)}, "resample": pillow_resample(config), "do_center_crop": true,
        "crop_size": {"height": height, "width": width}, "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": mean, "image_std": std,
    }))
}

/// Reads [height, width], or one number for a square.
fn image_size(value: &Value) -> Option<[i64; 2]> {
    match value.as_array().map(Vec::as_slice) {
        Some([height, width]) => Some([height.as_i64()?, width.as_i64()?]),
        _ => value.as_i64().map(|side| [side; 2]),
    }
}
