//! The official MAE repository (facebookresearch/mae): encoder and decoder, or the encoder alone. Its files do not
//! store the number of heads, so it follows from the repository's model sizes or from the arguments that `export`
//! writes.

use super::metadata::SourceMetadata;
use super::model::{Defaults, MAE, ModelSettings};
use super::name_map::{BlockLayers, NameMap};
use crate::config::Config;
use serde_json::{Value, json};

/// The defaults of the official repository.
pub const DEFAULTS: Defaults = Defaults {
    method: MAE,
    recipe: include_str!("../../configs/mae_vit_b16_in1k.json"),
    paper: "He et al. 2022",
    // 64 channels per head in encoders, except 16 heads in ViT-H; 32 channels per head in decoders.
    heads: |part, width| match (part, width) {
        ("decoder", _) => (width / 32).max(1),
        (_, 1280) => 16,
        _ => (width / 64).max(1),
    },
    normalize_target: false,
    image_size: 224,
    frames: 1,
};

/// The layers of a block, which timm's VisionTransformer names as we do.
pub const BLOCK_LAYERS: BlockLayers = &[
    ("norm1", &["norm1"]),
    ("attn.qkv", &["attn.qkv"]),
    ("attn.proj", &["attn.proj"]),
    ("norm2", &["norm2"]),
    ("mlp.fc1", &["mlp.fc1"]),
    ("mlp.fc2", &["mlp.fc2"]),
];

/// The names of `MaskedAutoencoderViT`.
pub const NAMES: NameMap = NameMap {
    title: "the official MAE repository's",
    defaults: &DEFAULTS,
    conv3d: false,
    top_level: &[
        ("encoder.cls_token", "cls_token"),
        ("encoder.mask_token", "mask_token"),
        ("encoder.embed", "patch_embed.proj"),
        ("encoder.norm", "norm"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.embed", "decoder_embed"),
        ("decoder.norm", "decoder_norm"),
        ("decoder.pred", "decoder_pred"),
    ],
    block_prefixes: &[("encoder.blocks.", "blocks."), ("decoder.blocks.", "decoder_blocks.")],
    block_layers: BLOCK_LAYERS,
    position_tables: &[("encoder", "pos_embed"), ("decoder", "decoder_pos_embed")],
    read_metadata: |weights| Ok(read_metadata(&weights.config, &weights.train_args)),
    sidecar_files: |config, model| Ok(vec![("config.json", model_arguments(config, model))]),
    load_snippet: "MaskedAutoencoderViT(**json.load(open(\"FOLDER/config.json\"))[\"arguments\"])\
                   .load_state_dict(safetensors.torch.load_file(\"FOLDER/model.safetensors\"))",
};

/// Reads `config.json` as `export` writes it, or the arguments that a training saved in its `.pth`.
fn read_metadata(config: &Value, train_args: &Value) -> SourceMetadata {
    let arguments = &config["arguments"];
    SourceMetadata {
        heads: arguments["num_heads"].as_i64(),
        decoder_heads: arguments["decoder_num_heads"].as_i64(),
        normalize_target: arguments["norm_pix_loss"].as_bool().or(train_args["norm_pix_loss"].as_bool()),
        mask_ratio: train_args["mask_ratio"].as_f64(),
        ..SourceMetadata::default()
    }
}

/// Builds `config.json`: the arguments of the repository's `MaskedAutoencoderViT`.
fn model_arguments(config: &Config, model: &ModelSettings) -> Value {
    let input = &config.input;
    let encoder = &model.encoder;
    let decoder = &model.decoder;
    json!({
        "model": "MaskedAutoencoderViT",
        "arguments": {
            "img_size": [input.height, input.width], "patch_size": input.patch, "in_chans": input.channels,
            "embed_dim": encoder.width, "depth": encoder.depth, "num_heads": encoder.heads,
            "decoder_embed_dim": decoder.width, "decoder_depth": decoder.depth, "decoder_num_heads": decoder.heads,
            "mlp_ratio": encoder.mlp_ratio, "norm_pix_loss": model.normalize_target,
        },
    })
}
