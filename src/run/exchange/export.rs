//! `occlude export`: a checkpoint's weights as other people's programs load them. The moving average where the run kept
//! one; never a pickle.

use super::model::Model;
use super::names::Names;
use super::{Format, file, position};
use crate::config::Config;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::run::{checkpoint, state};
use std::path::Path;
use tch::{Device, Tensor};

/// Writes `model.safetensors` and the settings beside it into `out`. Returns what the user should know, a line each.
pub fn export(format: Format, from: &str, out: &Path) -> Result<Vec<String>> {
    let loaded = checkpoint::open(from)?;
    let (config, method, flat) = state::model(&loaded, Device::Cpu)?;
    let model = Model::of(&config.method)?;
    let names = written(format, &model)?;
    fits(format, &config, &model)?;
    let mut tensors = Vec::new();
    let mut left = Vec::new();
    for (index, spec) in flat.specs.iter().enumerate() {
        match names.give(&spec.name, &flat.part(&flat.master, index), method.grid()) {
            Some(parts) => tensors.extend(parts),
            None => left.push(spec.name.as_str()),
        }
    }
    tensors.extend(positions(names, &model, method.grid()));
    let weights = file::write(out, &tensors)?;
    let mut lines = vec![format!(
        "wrote {}: {} tensors of step {} under {} names",
        weights.display(),
        tensors.len(),
        loaded.manifest.step,
        names.title
    )];
    for (name, value) in (names.settings)(&config, &model)? {
        let path = out.join(name);
        let text = serde_json::to_string_pretty(&value).expect("settings are JSON");
        std::fs::write(&path, text + "\n").map_err(|error| Fault::disk(path.display(), error))?;
        lines.push(format!("wrote {}", path.display()));
    }
    if loaded.tensors.keys().any(|name| name.starts_with("average.")) {
        lines.push("the weights are the run's moving average".into());
    }
    if !left.is_empty() {
        lines.push(format!("{} tensors that {format} has no place for were left out, {} first", left.len(), left[0]));
    }
    lines.push(format!("load with: {}", names.load.replace("FOLDER", &out.display().to_string())));
    Ok(lines)
}

/// The format's names for this method: the first of them.
fn written(format: Format, model: &Model) -> Result<&'static Names> {
    let of = |format: Format| format.names().iter().find(|names| names.custom.method == model.method);
    of(format).ok_or_else(|| {
        let others: Vec<String> = Format::ALL.into_iter().filter(|f| of(*f).is_some()).map(|f| f.to_string()).collect();
        Fault::usage(format!(
            "the model was trained with method.{}, and {format} has no such model; use --format {}",
            model.method,
            others.join(" or ")
        ))
    })
}

/// What a format cannot say is refused before anything is written.
fn fits(format: Format, config: &Config, model: &Model) -> Result<()> {
    if format != Format::Timm && model.in_place {
        return Err(Fault::usage(format!(
            "the model's encoder sees mask tokens, and {format} has no such model; --format timm takes its encoder"
        )));
    }
    let squares = format == Format::Transformers && model.method == super::mae::CUSTOM.method;
    if squares && config.input.height != config.input.width {
        return Err(Fault::usage(format!(
            "the model sees {} × {} pixels, and transformers' ViTMAE takes squares alone; use --format mae or timm",
            config.input.height, config.input.width
        )));
    }
    Ok(())
}

fn positions(names: &Names, model: &Model, grid: &Grid) -> Vec<(String, Tensor)> {
    let table = |(part, width)| {
        let name = names.position(part)?.to_owned();
        Some((name, position::table(grid, width, model.trained_grid)))
    };
    [("encoder", model.encoder.width), ("decoder", model.decoder.width)].into_iter().filter_map(table).collect()
}
