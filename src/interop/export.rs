//! `occlude export`: writes a checkpoint's weights so that other programs can load them, from the moving average if the
//! run has one. It never writes a pickle.

use super::model::{MAE, ModelSettings};
use super::name_map::NameMap;
use super::position::sincos_table;
use super::{WeightFormat, state_dict};
use crate::checkpoint::load_from_url;
use crate::checkpoint::weights::{SavedModel, eval_weights_prefix, load_model};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::grid::Grid;
use std::path::Path;
use tch::{Device, Tensor};

/// Writes `model.safetensors` and its sidecar files into `out`, and returns messages for the user.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if the format cannot represent the model or the file exists.
pub fn export(format: WeightFormat, from: &str, out: &Path) -> Result<Vec<String>> {
    let loaded = load_from_url(from)?;
    let SavedModel { config, method, flat, .. } = load_model(&loaded, Device::Cpu)?;
    let grid = &method.model().patchify().grid;
    let model = ModelSettings::from_method(&config.method)?;
    let names = name_map_for(format, &model)?;
    check_representable(format, &config, &model)?;
    let mut tensors = Vec::new();
    let mut skipped = Vec::new();
    for (index, spec) in flat.specs.iter().enumerate() {
        match names.to_theirs(&spec.name, &flat.param_view(&flat.master, index), grid) {
            Some(parts) => tensors.extend(parts),
            None => skipped.push(spec.name.as_str()),
        }
    }
    tensors.extend(position_tables(names, &model, grid));
    let path = state_dict::write_weights(out, &tensors)?;
    let mut lines = vec![format!(
        "wrote {}: {} tensors of step {} under {} names",
        path.display(),
        tensors.len(),
        loaded.manifest.step,
        names.title
    )];
    for (name, value) in (names.sidecar_files)(&config, &model)? {
        let path = out.join(name);
        let text = serde_json::to_string_pretty(&value).expect("settings are JSON");
        std::fs::write(&path, text + "\n").map_err(|error| Error::disk(path.display(), error))?;
        lines.push(format!("wrote {}", path.display()));
    }
    if eval_weights_prefix(&loaded) == "ema" {
        lines.push("the weights are the run's moving average".into());
    }
    if !skipped.is_empty() {
        let count = skipped.len();
        lines.push(format!("skipped {count} tensors that {format} has no place for, {} first", skipped[0]));
    }
    lines.push(format!("load with: {}", names.load_snippet.replace("FOLDER", &out.display().to_string())));
    Ok(lines)
}

/// Returns the name map that is written for the model: the format's first one for its method.
fn name_map_for(format: WeightFormat, model: &ModelSettings) -> Result<&'static NameMap> {
    let map_of = |format: WeightFormat| format.name_maps().iter().find(|names| names.defaults.method == model.method);
    map_of(format).ok_or_else(|| {
        let supported = WeightFormat::ALL.into_iter().filter(|format| map_of(*format).is_some());
        let supported: Vec<String> = supported.map(|format| format.to_string()).collect();
        Error::usage(format!(
            "the model was trained with method.{}, and {format} has no such model; use --format {}",
            model.method,
            supported.join(" or ")
        ))
    })
}

/// Fails if the format cannot represent the model.
fn check_representable(format: WeightFormat, config: &Config, model: &ModelSettings) -> Result<()> {
    if format != WeightFormat::Timm && model.mask_tokens_in_encoder {
        return Err(Error::usage(format!(
            "the model's encoder sees mask tokens, and {format} has no such model; --format timm exports its encoder"
        )));
    }
    let needs_squares = format == WeightFormat::Transformers && model.method == MAE;
    if needs_squares && config.input.height != config.input.width {
        return Err(Error::usage(format!(
            "the model sees {} × {} pixels, and ViTMAE of transformers only supports squares; use --format mae or timm",
            config.input.height, config.input.width
        )));
    }
    Ok(())
}

/// Returns the position tables that the format stores.
fn position_tables(names: &NameMap, model: &ModelSettings, grid: &Grid) -> Vec<(String, Tensor)> {
    let mut tables = Vec::new();
    for (part, shape) in model.shapes() {
        if let Some(name) = names.position_table(part) {
            tables.push((name.to_owned(), sincos_table(grid, shape.width, model.trained_grid)));
        }
    }
    tables
}
