//! The manifest of a checkpoint: its contents, protected by a digest of itself; and the rule that decides which
//! manifests belong to the run's lineage.

use crate::data::store::Store;
use crate::error::{Error, ExitCode, Result};
use serde::{Deserialize, Serialize};

/// The format version that this build writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// The name of the manifest in a checkpoint's folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Maximum size of a manifest in bytes; a real one has some kilobytes.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// The value of the seal while the seal is computed.
const UNSEALED: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The contents of `manifest.json`. Digests are BLAKE3 in lower-case hexadecimal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// See [`FORMAT_VERSION`].
    pub format: u32,
    /// The program that wrote it.
    pub build: String,
    /// Steps done.
    pub step: u64,
    /// Samples consumed.
    pub samples: u64,
    /// Number of ranks that trained it.
    pub world: usize,
    /// Epoch of the writer's lease; a later writer's is larger.
    pub epoch: u64,
    /// Random digits, new for every attempt; the parts' names begin with them.
    pub nonce: String,
    /// Digest of the manifest that the same run committed before, if there is one.
    pub previous: Option<String>,
    /// Number of tensors in all parts together.
    pub tensors: usize,
    pub parts: Vec<CheckpointPart>,
    /// The caller's own data.
    pub meta: serde_json::Value,
    /// Digest of this file's bytes with 64 zeros in place of this value.
    pub seal: String,
}

/// One safetensors file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPart {
    /// File name in the checkpoint's folder: `<nonce>-<index>.safetensors`.
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
}

/// The reason why a manifest cannot be used.
#[derive(Clone, Debug)]
pub enum ManifestError {
    /// Written by a newer build, in a format that this one does not know.
    Newer(String),
    /// Not what its writer wrote.
    Damaged(String),
    /// Intact, but committed by a writer that had lost the run, or before the run went back to an earlier step.
    Superseded(String),
}

impl std::fmt::Display for ManifestError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (ManifestError::Newer(reason) | ManifestError::Damaged(reason) | ManifestError::Superseded(reason)) = self;
        f.write_str(reason)
    }
}

/// A fence token that a new holder of the run sets: a manifest of an earlier epoch and a later step than this was
/// written by a writer that no longer held the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The holder's epoch.
    pub epoch: u64,
    /// The newest committed step when the holder took the run; `None` if there was no checkpoint.
    pub step: Option<u64>,
}

impl Manifest {
    /// Serializes this manifest and seals the text.
    pub fn to_text(&self) -> String {
        let unsealed = Manifest { seal: UNSEALED.to_owned(), ..self.clone() };
        seal(&serde_json::to_string_pretty(&unsealed).expect("a manifest is plain JSON"))
    }

    /// Parses and verifies a manifest found at `step` (`None` for a folder that the user named). No memory is allocated
    /// according to the numbers in it.
    pub fn from_bytes(bytes: &[u8], step: Option<u64>) -> Result<Manifest, ManifestError> {
        let damaged = |reason: String| ManifestError::Damaged(format!("its manifest is damaged: {reason}"));
        let header: FormatHeader = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        if header.format > FORMAT_VERSION {
            return Err(ManifestError::Newer(format!(
                "it is in checkpoint format {}, written by {}; this build ({}) reads up to {FORMAT_VERSION}",
                header.format,
                header.build.as_deref().unwrap_or("an unnamed build"),
                build_name()
            )));
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        let text = std::str::from_utf8(bytes).expect("valid JSON is UTF-8");
        if manifest.seal.len() != UNSEALED.len() || seal(text) != text {
            return Err(damaged("its seal does not match its contents".into()));
        }
        if step.is_some_and(|step| step != manifest.step) {
            return Err(damaged(format!("it is for step {}", manifest.step)));
        }
        for (index, part) in manifest.parts.iter().enumerate() {
            if part.name != part_file_name(&manifest.nonce, index) {
                return Err(damaged(format!("{:?} is not the name of its part {index}", part.name)));
            }
        }
        if manifest.nonce.len() != 32 || !manifest.nonce.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(damaged("its nonce is not 32 hexadecimal digits".into()));
        }
        Ok(manifest)
    }
}

/// The fields that every format version has, to distinguish a newer format from a damaged file.
#[derive(Deserialize)]
struct FormatHeader {
    format: u32,
    build: Option<String>,
}

/// Returns the program's name and version.
pub fn build_name() -> String {
    concat!("occlude ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// Computes the seal of a manifest's text anew: the 64 characters after the last `"seal": "` become the digest of the
/// text with 64 zeros in their place.
pub fn seal(text: &str) -> String {
    const FIELD: &str = "\"seal\": \"";
    let Some(start) = text.rfind(FIELD).map(|position| position + FIELD.len()) else { return text.to_owned() };
    let end = start + UNSEALED.len();
    let (Some(head), Some(tail)) = (text.get(..start), text.get(end..)) else { return text.to_owned() };
    let digest = blake3::hash(format!("{head}{UNSEALED}{tail}").as_bytes()).to_hex();
    format!("{head}{digest}{tail}")
}

/// Returns the file name of part `index`.
pub fn part_file_name(nonce: &str, index: usize) -> String {
    format!("{nonce}-{index:02}.safetensors")
}

/// Returns the folder of the checkpoint at `step`, relative to the run: `checkpoints/step-00000200`.
pub fn step_folder(step: u64) -> String {
    format!("checkpoints/step-{step:08}")
}

/// Parses the name of a checkpoint's folder: `step-` and at least 8 digits, exactly as [`step_folder`] writes it.
pub fn parse_step(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
    (format!("{step:08}") == digits).then_some(step)
}

/// Reads the manifest of a checkpoint's folder and the digest of its bytes; `None` if there is no manifest.
pub fn read_manifest(folder: &Store, step: Option<u64>) -> Result<Option<Result<(Manifest, String), ManifestError>>> {
    match folder.size(MANIFEST_FILE)? {
        None => return Ok(None),
        Some(bytes) if bytes > MAX_MANIFEST_BYTES => {
            let reason = format!("its manifest has {bytes} bytes, more than any manifest");
            return Ok(Some(Err(ManifestError::Damaged(reason))));
        }
        Some(_) => {}
    }
    // Another process's retention may have removed the manifest since: then there is none.
    let Some(bytes) = folder.get_optional(MANIFEST_FILE)? else { return Ok(None) };
    let digest = blake3::hash(&bytes).to_hex().to_string();
    Ok(Some(Manifest::from_bytes(&bytes, step).map(|manifest| (manifest, digest))))
}

/// One `step-` folder.
#[derive(Clone, Debug)]
pub struct CheckpointEntry {
    pub step: u64,
    /// The manifest and the digest of its bytes, or the reason why it cannot be used; `None` for a folder without a
    /// manifest.
    pub manifest: Option<Result<(Manifest, String), ManifestError>>,
}

impl CheckpointEntry {
    /// Returns the manifest and its digest if it can be used.
    pub fn usable_manifest(&self) -> Option<&(Manifest, String)> {
        self.manifest.as_ref()?.as_ref().ok()
    }
}

/// Lists the checkpoint folders of a run in ascending order of step, with their manifests (parts are not read).
///
/// A manifest belongs to the lineage unless it is beyond the `fence`, or a later writer committed an earlier step: that
/// writer had gone back, and what was ahead of it no longer continues the run.
pub fn scan(run: &Store, fence: Option<Fence>) -> Result<Vec<CheckpointEntry>> {
    let mut steps: Vec<u64> = run.list_folders("checkpoints")?.iter().filter_map(|name| parse_step(name)).collect();
    steps.sort_unstable();
    let mut entries = Vec::with_capacity(steps.len());
    let mut max_epoch = 0;
    for step in steps {
        let manifest = read_manifest(&run.subfolder(&step_folder(step)), Some(step))?.map(|manifest| {
            let (manifest, digest) = manifest?;
            let is_beyond_fence = fence.is_some_and(|fence| {
                manifest.epoch < fence.epoch && fence.step.is_none_or(|newest| manifest.step > newest)
            });
            if is_beyond_fence || manifest.epoch < max_epoch {
                return Err(ManifestError::Superseded(format!(
                    "its writer (epoch {}) had lost the run, or the run was taken back to an earlier step since (epoch \
                     {}). To use it all the same, point --resume at its folder from a new run",
                    manifest.epoch,
                    max_epoch.max(fence.map_or(0, |fence| fence.epoch))
                )));
            }
            max_epoch = manifest.epoch;
            Ok((manifest, digest))
        });
        entries.push(CheckpointEntry { step, manifest });
    }
    Ok(entries)
}

/// Creates the error for a checkpoint that cannot be used.
pub fn unusable_checkpoint(url: &str, reason: &str) -> Error {
    Error::new(ExitCode::Checkpoint, format!("{url} cannot be used: {reason}."))
}
