//! VideoMAE: the official repository's names, and those of transformers' `VideoMAEForPreTraining`. Neither keeps its
//! positions, which are counted through, nor do tensors tell frames, height and width: settings beside the file do, or
//! custom.

use super::about::{About, numbers};
use super::file::Sheet;
use super::model::{Custom, Model};
use super::names::{Layers, Names};
use super::transformers::{encoder_and_decoder, fits_here, resample};
use crate::config::Config;
use crate::fault::Result;
use serde_json::{Value, json};

pub const CUSTOM: Custom = Custom {
    method: "videomae",
    recipe: include_str!("../../../configs/videomae_vit_b16_k400.json"),
    paper: "Tong et al. 2022",
    heads: |part, width| match (part, width) {
        ("encoder", 1280) => 16,
        ("decoder", 640) => 8,
        _ => (width / 64).max(1),
    },
    normalize: true,
    size: 224,
    frames: 16,
};

const LAYERS: Layers = &[
    ("norm1", &["norm1"]),
    ("attn.qkv", &["attn.qkv"]),
    ("attn", &["attn"]),
    ("attn.proj", &["attn.proj"]),
    ("norm2", &["norm2"]),
    ("mlp.fc1", &["mlp.fc1"]),
    ("mlp.fc2", &["mlp.fc2"]),
];

pub const NAMES: Names = Names {
    title: "the official VideoMAE repository's",
    custom: &CUSTOM,
    cubes: true,
    outside: &[
        ("encoder.embed", "encoder.patch_embed.proj"),
        ("encoder.norm", "encoder.norm"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.embed", "encoder_to_decoder"),
        ("decoder.norm", "decoder.norm"),
        ("decoder.pred", "decoder.head"),
    ],
    blocks: &[("encoder.blocks.", "encoder.blocks."), ("decoder.blocks.", "decoder.blocks.")],
    layers: LAYERS,
    positions: &[],
    about: |sheet| Ok(about(&sheet.config, &sheet.arguments)),
    settings: |config, model| Ok(vec![("config.json", settings(config, model))]),
    load: "PretrainVisionTransformer(**json.load(open(\"FOLDER/config.json\"))[\"arguments\"], \
           norm_layer=partial(nn.LayerNorm, eps=1e-6))\
           .load_state_dict(safetensors.torch.load_file(\"FOLDER/model.safetensors\"))",
};

pub const TRANSFORMERS: Names = Names {
    title: "transformers' (VideoMAE)",
    custom: &CUSTOM,
    cubes: true,
    outside: &[
        ("encoder.embed", "videomae.embeddings.patch_embeddings.projection"),
        ("encoder.norm", "videomae.layernorm"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.embed", "encoder_to_decoder"),
        ("decoder.norm", "decoder.norm"),
        ("decoder.pred", "decoder.head"),
    ],
    blocks: &[("encoder.blocks.", "videomae.encoder.layer."), ("decoder.blocks.", "decoder.decoder_layers.")],
    layers: &[
        ("norm1", &["layernorm_before"]),
        ("attn.qkv", &["attention.attention.query", "attention.attention.key", "attention.attention.value"]),
        ("attn", &["attention.attention"]),
        ("attn.proj", &["attention.output.dense"]),
        ("norm2", &["layernorm_after"]),
        ("mlp.fc1", &["intermediate.dense"]),
        ("mlp.fc2", &["output.dense"]),
    ],
    positions: &[],
    about: transformers_about,
    settings: |config, model| {
        Ok(vec![
            ("config.json", transformers_settings(config, model)),
            ("preprocessor_config.json", preprocessor(config)?),
        ])
    },
    load: "VideoMAEForPreTraining.from_pretrained(\"FOLDER\"), and set .decoder.norm.eps = 1e-6, which its config cannot \
           say",
};

/// What `config.json` (ours) says, or the arguments that a training saved in its `.pth`.
fn about(config: &Value, arguments: &Value) -> About {
    let number = |key: &str| config["arguments"][key].as_i64();
    About {
        heads: number("encoder_num_heads"),
        decoder_heads: number("decoder_num_heads"),
        normalize: config["normlize_target"].as_bool().or(arguments["normlize_target"].as_bool()),
        ratio: config["mask_ratio"].as_f64().or(arguments["mask_ratio"].as_f64()),
        frames: config["num_frames"].as_i64().or(arguments["num_frames"].as_i64()),
        size: size(&config["arguments"]["img_size"]).or(size(&arguments["input_size"])),
        ..About::default()
    }
}

/// `config.json`: the arguments of the repository's `PretrainVisionTransformer`, and beside them those of its training.
/// The repository always takes 16 frames.
fn settings(config: &Config, model: &Model) -> Value {
    let (input, encoder, decoder) = (&config.input, &model.encoder, &model.decoder);
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
        "num_frames": input.frames, "mask_ratio": model.ratio, "normlize_target": model.normalize,
    })
}

fn transformers_about(sheet: &Sheet) -> Result<About> {
    let (config, preprocessor) = (&sheet.config, &sheet.preprocessor);
    let mut notes = fits_here(config, "videomae")?;
    notes.push(
        "transformers adds 1e-5 to the variance in the decoder's last normalisation, whatever its config says; here it is \
         1e-6, as in the official code"
            .into(),
    );
    Ok(About {
        heads: config["num_attention_heads"].as_i64(),
        decoder_heads: config["decoder_num_attention_heads"].as_i64(),
        normalize: config["norm_pix_loss"].as_bool(),
        ratio: config["mask_ratio"].as_f64(),
        frames: config["num_frames"].as_i64(),
        size: size(&config["image_size"]),
        mean: numbers(&preprocessor["image_mean"]),
        std: numbers(&preprocessor["image_std"]),
        notes,
    })
}

/// `config.json` of a `VideoMAEForPreTraining`.
fn transformers_settings(config: &Config, model: &Model) -> Value {
    let input = &config.input;
    let mut value = encoder_and_decoder(model);
    let own = json!({
        "architectures": ["VideoMAEForPreTraining"], "model_type": "videomae",
        "image_size": match input.height == input.width {
            true => json!(input.height),
            false => json!([input.height, input.width]),
        },
        "patch_size": input.patch, "num_channels": input.channels,
        "num_frames": input.frames, "tubelet_size": input.patch_frames, "use_mean_pooling": false,
    });
    value.as_object_mut().expect("an object").extend(own.as_object().expect("an object").clone());
    value
}

fn preprocessor(config: &Config) -> Result<Value> {
    let (mean, std) = config.input.scale()?;
    let (height, width) = (config.input.height, config.input.width);
    Ok(json!({
        "image_processor_type": "VideoMAEImageProcessor", "do_resize": true,
        "size": {"shortest_edge": height.min(width)}, "resample": resample(config), "do_center_crop": true,
        "crop_size": {"height": height, "width": width}, "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": mean, "image_std": std,
    }))
}

/// One number for a square, or [height, width].
fn size(value: &Value) -> Option<[i64; 2]> {
    match value.as_array().map(Vec::as_slice) {
        Some([height, width]) => Some([height.as_i64()?, width.as_i64()?]),
        _ => value.as_i64().map(|side| [side; 2]),
    }
}
