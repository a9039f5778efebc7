//! The official MAE repository: one file with encoder and decoder, or the encoder alone. It holds no number of heads, so
//! that one goes by the models that the repository names, or by the arguments that `export` writes beside it.

use super::about::About;
use super::model::{Custom, Model};
use super::names::Names;
use super::timm::LAYERS;
use crate::config::Config;
use serde_json::{Value, json};

pub const CUSTOM: Custom = Custom {
    method: "mae",
    recipe: include_str!("../../../configs/mae_vit_b16_in1k.json"),
    paper: "He et al. 2022",
    // 64 channels a head in encoders, but 16 heads in the huge one; 32 channels a head in decoders.
    heads: |part, width| match (part, width) {
        ("decoder", _) => (width / 32).max(1),
        (_, 1280) => 16,
        _ => (width / 64).max(1),
    },
    normalize: false,
    size: 224,
    frames: 1,
};

pub const NAMES: Names = Names {
    title: "the official MAE repository's",
    custom: &CUSTOM,
    cubes: false,
    outside: &[
        ("encoder.cls_token", "cls_token"),
        ("encoder.mask_token", "mask_token"),
        ("encoder.embed", "patch_embed.proj"),
        ("encoder.norm", "norm"),
        ("decoder.mask_token", "mask_token"),
        ("decoder.embed", "decoder_embed"),
        ("decoder.norm", "decoder_norm"),
        ("decoder.pred", "decoder_pred"),
    ],
    blocks: &[("encoder.blocks.", "blocks."), ("decoder.blocks.", "decoder_blocks.")],
    layers: LAYERS,
    positions: &[("encoder", "pos_embed"), ("decoder", "decoder_pos_embed")],
    about: |sheet| Ok(about(&sheet.config, &sheet.arguments)),
    settings: |config, model| Ok(vec![("config.json", settings(config, model))]),
    load: "MaskedAutoencoderViT(**json.load(open(\"FOLDER/config.json\"))[\"arguments\"])\
           .load_state_dict(safetensors.torch.load_file(\"FOLDER/model.safetensors\"))",
};

/// What `config.json` (ours) says, or the arguments that a training saved in its `.pth`.
fn about(config: &Value, arguments: &Value) -> About {
    let number = |key: &str| config["arguments"][key].as_i64();
    About {
        heads: number("num_heads"),
        decoder_heads: number("decoder_num_heads"),
        normalize: config["arguments"]["norm_pix_loss"].as_bool().or(arguments["norm_pix_loss"].as_bool()),
        ratio: arguments["mask_ratio"].as_f64(),
        ..About::default()
    }
}

/// `config.json`: the arguments of the repository's `MaskedAutoencoderViT`.
fn settings(config: &Config, model: &Model) -> Value {
    let (input, encoder, decoder) = (&config.input, &model.encoder, &model.decoder);
    json!({
        "model": "MaskedAutoencoderViT",
        "arguments": {
            "img_size": [input.height, input.width], "patch_size": input.patch, "in_chans": input.channels,
            "embed_dim": encoder.width, "depth": encoder.depth, "num_heads": encoder.heads,
            "decoder_embed_dim": decoder.width, "decoder_depth": decoder.depth, "decoder_num_heads": decoder.heads,
            "mlp_ratio": encoder.mlp_ratio, "norm_pix_loss": model.normalize,
        },
    })
}
