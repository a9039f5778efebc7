//! The config of a model that is imported without one: from the shapes of the tensors, then from the sidecar files,
//! then from the defaults. The training recipe is the paper's.

use super::metadata::SourceMetadata;
use super::model::ModelSettings;
use super::name_map::{NameMap, PATCH_EMBEDDING};
use super::position::infer_grid;
use super::state_dict::StateDict;
use crate::config::Config;
use crate::error::Result;
use crate::part::encoder::vit::Shape;
use serde_json::{Value, json};

/// Returns the config for `weights` with `overrides` applied, and the assumptions made, for the user.
pub fn derive_config(
    weights: &StateDict,
    names: &NameMap,
    metadata: &SourceMetadata,
    overrides: &[String],
) -> Result<(Config, Vec<String>)> {
    let defaults = names.defaults;
    let decoder_name = names.their_names("decoder.embed.weight");
    let has_decoder = decoder_name.is_some_and(|theirs| weights.tensors.contains_key(&theirs[0]));
    let mut method = json!({
        "encoder": stack_shape(weights, names, "encoder", metadata.heads)?,
        "target": {"normalize": metadata.normalize_target.unwrap_or(defaults.normalize_target)},
    });
    if has_decoder {
        method["decoder"] = json!(stack_shape(weights, names, "decoder", metadata.decoder_heads)?);
    }
    if let Some(ratio) = metadata.mask_ratio {
        method["mask"] = json!({"ratio": ratio});
    }
    let file = weights.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let about = json!({
        "title": format!("imported from {file}"),
        "source": format!("weights under {} names; the training recipe is that of {}", names.title, defaults.paper),
        "measured": "not trained here",
    });
    let input = input_section(weights, names, metadata)?;
    let mut lines = [("about", about), ("input", input), ("method", json!({defaults.method: method}))]
        .map(|(key, value)| format!("{key}={value}"))
        .to_vec();
    lines.extend_from_slice(overrides);
    let config = Config::parse(defaults.recipe, &lines)?;
    let model = ModelSettings::from_method(&config.method)?;
    let mut notes = assumed_heads(&model, names, metadata, has_decoder);
    notes.extend(assumed_target(&model, names, metadata, has_decoder));
    notes.extend(assumed_input(&config, names, metadata));
    Ok((config, notes))
}

/// Returns the config's `input` section.
fn input_section(weights: &StateDict, names: &NameMap, metadata: &SourceMetadata) -> Result<Value> {
    let [channels, patch_frames, patch] = patch_size(weights, names)?;
    let [height, width] = match patch_grid(weights, names)? {
        Some((rows, cols)) => [rows * patch, cols * patch],
        None => metadata.image_size.unwrap_or([names.defaults.image_size; 2]),
    };
    let frames = metadata.frames.unwrap_or(names.defaults.frames);
    let mut input = json!({
        "channels": channels, "frames": frames, "height": height, "width": width, "patch": patch,
        "patch_frames": patch_frames,
    });
    if let Some(mean) = &metadata.mean {
        input["mean"] = json!(mean);
    }
    if let Some(std) = &metadata.std {
        input["std"] = json!(std);
    }
    Ok(input)
}

/// Describes the numbers of heads that neither the sidecar files nor an override set.
fn assumed_heads(model: &ModelSettings, names: &NameMap, metadata: &SourceMetadata, has_decoder: bool) -> Vec<String> {
    let key = names.defaults.method;
    let mut notes = Vec::new();
    for ((part, shape), heads) in model.shapes().into_iter().zip([metadata.heads, metadata.decoder_heads]) {
        let assumed = (names.defaults.heads)(part, shape.width);
        if heads.is_none() && shape.heads == assumed && (has_decoder || part == "encoder") {
            notes.push(format!(
                "nothing says how many heads the {part} has: assumed {assumed}, the usual number for a width of {} \
                 (method.{key}.{part}.heads)",
                shape.width
            ));
        }
    }
    notes
}

/// Describes the normalization of targets if neither the sidecar files nor an override set it.
fn assumed_target(
    model: &ModelSettings,
    names: &NameMap,
    metadata: &SourceMetadata,
    has_decoder: bool,
) -> Option<String> {
    let defaults = names.defaults;
    let is_assumed =
        has_decoder && metadata.normalize_target.is_none() && model.normalize_target == defaults.normalize_target;
    let assumed = if defaults.normalize_target { "yes" } else { "no" };
    is_assumed.then(|| {
        format!(
            "nothing says whether the targets were normalized: assumed {assumed} (method.{}.target.normalize)",
            defaults.method
        )
    })
}

/// Describes the size of the input if neither tensors, the sidecar files nor an override set it.
fn assumed_input(config: &Config, names: &NameMap, metadata: &SourceMetadata) -> Option<String> {
    let defaults = names.defaults;
    let input = &config.input;
    let is_unknown = names.position_tables.is_empty() && (metadata.image_size.is_none() || metadata.frames.is_none());
    let is_default =
        [input.frames, input.height, input.width] == [defaults.frames, defaults.image_size, defaults.image_size];
    (is_unknown && is_default).then(|| {
        format!(
            "nothing says what the model saw: assumed {} frames of {} × {} pixels (input.frames, input.height, \
             input.width)",
            input.frames, input.height, input.width
        )
    })
}

/// Returns the channels, frames and side of a patch, from the kernel of the patch embedding.
fn patch_size(weights: &StateDict, names: &NameMap) -> Result<[i64; 3]> {
    let name = &names.their_names(PATCH_EMBEDDING).expect("every format embeds patches")[0];
    match (weights.shape(name)?.as_slice(), names.conv3d) {
        ([_, channels, height, width], false) if height == width => Ok([*channels, 1, *width]),
        ([_, channels, frames, height, width], true) if height == width => Ok([*channels, *frames, *width]),
        (shape, conv3d) => {
            let wanted = if conv3d { "[width, channels, frames, p, p]" } else { "[width, channels, p, p]" };
            Err(weights.error(format!("{name} has the shape {shape:?}; wanted a kernel {wanted}")))
        }
    }
}

/// Returns rows and columns of patches, from the position table; `None` if the format stores none.
pub fn patch_grid(weights: &StateDict, names: &NameMap) -> Result<Option<(i64, i64)>> {
    let Some(name) = names.position_table("encoder") else { return Ok(None) };
    weights.shape(name)?;
    infer_grid(&weights.tensors[name]).map(Some).ok_or_else(|| {
        weights.error(format!(
            "{name} is not the fixed sine-cosine table of masked autoencoders. It was learned, as in supervised \
             models, and this model cannot hold learned positions. Use the weights from before fine-tuning."
        ))
    })
}

/// Returns the shape of the encoder or decoder: width, depth and hidden width from its tensors, `heads` or the usual
/// number of them.
fn stack_shape(weights: &StateDict, names: &NameMap, part: &str, heads: Option<i64>) -> Result<Shape> {
    let theirs = |ours: &str| names.their_names(&format!("{part}.{ours}")).unwrap_or_default().swap_remove(0);
    let width = weights.shape(&theirs("norm.weight"))?[0];
    let has_block = |index: &i64| weights.tensors.contains_key(&theirs(&format!("blocks.{index}.norm1.weight")));
    let depth = (0..).take_while(has_block).count() as i64;
    let hidden = weights.shape(&theirs("blocks.0.mlp.fc1.weight"))?[0];
    if width < 1 || hidden % width != 0 {
        return Err(weights.error(format!(
            "the {part}'s blocks have a hidden layer of {hidden} for a width of {width}; it must be a multiple"
        )));
    }
    let heads = heads.unwrap_or_else(|| (names.defaults.heads)(part, width));
    Ok(Shape { width, depth, heads, mlp_ratio: hidden / width })
}
