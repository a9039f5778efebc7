//! The config of a model that came without one: what the tensors' shapes say, then what stands beside the file, then
//! convention. The recipe for going on is the paper's, to be replaced by the user's own.

use super::about::About;
use super::file::Sheet;
use super::model::Model;
use super::names::{EMBEDDING, Names};
use super::position::grid_of;
use crate::config::Config;
use crate::fault::Result;
use crate::part::encoder::vit::Shape;
use serde_json::{Value, json};

/// A config for the model in `sheet`, overrides applied; and what was assumed, for the user to read.
pub fn config(sheet: &Sheet, names: &Names, about: &About, sets: &[String]) -> Result<(Config, Vec<String>)> {
    let custom = names.custom;
    let [channels, patch_frames, patch] = patches(sheet, names)?;
    let [height, width] = match grid(sheet, names)? {
        Some((rows, cols)) => [rows * patch, cols * patch],
        None => about.size.unwrap_or([custom.size; 2]),
    };
    let frames = about.frames.unwrap_or(custom.frames);
    let mut input = json!({
        "channels": channels, "frames": frames, "height": height, "width": width, "patch": patch,
        "patch_frames": patch_frames,
    });
    for (key, values) in [("mean", &about.mean), ("std", &about.std)] {
        if let Some(values) = values {
            input[key] = json!(values);
        }
    }
    let encoder = shape(sheet, names, "encoder", about.heads)?;
    let mut method = json!({"encoder": encoder});
    if names.theirs("decoder.embed.weight").is_some_and(|theirs| sheet.tensors.contains_key(&theirs[0])) {
        method["decoder"] = json!(shape(sheet, names, "decoder", about.decoder_heads)?);
    }
    method["target"] = json!({"normalize": about.normalize.unwrap_or(custom.normalize)});
    if let Some(ratio) = about.ratio {
        method["mask"] = json!({"ratio": ratio});
    }
    let name = sheet.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let card = json!({
        "title": format!("imported from {name}"),
        "source": format!("weights under {} names; the recipe for going on is that of {}", names.title, custom.paper),
        "measured": "not trained here",
    });
    let mut lines = [("about", card), ("input", input), ("method", json!({custom.method: &method}))]
        .map(|(key, value): (_, Value)| format!("{key}={value}"))
        .to_vec();
    lines.extend_from_slice(sets);
    let config = Config::parse(custom.recipe, &lines)?;
    let notes = assumed(&config, &Model::of(&config.method)?, names, about, method.get("decoder").is_some());
    Ok((config, notes))
}

/// What nothing said and no override settled.
fn assumed(config: &Config, model: &Model, names: &Names, about: &About, decoder: bool) -> Vec<String> {
    let custom = names.custom;
    let key = custom.method;
    let mut notes = Vec::new();
    for ((part, shape), told) in model.heads().into_iter().zip([about.heads, about.decoder_heads]) {
        let guess = (custom.heads)(part, shape.width);
        if told.is_none() && shape.heads == guess && (decoder || part == "encoder") {
            notes.push(format!(
                "nothing says how many heads the {part} has: taken as {guess}, the usual number at a width of {} \
                 (method.{key}.{part}.heads)",
                shape.width
            ));
        }
    }
    if decoder && about.normalize.is_none() && model.normalize == custom.normalize {
        let not = if custom.normalize { "" } else { "not " };
        notes.push(format!(
            "nothing says whether the targets were normalised: taken as {not}so (method.{key}.target.normalize)"
        ));
    }
    let input = &config.input;
    let silent = names.positions.is_empty() && (about.size.is_none() || about.frames.is_none());
    if silent && [input.frames, input.height, input.width] == [custom.frames, custom.size, custom.size] {
        notes.push(format!(
            "nothing says what the model saw: taken as {} frames of {} × {} pixels (input.frames, input.height, \
             input.width)",
            input.frames, input.height, input.width
        ));
    }
    notes
}

/// Channels, frames and the side of a patch, from the embedding's kernel.
fn patches(sheet: &Sheet, names: &Names) -> Result<[i64; 3]> {
    let name = &names.theirs(EMBEDDING).expect("every format embeds patches")[0];
    match (sheet.size(name)?.as_slice(), names.cubes) {
        ([_, channels, height, width], false) if height == width => Ok([*channels, 1, *width]),
        ([_, channels, frames, height, width], true) if height == width => Ok([*channels, *frames, *width]),
        (other, cubes) => {
            let wanted = if cubes { "[width, channels, frames, p, p]" } else { "[width, channels, p, p]" };
            Err(sheet.wrong(format!("{name} is {other:?}; wanted a kernel {wanted}")))
        }
    }
}

/// Rows and columns of patches, from the table of positions; None where the format keeps none.
pub fn grid(sheet: &Sheet, names: &Names) -> Result<Option<(i64, i64)>> {
    let Some(name) = names.position("encoder") else { return Ok(None) };
    sheet.size(name)?;
    grid_of(&sheet.tensors[name]).map(Some).ok_or_else(|| {
        sheet.wrong(format!(
            "{name} is not the fixed sine-cosine table of masked autoencoders but learned, as in supervised models; this \
             model has no place for learned positions. Take the weights from before fine-tuning."
        ))
    })
}

/// Width, depth and hidden width from shapes; heads as told, else by convention.
fn shape(sheet: &Sheet, names: &Names, part: &str, told: Option<i64>) -> Result<Shape> {
    let theirs = |ours: &str| names.theirs(&format!("{part}.{ours}")).unwrap_or_default().swap_remove(0);
    let width = sheet.size(&theirs("norm.weight"))?[0];
    let depth = (0..).take_while(|i| sheet.tensors.contains_key(&theirs(&format!("blocks.{i}.norm1.weight")))).count();
    let hidden = sheet.size(&theirs("blocks.0.mlp.fc1.weight"))?[0];
    if width < 1 || hidden % width != 0 {
        return Err(sheet.wrong(format!(
            "the {part}'s blocks have a hidden layer of {hidden} at a width of {width}; only whole multiples can be held"
        )));
    }
    let heads = told.unwrap_or_else(|| (names.custom.heads)(part, width));
    Ok(Shape { width, depth: depth as i64, heads, mlp_ratio: hidden / width })
}
