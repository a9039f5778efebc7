//! `occlude export`: a checkpoint's weights as other people's programs load them. The moving average where the run kept
//! one; never a pickle.

use super::{Format, file, mae, position, timm, transformers};
use crate::config::Config;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::method::{catalog, mae as method};
use crate::run::{checkpoint, state};
use serde_json::Value;
use std::path::Path;
use tch::{Device, Tensor};

/// Writes `model.safetensors` and the settings beside it into `out`. Returns what the user should know, a line each.
pub fn export(format: Format, from: &str, out: &Path) -> Result<Vec<String>> {
    let loaded = checkpoint::open(from)?;
    let (config, model, flat) = state::model(&loaded, Device::Cpu)?;
    let catalog::Config::Mae(method) = &config.method;
    fits(format, &config, method)?;
    let mut tensors = Vec::new();
    let mut left = Vec::new();
    for (index, spec) in flat.specs.iter().enumerate() {
        match format.names()[0].give(&spec.name, &flat.part(&flat.master, index), model.grid()) {
            Some(parts) => tensors.extend(parts),
            None => left.push(spec.name.as_str()),
        }
    }
    tensors.extend(positions(format, method, model.grid()));
    let weights = file::write(out, &tensors)?;
    let mut lines = vec![format!(
        "wrote {}: {} tensors of step {} under {} names",
        weights.display(),
        tensors.len(),
        loaded.manifest.step,
        format.names()[0].title
    )];
    for (name, value) in settings(format, &config, method)? {
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
    lines.push(load(format, out));
    Ok(lines)
}

/// What a format cannot say is refused before anything is written.
fn fits(format: Format, config: &Config, method: &method::Config) -> Result<()> {
    if format != Format::Timm && method.mask_tokens == method::MaskTokens::Encoder {
        return Err(Fault::usage(format!(
            "the model's encoder sees mask tokens, and {format} has no such model; --format timm takes its encoder"
        )));
    }
    if format == Format::Transformers && config.input.height != config.input.width {
        return Err(Fault::usage(format!(
            "the model sees {} × {} pixels, and transformers' ViTMAE takes squares alone; use --format mae or timm",
            config.input.height, config.input.width
        )));
    }
    Ok(())
}

fn positions(format: Format, method: &method::Config, grid: &Grid) -> Vec<(String, Tensor)> {
    let widths = [("encoder", method.encoder.width), ("decoder", method.decoder.width)];
    let table = |(part, width)| {
        let name = format.names()[0].position(part)?.to_owned();
        Some((name, position::table(grid, width, method.trained_grid)))
    };
    widths.into_iter().filter_map(table).collect()
}

/// The files beside the weights.
fn settings(format: Format, config: &Config, method: &method::Config) -> Result<Vec<(&'static str, Value)>> {
    Ok(match format {
        Format::Mae => vec![("config.json", mae::settings(config, method))],
        Format::Timm => vec![("config.json", timm::settings(config, method)?)],
        Format::Transformers => vec![
            ("config.json", transformers::settings(config, method)),
            ("preprocessor_config.json", transformers::preprocessor(config)?),
        ],
    })
}

/// How to open it.
fn load(format: Format, out: &Path) -> String {
    let folder = out.display();
    match format {
        Format::Mae => format!(
            "load with: MaskedAutoencoderViT(**json.load(open(\"{folder}/config.json\"))[\"arguments\"])\
             .load_state_dict(safetensors.torch.load_file(\"{folder}/model.safetensors\"))"
        ),
        Format::Timm => format!("load with: timm.create_model(\"local-dir:{folder}\", pretrained=True)"),
        Format::Transformers => format!("load with: ViTMAEForPreTraining.from_pretrained(\"{folder}\")"),
    }
}
