//! The reader: the newest whole checkpoint, every byte of it checked before a tensor is handed out.

use super::Named;
use super::manifest::{Manifest, Part, Refusal, folder, read, refused, survey};
use crate::data::store::Store;
use crate::fault::{Code, Fault, Result};
use crate::run::lease;
use safetensors::SafeTensors;
use std::collections::BTreeMap;

/// Which checkpoint of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The newest whole one.
    Latest,
    /// The one at this step and no other.
    Step(u64),
}

/// A whole checkpoint.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub manifest: Manifest,
    /// The tensors by name.
    pub tensors: BTreeMap<String, Named>,
}

/// Reads a checkpoint of `run`, None where the run has none.
///
/// For [`Which::Latest`] a damaged checkpoint is passed over with a warning for the one before it. Checkpoints that
/// are there and none of which can be used are a fault with exit code 78, never None: training must not begin anew
/// over them. A store that cannot be read is a fault of its own.
pub fn find(run: &Store, which: Which) -> Result<Option<Loaded>> {
    let mut refusals = Vec::new();
    for entry in survey(run, lease::fence(run)?)?.into_iter().rev() {
        if matches!(which, Which::Step(step) if step != entry.step) {
            continue;
        }
        let Some(found) = entry.found else { continue };
        let at = run.at(&folder(entry.step));
        let outcome = match found {
            Ok((manifest, _)) => tensors(&at, &manifest)?.map(|tensors| Loaded { manifest, tensors }),
            Err(refusal) => Err(refusal),
        };
        match outcome {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(why) => {
                tracing::warn!("passing over the checkpoint at step {}: {why}", entry.step);
                refusals.push(format!("step {}: {why}", entry.step));
            }
        }
    }
    match refusals.is_empty() {
        true => Ok(None),
        false => Err(Fault::new(
            Code::Checkpoint,
            format!(
                "{}: no checkpoint there can be used ({}). Restore one from a copy, use the build that wrote it, or \
                 choose another run.",
                run.url(),
                refusals.join("; ")
            ),
        )),
    }
}

/// Reads the checkpoint that a user points at: a run (its newest whole one) or the folder of one checkpoint.
pub fn open(url: &str) -> Result<Loaded> {
    let store = Store::open(url)?;
    if let Some(found) = read(&store, None)? {
        let place = store.url();
        let (manifest, _) = found.map_err(|why| refused(&place, &why.to_string()))?;
        let tensors = tensors(&store, &manifest)?.map_err(|why| refused(&place, &why.to_string()))?;
        return Ok(Loaded { manifest, tensors });
    }
    find(&store, Which::Latest)?.ok_or_else(|| {
        Fault::usage(format!(
            "{}: no checkpoint there. Give a run's URL, or a folder checkpoints/step-NNNNNNNN with a manifest.json.",
            store.url()
        ))
    })
}

/// All tensors of a checkpoint. The outer fault is the store's; the inner one says what is damaged.
fn tensors(at: &Store, manifest: &Manifest) -> Result<Result<BTreeMap<String, Named>, Refusal>> {
    if let Err(why) = weigh(at, manifest)? {
        return Ok(Err(Refusal::Damaged(why)));
    }
    let mut all = BTreeMap::new();
    for part in &manifest.parts {
        let Some(bytes) = at.get_if_there(&part.name)? else {
            return Ok(Err(Refusal::Damaged(format!("its part {} is missing", part.name))));
        };
        if let Err(why) = unpack(part, &bytes, &mut all) {
            return Ok(Err(Refusal::Damaged(format!("its part {} {why}", part.name))));
        }
    }
    Ok(match all.len() == manifest.tensors {
        true => Ok(all),
        false => Err(Refusal::Damaged(format!("it holds {} tensors, not {}", all.len(), manifest.tensors))),
    })
}

/// Compares the parts' real sizes with the claimed ones and with this machine's memory, before any is read.
fn weigh(at: &Store, manifest: &Manifest) -> Result<Result<(), String>> {
    let mut total = 0u64;
    for part in &manifest.parts {
        match at.size(&part.name)? {
            None => return Ok(Err(format!("its part {} is missing", part.name))),
            Some(bytes) if bytes != part.bytes => {
                return Ok(Err(format!("its part {} has {bytes} bytes, not {}", part.name, part.bytes)));
            }
            Some(bytes) => total = total.saturating_add(bytes),
        }
    }
    let info = rustix::system::sysinfo();
    let memory = (info.totalram as u64).saturating_mul(info.mem_unit.into());
    Ok(match total <= memory {
        true => Ok(()),
        false => Err(format!("it holds {total} bytes, and this machine has {memory} bytes of memory")),
    })
}

/// Checks one part and adds its tensors to `all`.
fn unpack(part: &Part, bytes: &[u8], all: &mut BTreeMap<String, Named>) -> Result<(), String> {
    if bytes.len() as u64 != part.bytes {
        return Err(format!("has {} bytes, not {}", bytes.len(), part.bytes));
    }
    let digest = blake3::hash(bytes).to_hex();
    if digest.as_str() != part.blake3 {
        return Err(format!("has the digest {digest}, not {}", part.blake3));
    }
    let read = SafeTensors::deserialize(bytes).map_err(|error| format!("is not a safetensors file: {error}"))?;
    for (name, view) in read.iter() {
        let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        if all.insert(name.to_owned(), Named { name: name.to_owned(), dtype, shape, bytes }).is_some() {
            return Err(format!("holds the tensor {name} a second time"));
        }
    }
    Ok(())
}
