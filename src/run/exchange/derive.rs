//! The config of a model that came without one: what the tensors' shapes say, then what stands beside the file, then
//! convention. The recipe for going on is the paper's, to be replaced by the user's own.

use super::about::About;
use super::file::Sheet;
use super::names::{EMBEDDING, Names};
use super::position::grid_of;
use crate::config::Config;
use crate::fault::Result;
use crate::method::catalog;
use crate::part::encoder::vit::Shape;
use serde_json::{Value, json};

/// The method's section of the recipe, and all that is not derived.
const RECIPE: &str = include_str!("../../../configs/mae_vit_b16_in1k.json");

/// A config for the model in `sheet`, overrides applied; and what was assumed, for the user to read.
pub fn config(sheet: &Sheet, names: &Names, about: &About, sets: &[String]) -> Result<(Config, Vec<String>)> {
    let (channels, patch) = patches(sheet, names)?;
    let (rows, cols) = grid(sheet, names)?;
    let mut input = json!({"channels": channels, "height": rows * patch, "width": cols * patch, "patch": patch});
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
    method["target"] = json!({"normalize": about.normalize.unwrap_or(false)});
    if let Some(ratio) = about.ratio {
        method["mask"] = json!({"ratio": ratio});
    }
    let name = sheet.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let card = json!({
        "title": format!("imported from {name}"),
        "source": format!("weights under {} names; the recipe for going on is that of He et al. 2022", names.title),
        "measured": "not trained here",
    });
    let mut lines = [("about", card), ("input", input), ("method", json!({"mae": &method}))]
        .map(|(key, value): (_, Value)| format!("{key}={value}"))
        .to_vec();
    lines.extend_from_slice(sets);
    let config = Config::parse(RECIPE, &lines)?;
    let notes = assumed(&config, about, method.get("decoder").is_some());
    Ok((config, notes))
}

/// What nothing said and no override settled.
fn assumed(config: &Config, about: &About, decoder: bool) -> Vec<String> {
    let catalog::Config::Mae(method) = &config.method;
    let mut notes = Vec::new();
    for (part, shape, told) in
        [("encoder", method.encoder, about.heads), ("decoder", method.decoder, about.decoder_heads)]
    {
        let guess = heads_by_convention(part, shape.width);
        if told.is_none() && shape.heads == guess && (decoder || part == "encoder") {
            notes.push(format!(
                "nothing says how many heads the {part} has: taken as {guess}, the usual number at a width of {} \
                 (method.mae.{part}.heads)",
                shape.width
            ));
        }
    }
    if decoder && about.normalize.is_none() && !method.target.normalize {
        notes.push(
            "nothing says whether the targets were normalised: taken as not (method.mae.target.normalize)".into(),
        );
    }
    notes
}

/// Channels and the side of a patch, from the embedding's kernel.
fn patches(sheet: &Sheet, names: &Names) -> Result<(i64, i64)> {
    let name = &names.theirs(EMBEDDING).expect("every format embeds patches")[0];
    match sheet.size(name)?[..] {
        [_, channels, height, width] if height == width => Ok((channels, width)),
        ref other => Err(sheet.wrong(format!("{name} is {other:?}; wanted a kernel [width, channels, p, p]"))),
    }
}

/// Rows and columns of patches, from the table of positions.
pub fn grid(sheet: &Sheet, names: &Names) -> Result<(i64, i64)> {
    let name = names.position("encoder").expect("every format has positions");
    sheet.size(name)?;
    grid_of(&sheet.tensors[name]).ok_or_else(|| {
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
    let heads = told.unwrap_or_else(|| heads_by_convention(part, width));
    Ok(Shape { width, depth: depth as i64, heads, mlp_ratio: hidden / width })
}

/// 64 channels a head in encoders, but 16 heads in the huge one; 32 channels a head in decoders (the official code).
fn heads_by_convention(part: &str, width: i64) -> i64 {
    match (part, width) {
        ("decoder", _) => (width / 32).max(1),
        (_, 1280) => 16,
        _ => (width / 64).max(1),
    }
}
