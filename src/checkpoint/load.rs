//! Reads the newest intact checkpoint; every byte is verified before a tensor is returned.

use super::manifest::{CheckpointPart, Manifest, ManifestError, read_manifest, scan, step_folder, unusable_checkpoint};
use super::{NamedTensor, lease};
use crate::data::store::Store;
use crate::error::{Error, ExitCode, Result};
use safetensors::SafeTensors;
use std::collections::BTreeMap;

/// Selects a checkpoint of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointSelector {
    /// The newest intact checkpoint.
    Latest,
    /// The checkpoint at exactly this step.
    Step(u64),
}

/// A verified checkpoint.
#[derive(Clone, Debug)]
pub struct LoadedCheckpoint {
    pub manifest: Manifest,
    /// Tensors by name.
    pub tensors: BTreeMap<String, NamedTensor>,
}

/// Reads a checkpoint of `run`, or returns `None` if the run has none. For [`CheckpointSelector::Latest`] a damaged
/// checkpoint is skipped with a warning, and the one before is read.
///
/// # Errors
/// [`ExitCode::Checkpoint`] if there are checkpoints and none can be used: training must not start again over them. The
/// store's own code if the store cannot be read.
pub fn load_from_run(run: &Store, selector: CheckpointSelector) -> Result<Option<LoadedCheckpoint>> {
    let mut problems = Vec::new();
    for entry in scan(run, lease::read_fence(run)?)?.into_iter().rev() {
        if matches!(selector, CheckpointSelector::Step(step) if step != entry.step) {
            continue;
        }
        let Some(manifest) = entry.manifest else { continue };
        let folder = run.subfolder(&step_folder(entry.step));
        let loaded = match manifest {
            Ok((manifest, _)) => {
                read_tensors(&folder, &manifest)?.map(|tensors| LoadedCheckpoint { manifest, tensors })
            }
            Err(problem) => Err(problem),
        };
        match loaded {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(problem) => {
                tracing::warn!("passing over the checkpoint at step {}: {problem}", entry.step);
                problems.push(format!("step {}: {problem}", entry.step));
            }
        }
    }
    if problems.is_empty() {
        return Ok(None);
    }
    Err(Error::new(
        ExitCode::Checkpoint,
        format!(
            "{}: no checkpoint there can be used ({}). Restore one from a copy, use the build that wrote it, or \
             choose another run.",
            run.url(),
            problems.join("; ")
        ),
    ))
}

/// Reads the checkpoint that a user names: a run (its newest intact checkpoint) or the folder of one checkpoint.
pub fn load_from_url(url: &str) -> Result<LoadedCheckpoint> {
    let store = Store::open(url)?;
    if let Some(manifest) = read_manifest(&store, None)? {
        let url = store.url();
        let (manifest, _) = manifest.map_err(|problem| unusable_checkpoint(&url, &problem.to_string()))?;
        let tensors = read_tensors(&store, &manifest)?;
        let tensors = tensors.map_err(|problem| unusable_checkpoint(&url, &problem.to_string()))?;
        return Ok(LoadedCheckpoint { manifest, tensors });
    }
    load_from_run(&store, CheckpointSelector::Latest)?.ok_or_else(|| {
        Error::usage(format!(
            "{}: no checkpoint there. Give a run's URL, or a folder checkpoints/step-NNNNNNNN with a manifest.json.",
            store.url()
        ))
    })
}

/// Reads all tensors of a checkpoint. The outer error is the store's; the inner one says what is damaged.
fn read_tensors(folder: &Store, manifest: &Manifest) -> Result<Result<BTreeMap<String, NamedTensor>, ManifestError>> {
    if let Err(problem) = check_sizes(folder, manifest)? {
        return Ok(Err(ManifestError::Damaged(problem)));
    }
    let mut tensors = BTreeMap::new();
    for part in &manifest.parts {
        let Some(bytes) = folder.get_optional(&part.name)? else {
            return Ok(Err(ManifestError::Damaged(format!("its part {} is missing", part.name))));
        };
        if let Err(problem) = unpack(part, &bytes, &mut tensors) {
            return Ok(Err(ManifestError::Damaged(format!("its part {} {problem}", part.name))));
        }
    }
    if tensors.len() != manifest.tensors {
        let problem = format!("it holds {} tensors, not {}", tensors.len(), manifest.tensors);
        return Ok(Err(ManifestError::Damaged(problem)));
    }
    Ok(Ok(tensors))
}

/// Compares the sizes of the parts with the manifest and with this machine's memory before any part is read.
fn check_sizes(folder: &Store, manifest: &Manifest) -> Result<Result<(), String>> {
    let mut total = 0u64;
    for part in &manifest.parts {
        match folder.size(&part.name)? {
            None => return Ok(Err(format!("its part {} is missing", part.name))),
            Some(bytes) if bytes != part.bytes => {
                return Ok(Err(format!("its part {} has {bytes} bytes, not {}", part.name, part.bytes)));
            }
            Some(bytes) => total = total.saturating_add(bytes),
        }
    }
    let info = rustix::system::sysinfo();
    let memory = (info.totalram as u64).saturating_mul(info.mem_unit.into());
    if total > memory {
        return Ok(Err(format!("it holds {total} bytes, and this machine has {memory} bytes of memory")));
    }
    Ok(Ok(()))
}

/// Verifies one part and adds its tensors.
fn unpack(part: &CheckpointPart, bytes: &[u8], tensors: &mut BTreeMap<String, NamedTensor>) -> Result<(), String> {
    if bytes.len() as u64 != part.bytes {
        return Err(format!("has {} bytes, not {}", bytes.len(), part.bytes));
    }
    let digest = blake3::hash(bytes).to_hex();
    if digest.as_str() != part.blake3 {
        return Err(format!("has the digest {digest}, not {}", part.blake3));
    }
    let file = SafeTensors::deserialize(bytes).map_err(|error| format!("is not a safetensors file: {error}"))?;
    for (name, view) in file.iter() {
        let tensor = NamedTensor {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        };
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return Err(format!("holds the tensor {name} a second time"));
        }
    }
    Ok(())
}
