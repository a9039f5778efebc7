//! `occlude import`: converts foreign weights to a checkpoint of step 0.
//!
//! The checkpoint has weights only: the optimizer state starts at zero, and so does the order of samples. Its config is
//! the user's, or one derived from the file. Training may continue with any recipe; only the sections `input` and
//! `method`, which give the weights their meaning, must agree.

use super::metadata::SourceMetadata;
use super::model::ModelSettings;
use super::name_map::NameMap;
use super::position::infer_grid;
use super::state_dict::{StateDict, read_weights};
use super::{WeightFormat, derive};
use crate::checkpoint::lease::{Lease, TIME_TO_LIVE};
use crate::checkpoint::weights::import_snapshot;
use crate::checkpoint::{Retention, Saver};
use crate::config::Config;
use crate::data::store::Store;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::method::catalog;
use crate::optim::flat::FlatParams;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// Maximum number of names in a message.
const MAX_LISTED: usize = 5;

/// Options of `occlude import`.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    pub format: WeightFormat,
    /// A weight file, or its folder.
    pub from: PathBuf,
    /// The run to create, a path or URL.
    pub out: String,
    /// A config to use instead of a derived one.
    pub config: Option<PathBuf>,
    /// Overrides `path=value` of the config.
    pub overrides: Vec<String>,
}

/// Reads and checks the weights, then writes the run; returns messages for the user.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if the file cannot be read, does not fit the config, or the run
/// has checkpoints already.
pub fn import(options: &ImportOptions) -> Result<Vec<String>> {
    let mut weights = read_weights(&options.from)?;
    if options.format == WeightFormat::Transformers {
        weights.prefix_bare_encoder();
    }
    let names = detect_names(&weights, options.format)?;
    let metadata = (names.read_metadata)(&weights)?;
    let (mut config, assumptions) = match &options.config {
        Some(path) => (Config::read(path, &options.overrides)?, Vec::new()),
        None => derive::derive_config(&weights, names, &metadata, &options.overrides)?,
    };
    let interpolation_note = check_positions(&weights, names, &mut config)?;
    check_config(&weights, names, &metadata, &config)?;
    let method = config.method.build(&config.input)?;
    let flat = FlatParams::new(method.model().params(), config.train.seed, Kind::Float, Device::Cpu)?;
    let imported = load_tensors(&weights, names, &method.model().patchify().grid, &flat)?;
    let mut lines = vec![format!(
        "read {} tensors from {} under {} names",
        weights.tensors.len(),
        weights.path.display(),
        names.title
    )];
    lines.extend_from_slice(&metadata.notes);
    lines.extend(assumptions);
    lines.extend(interpolation_note);
    lines.extend(input_note(&config, names, &metadata));
    lines.extend(statistics_note(&config, &metadata)?);
    let all_names = flat.specs.iter().map(|spec| spec.name.as_str());
    let initialized: Vec<&str> = all_names.filter(|name| !imported.contains(*name)).collect();
    lines.extend(initialized_note(&initialized, config.train.seed));
    write_run(options, &config, &flat, &initialized)?;
    lines.push(format!("wrote {}: a checkpoint of step 0", options.out));
    Ok(lines)
}

/// Returns the name map of the format that the file uses.
fn detect_names(weights: &StateDict, format: WeightFormat) -> Result<&'static NameMap> {
    // The last of equals would win in `max_by_key`, and the first should.
    let best = format.name_maps().iter().rev().max_by_key(|names| count_matches(weights, names)).expect("a name map");
    if count_matches(weights, best) > 0 {
        return Ok(best);
    }
    let fits = |format: &WeightFormat| format.name_maps().iter().any(|names| count_matches(weights, names) > 0);
    let hint = match WeightFormat::ALL.into_iter().find(fits) {
        Some(format) => format!("they look like --format {format}"),
        None => format!("wanted names such as {}", best.their_names(PROBED_NAMES[1]).expect("a name")[0]),
    };
    let found: Vec<&str> = weights.tensors.keys().take(MAX_LISTED).map(String::as_str).collect();
    Err(weights.error(format!("its names are not {}: it begins with {}; {hint}.", best.title, found.join(", "))))
}

/// Names by which a format is recognized.
const PROBED_NAMES: [&str; 3] =
    ["encoder.norm.weight", "encoder.blocks.0.attn.qkv.weight", "decoder.blocks.0.attn.qkv.weight"];

/// Returns the number of [`PROBED_NAMES`] that the file has under `names`.
fn count_matches(weights: &StateDict, names: &NameMap) -> usize {
    let found = PROBED_NAMES.iter().filter_map(|ours| names.their_names(ours));
    found.filter(|theirs| weights.tensors.contains_key(&theirs[0])).count()
}

/// Checks that the config is of the file's method and has the heads of its sidecar files, which shapes do not show.
fn check_config(weights: &StateDict, names: &NameMap, metadata: &SourceMetadata, config: &Config) -> Result<()> {
    let model = ModelSettings::from_method(&config.method)?;
    let wanted = names.defaults.method;
    if model.method != wanted {
        return Err(weights.error(format!(
            "the names are {}, of method.{wanted}, and the config has method.{}. Use a config of that method, or none.",
            names.title, model.method
        )));
    }
    for ((part, shape), theirs) in model.shapes().into_iter().zip([metadata.heads, metadata.decoder_heads]) {
        if let Some(theirs) = theirs.filter(|theirs| *theirs != shape.heads) {
            return Err(weights.error(format!(
                "method.{wanted}.{part}.heads is {}, and config.json in the folder of the weights says {theirs}. Set \
                 that number, or remove config.json if it is wrong.",
                shape.heads
            )));
        }
    }
    Ok(())
}

/// Warns if positions that run through all tokens are used on another grid than the trained one.
fn input_note(config: &Config, names: &NameMap, metadata: &SourceMetadata) -> Option<String> {
    let input = &config.input;
    let frames = metadata.frames?;
    let [height, width] = metadata.image_size?;
    let is_same = (frames, height, width) == (input.frames, input.height, input.width);
    (names.position_tables.is_empty() && !is_same).then(|| {
        format!(
            "the model saw {frames} frames of {height} × {width} pixels, the config says {} of {} × {}: its positions \
             run through all tokens, so that those it has learned do not fit this grid",
            input.frames, input.height, input.width
        )
    })
}

/// Copies the file's tensors into `flat` and returns our names of those found.
///
/// # Errors
/// [`ExitCode::Usage`](crate::error::ExitCode::Usage), before `flat` changes, if tensors are missing (except all of the
/// decoder), have another shape or are unknown.
fn load_tensors(weights: &StateDict, names: &NameMap, grid: &Grid, flat: &FlatParams) -> Result<BTreeSet<String>> {
    let mut found = Vec::new();
    let mut known: BTreeSet<String> = names.position_tables.iter().map(|(_, theirs)| theirs.to_string()).collect();
    let mut missing = Vec::new();
    let mut mismatched = Vec::new();
    for (index, spec) in flat.specs.iter().enumerate() {
        let Some(theirs) = names.their_names(&spec.name) else { continue };
        let wanted = names.their_shape(&spec.name, &spec.shape, theirs.len(), grid);
        for name in &theirs {
            match weights.tensors.get(name) {
                None => missing.push(name.clone()),
                Some(tensor) if tensor.size() != wanted => {
                    mismatched.push(format!("{name} is {:?}, wanted {wanted:?}", tensor.size()));
                }
                Some(_) => {}
            }
        }
        let parts: Option<Vec<Tensor>> =
            theirs.iter().map(|name| Some(weights.tensors.get(name)?.to_kind(Kind::Float))).collect();
        found.extend(parts.map(|parts| (index, parts)));
        known.extend(theirs);
    }
    if !weights.tensors.keys().any(|name| names.is_decoder_name(name)) {
        missing.retain(|name| !names.is_decoder_name(name));
    }
    let unknown: Vec<String> = weights.tensors.keys().filter(|name| !known.contains(*name)).cloned().collect();
    let known: Vec<String> = known.into_iter().collect();
    let missing: Vec<String> = missing.iter().map(|name| with_nearest(name, &unknown)).collect();
    let unexpected: Vec<String> = unknown.iter().map(|name| with_nearest(name, &known)).collect();
    for (problem, tensors, remedy) in [
        ("lacks", missing, "Is it complete, and of the config's depth?"),
        ("has tensors that this model does not know:", unexpected, "Remove them, or choose another --format."),
        (
            "has tensors of another shape:",
            mismatched,
            "Give the config of this model, or none to derive it from the file.",
        ),
    ] {
        if !tensors.is_empty() {
            let listed = list_first(&tensors);
            return Err(weights.error(format!("it {problem} {listed}. {remedy}")));
        }
    }
    let mut imported = BTreeSet::new();
    for (index, parts) in found {
        let spec = &flat.specs[index];
        let ours = names.to_ours(&spec.name, &parts, grid).view(spec.shape.as_slice());
        no_grad(|| flat.param_view(&flat.master, index).copy_(&ours));
        imported.insert(spec.name.clone());
    }
    Ok(imported)
}

/// Returns `name` with the most similar of `candidates`, if there are any.
fn with_nearest(name: &str, candidates: &[String]) -> String {
    let similarity = |other: &&String| (1000.0 * strsim::jaro_winkler(name, other)) as u32;
    candidates.iter().max_by_key(similarity).map_or(name.to_owned(), |other| format!("{name} (nearest: {other})"))
}

/// Joins the first [`MAX_LISTED`] items and the number of others.
fn list_first(items: &[String]) -> String {
    let listed = items[..items.len().min(MAX_LISTED)].join("; ");
    if items.len() > MAX_LISTED { format!("{listed} and {} more", items.len() - MAX_LISTED) } else { listed }
}

/// Checks that the file's positions are sine-cosine tables. If the model's grid differs, sets `trained_grid` of the
/// config, unless it is set already, and returns a note.
fn check_positions(weights: &StateDict, names: &NameMap, config: &mut Config) -> Result<Option<String>> {
    let Some((rows, cols)) = derive::patch_grid(weights, names)? else { return Ok(None) };
    if let Some(name) = names.position_table("decoder").filter(|name| weights.tensors.contains_key(*name))
        && infer_grid(&weights.tensors[name]) != Some((rows, cols))
    {
        return Err(weights.error(format!(
            "{name} is not the fixed sine-cosine table of {rows} × {cols} patches, and this model cannot hold learned \
             positions. Remove the decoder.* and mask_token tensors to import the encoder alone."
        )));
    }
    let grid = config.input.grid()?;
    // Only formats of this method store a position table.
    let catalog::Config::Mae(method) = &mut config.method else { return Ok(None) };
    if (rows, cols) == (grid.rows, grid.cols) || method.trained_grid.is_some() {
        return Ok(None);
    }
    method.trained_grid = Some([rows, cols]);
    Ok(Some(format!(
        "the file's positions are for {rows} × {cols} patches; they are interpolated to {} × {} \
         (method.mae.trained_grid)",
        grid.rows, grid.cols
    )))
}

/// Warns if the config normalizes pixels differently from the training.
fn statistics_note(config: &Config, metadata: &SourceMetadata) -> Result<Option<String>> {
    let (our_mean, our_std) = config.input.mean_std()?;
    let (Some(mean), Some(std)) = (&metadata.mean, &metadata.std) else { return Ok(None) };
    let is_same = *mean == our_mean && *std == our_std;
    Ok((!is_same).then(|| {
        format!(
            "the model was trained with mean {mean:?} and standard deviation {std:?}; the config says {our_mean:?} and \
             {our_std:?} (input.mean, input.std)"
        )
    }))
}

/// Lists the tensors that are not in the file.
fn initialized_note(initialized: &[&str], seed: u64) -> Option<String> {
    let is_decoder = initialized.iter().all(|name| name.starts_with("decoder."));
    let listed =
        if is_decoder { "decoder".to_owned() } else { initialized[..initialized.len().min(MAX_LISTED)].join(", ") };
    let count = initialized.len();
    (count > 0).then(|| format!("the file has no {listed}: {count} tensors are newly initialized from seed {seed}"))
}

/// Writes the checkpoint and the run's `config.json`.
fn write_run(options: &ImportOptions, config: &Config, flat: &FlatParams, initialized: &[&str]) -> Result<()> {
    let store = Store::open(&options.out)?;
    if !store.list_folders("checkpoints")?.is_empty() {
        return Err(Error::usage(format!("{} holds checkpoints already; give --out another place", store.url())));
    }
    let lease = Arc::new(Lease::acquire(&store, TIME_TO_LIVE)?);
    let mut saver = Saver::new(store.clone(), Retention { last: 1, every: None }, lease)?;
    let file = options.from.file_name().unwrap_or_default().to_string_lossy();
    saver.save(import_snapshot(flat, config, &options.format.to_string(), &file, initialized))?;
    saver.finish()?;
    let text = serde_json::to_string_pretty(&config.to_json()).expect("a config is JSON");
    store.put("config.json", (text + "\n").as_bytes())
}
