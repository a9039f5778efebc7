//! `occlude import`: other people's weights become a checkpoint of step 0.
//!
//! Such a checkpoint holds weights alone: no moments (training begins with zeros) and no position in the order of samples.
//! Its config is the user's, or one derived from the file. A training may begin from it under any recipe; only the
//! sections that give the weights their meaning, `input` and `method`, must agree.

use super::about::About;
use super::file::{Sheet, read};
use super::model::Model;
use super::names::Names;
use super::{Format, derive, position};
use crate::config::Config;
use crate::data::store::Store;
use crate::fault::{Fault, Result};
use crate::method::{Method, catalog};
use crate::optim::flat::Flat;
use crate::run::checkpoint::{Keep, Saver};
use crate::run::lease::{Lease, TIME_TO_LIVE};
use crate::run::state;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// How many complaints of one kind are told.
const TOLD: usize = 5;

/// What to import.
#[derive(Clone, Debug)]
pub struct Order {
    pub format: Format,
    /// A file of weights, or the folder of one.
    pub from: PathBuf,
    /// The run to make.
    pub out: String,
    /// The config that the checkpoint gets instead of a derived one.
    pub config: Option<PathBuf>,
    /// Overrides of either.
    pub set: Vec<String>,
}

/// Reads and checks everything, then writes `out`. Returns what the user should know, a line each.
pub fn import(order: &Order) -> Result<Vec<String>> {
    let mut sheet = read(&order.from)?;
    if order.format == Format::Transformers {
        sheet.name_bare_encoder();
    }
    let names = recognise(&sheet, order.format)?;
    let about = (names.about)(&sheet)?;
    let (mut config, assumed) = match &order.config {
        Some(path) => (Config::read(path, &order.set)?, Vec::new()),
        None => derive::config(&sheet, names, &about, &order.set)?,
    };
    let stretched = positions(&sheet, names, &mut config)?;
    agrees(&sheet, names, &about, &config)?;
    let method = config.method.build(&config.input)?;
    let flat = Flat::new(method.table(), config.train.seed, Kind::Float, Device::Cpu)?;
    let taken = take(&sheet, names, method.as_ref(), &flat)?;
    let mut lines =
        vec![format!("read {} tensors from {} under {} names", sheet.tensors.len(), sheet.path.display(), names.title)];
    lines.extend(about.notes);
    lines.extend(assumed);
    lines.extend(stretched);
    lines.extend(counted(&config, names, about.frames.zip(about.size)));
    lines.extend(statistics(&config, about.mean.zip(about.std))?);
    let fresh: Vec<&str> = fresh(&flat, &taken);
    if !fresh.is_empty() {
        let what = match fresh.iter().all(|name| name.starts_with("decoder.")) {
            true => "decoder".to_owned(),
            false => fresh[..fresh.len().min(TOLD)].join(", "),
        };
        let (count, seed) = (fresh.len(), config.train.seed);
        lines.push(format!("the file has no {what}: {count} tensors are freshly drawn from seed {seed}"));
    }
    write(order, &config, &flat, &fresh)?;
    lines.push(format!("wrote {}: a checkpoint of step 0", order.out));
    Ok(lines)
}

/// Which of the format's sets of names the file uses.
fn recognise(sheet: &Sheet, format: Format) -> Result<&'static Names> {
    const PROBES: [&str; 3] =
        ["encoder.norm.weight", "encoder.blocks.0.attn.qkv.weight", "decoder.blocks.0.attn.qkv.weight"];
    let known = |names: &Names| {
        let there = |ours: &&&str| names.theirs(ours).is_some_and(|theirs| sheet.tensors.contains_key(&theirs[0]));
        PROBES.iter().filter(there).count()
    };
    // Of equals the first: `max_by_key` would take the last.
    let best = format.names().iter().rev().max_by_key(|names| known(names)).expect("a set of names");
    if known(best) > 0 {
        return Ok(best);
    }
    let other = Format::ALL.into_iter().find(|other| other.names().iter().any(|names| known(names) > 0));
    let hint = match other {
        Some(other) => format!("they look like --format {other}"),
        None => format!("wanted names such as {}", best.theirs(PROBES[1]).expect("a name")[0]),
    };
    let some: Vec<&str> = sheet.tensors.keys().take(TOLD).map(String::as_str).collect();
    Err(sheet.wrong(format!("its names are not {}: it begins with {}; {hint}.", best.title, some.join(", "))))
}

/// The config is of the file's method, and does not contradict what stands beside the file about heads, which shapes
/// would not show.
fn agrees(sheet: &Sheet, names: &Names, about: &About, config: &Config) -> Result<()> {
    let (model, wanted) = (Model::of(&config.method)?, names.custom.method);
    if model.method != wanted {
        return Err(sheet.wrong(format!(
            "the names are {}, of method.{wanted}, and the config has method.{}. Give a config of that method, or none.",
            names.title, model.method
        )));
    }
    for ((part, shape), theirs) in model.heads().into_iter().zip([about.heads, about.decoder_heads]) {
        if let Some(theirs) = theirs.filter(|theirs| *theirs != shape.heads) {
            return Err(sheet.wrong(format!(
                "method.{wanted}.{part}.heads is {}, and config.json beside the file says {theirs}. Give that number, or \
                 move config.json away if it is wrong.",
                shape.heads
            )));
        }
    }
    Ok(())
}

/// Positions that are counted through all tokens mean another place on another grid: says where the config's differs.
fn counted(config: &Config, names: &Names, told: Option<(i64, [i64; 2])>) -> Option<String> {
    let input = &config.input;
    let ours = (input.frames, [input.height, input.width]);
    let (frames, [height, width]) = told.filter(|told| names.positions.is_empty() && *told != ours)?;
    Some(format!(
        "the model saw {frames} frames of {height} × {width} pixels, the config says {} of {} × {}: its positions are \
         counted through the tokens, and what it has learnt of them holds no longer",
        input.frames, input.height, input.width
    ))
}

/// Puts the file's tensors into `flat` and returns the names of ours that it had. Refused, before anything is changed:
/// tensors that are missing (but for a whole decoder), of another shape, or unknown.
fn take(sheet: &Sheet, names: &Names, method: &dyn Method, flat: &Flat) -> Result<BTreeSet<String>> {
    let (mut found, mut used) = (BTreeMap::new(), BTreeSet::new());
    let (mut missing, mut shapes) = (Vec::new(), Vec::new());
    for (index, spec) in flat.specs.iter().enumerate() {
        let Some(theirs) = names.theirs(&spec.name) else { continue };
        let wanted = names.shape(&spec.name, &spec.shape, theirs.len(), method.grid());
        for name in &theirs {
            match sheet.tensors.get(name) {
                None => missing.push(name.clone()),
                Some(tensor) if tensor.size() != wanted => {
                    shapes.push(format!("{name} is {:?}, wanted {wanted:?}", tensor.size()));
                }
                Some(_) => {}
            }
        }
        let parts: Option<Vec<Tensor>> =
            theirs.iter().map(|name| Some(sheet.tensors.get(name)?.to_kind(Kind::Float))).collect();
        used.extend(theirs);
        found.extend(parts.map(|parts| (index, parts)));
    }
    let decoder = |name: &String| names.is_decoders(name);
    if !sheet.tensors.keys().any(decoder) {
        missing.retain(|name| !decoder(name));
    }
    used.extend(names.positions.iter().map(|(_, theirs)| theirs.to_string()));
    let unknown: Vec<String> = sheet.tensors.keys().filter(|name| !used.contains(*name)).cloned().collect();
    let near = |name: &String, among: &[String]| {
        let likeness = |other: &&String| (1000.0 * strsim::jaro_winkler(name, other)) as u32;
        among.iter().max_by_key(likeness).map_or(name.clone(), |other| format!("{name} (nearest: {other})"))
    };
    let known: Vec<String> = used.into_iter().collect();
    let unheard: Vec<String> = unknown.iter().map(|name| near(name, &known)).collect();
    let absent: Vec<String> = missing.iter().map(|name| near(name, &unknown)).collect();
    for (what, all, remedy) in [
        ("lacks", absent, "Is it whole, and of the depth that the config says?"),
        ("has tensors that this model does not know:", unheard, "Remove them, or choose another --format."),
        ("is of another shape:", shapes, "Give the config of this model, or none: it is then derived from the file."),
    ] {
        if !all.is_empty() {
            let more = if all.len() > TOLD { format!(" and {} more", all.len() - TOLD) } else { String::new() };
            return Err(sheet.wrong(format!("it {what} {}{more}. {remedy}", all[..all.len().min(TOLD)].join("; "))));
        }
    }
    let place = |(index, parts): (usize, Vec<Tensor>)| {
        let spec = &flat.specs[index];
        let ours = names.take(&spec.name, &parts, method.grid()).view(spec.shape.as_slice());
        no_grad(|| flat.part(&flat.master, index).copy_(&ours));
        spec.name.clone()
    };
    Ok(found.into_iter().map(place).collect())
}

/// The tensors of ours that the file did not bring.
fn fresh<'a>(flat: &'a Flat, taken: &BTreeSet<String>) -> Vec<&'a str> {
    flat.specs.iter().map(|spec| spec.name.as_str()).filter(|name| !taken.contains(*name)).collect()
}

/// Checks that the file's positions are sine-cosine tables. Where the model's grid is another, the config is told which
/// one they are to be interpolated from, unless it says so itself.
fn positions(sheet: &Sheet, names: &Names, config: &mut Config) -> Result<Option<String>> {
    let Some((rows, cols)) = derive::grid(sheet, names)? else { return Ok(None) };
    if let Some(name) = names.position("decoder").filter(|name| sheet.tensors.contains_key(*name))
        && position::grid_of(&sheet.tensors[name]) != Some((rows, cols))
    {
        return Err(sheet.wrong(format!(
            "{name} is not the fixed sine-cosine table of {rows} × {cols} patches; this model has no place for learned \
             positions. Remove the decoder.* and mask_token tensors to keep the encoder."
        )));
    }
    let grid = config.input.grid()?;
    // No other method's positions are a table that a file keeps.
    let catalog::Config::Mae(method) = &mut config.method else { return Ok(None) };
    if (rows, cols) == (grid.rows, grid.cols) || method.trained_grid.is_some() {
        return Ok(None);
    }
    method.trained_grid = Some([rows, cols]);
    Ok(Some(format!(
        "the file's positions are for {rows} × {cols} patches; they are interpolated to {} × {} (method.mae.trained_grid)",
        grid.rows, grid.cols
    )))
}

/// Says where the config normalises pixels in another way than the model was trained with.
fn statistics(config: &Config, told: Option<(Vec<f64>, Vec<f64>)>) -> Result<Option<String>> {
    let ours = config.input.scale()?;
    Ok(told.filter(|told| *told != ours).map(|(mean, std)| {
        format!(
            "the model was trained with mean {mean:?} and deviation {std:?}; the config says {:?} and {:?} (input.mean, \
             input.std)",
            ours.0, ours.1
        )
    }))
}

/// The checkpoint and, beside it, the config for going on from it.
fn write(order: &Order, config: &Config, flat: &Flat, fresh: &[&str]) -> Result<()> {
    let store = Store::open(&order.out)?;
    if !store.folders("checkpoints")?.is_empty() {
        return Err(Fault::usage(format!("{} holds checkpoints already; give --out another place", store.url())));
    }
    let lease = Arc::new(Lease::acquire(&store, TIME_TO_LIVE)?);
    let mut saver = Saver::new(store.clone(), Keep { last: 1, every: None }, lease)?;
    let file = order.from.file_name().unwrap_or_default().to_string_lossy();
    saver.save(state::imported(flat, config, &order.format.to_string(), &file, fresh))?;
    saver.finish()?;
    let text = serde_json::to_string_pretty(&config.resolved()).expect("a config is JSON");
    store.put("config.json", (text + "\n").as_bytes())
}
