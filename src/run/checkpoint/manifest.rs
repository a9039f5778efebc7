//! The manifest: what a checkpoint holds, sealed by its own digest; and which manifests belong to the run's lineage.

use crate::data::store::Store;
use crate::fault::{Code, Fault, Result};
use serde::{Deserialize, Serialize};

/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// The name of the commit object in a checkpoint's folder.
pub const MANIFEST: &str = "manifest.json";

/// A manifest is some kilobytes; what is larger than this (bytes) is not one.
const LARGEST: u64 = 64 << 20;

/// What stands in the seal's place while the seal is computed.
const UNSEALED: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The contents of `manifest.json`. Digests are BLAKE3 in lower-case hex.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// See [`FORMAT`].
    pub format: u32,
    /// The program that wrote it.
    pub build: String,
    /// Steps done.
    pub step: u64,
    /// Samples consumed.
    pub samples: u64,
    /// Ranks that trained it.
    pub world: usize,
    /// Epoch of the writer's lease: a later writer's is larger.
    pub epoch: u64,
    /// Drawn anew for every attempt; the parts' names begin with it.
    pub nonce: String,
    /// Digest of the manifest that the same run committed before, if there was one.
    pub previous: Option<String>,
    /// Number of tensors in all parts together.
    pub tensors: usize,
    pub parts: Vec<Part>,
    /// The caller's own.
    pub meta: serde_json::Value,
    /// Digest of this file's bytes with 64 zeros in the place of this value.
    pub seal: String,
}

/// One safetensors file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// File name in the checkpoint's folder: `<nonce>-<number>.safetensors`.
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
}

/// Why a manifest cannot be used.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// Written by a newer build, in a format that this one does not know.
    Newer(String),
    /// Not what its writer wrote.
    Damaged(String),
    /// Whole, but committed by a writer that had lost the run, or before the run was taken back to an earlier step.
    Superseded(String),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Refusal::Newer(why) | Refusal::Damaged(why) | Refusal::Superseded(why)) = self;
        f.write_str(why)
    }
}

/// The line that a new holder of the run draws: a manifest of an earlier epoch and a later step than this came from a
/// writer that no longer held the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The holder's epoch.
    pub epoch: u64,
    /// The newest step committed when the holder took the run; None where there was no checkpoint.
    pub step: Option<u64>,
}

impl Manifest {
    /// The sealed text of this manifest.
    pub fn to_text(&self) -> String {
        let unsealed = Manifest { seal: UNSEALED.to_owned(), ..self.clone() };
        seal(&serde_json::to_string_pretty(&unsealed).expect("a manifest is plain JSON"))
    }

    /// Reads and checks a manifest found at `step` (None: wherever the user pointed). Nothing is allocated by the
    /// numbers that it claims.
    pub fn from_bytes(bytes: &[u8], step: Option<u64>) -> Result<Manifest, Refusal> {
        let damaged = |why: String| Refusal::Damaged(format!("its manifest is damaged: {why}"));
        let head: Head = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        if head.format > FORMAT {
            return Err(Refusal::Newer(format!(
                "it is in checkpoint format {}, written by {}; this build ({}) reads up to {FORMAT}",
                head.format,
                head.build.as_deref().unwrap_or("an unnamed build"),
                build()
            )));
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        let text = std::str::from_utf8(bytes).expect("JSON was read from it");
        if manifest.seal.len() != UNSEALED.len() || seal(text) != text {
            return Err(damaged("its seal does not match its contents".into()));
        }
        if step.is_some_and(|step| step != manifest.step) {
            return Err(damaged(format!("it is for step {}", manifest.step)));
        }
        if let Some(part) =
            manifest.parts.iter().enumerate().find(|(i, part)| part.name != part_name(&manifest.nonce, *i))
        {
            return Err(damaged(format!("{:?} is not the name of its part {}", part.1.name, part.0)));
        }
        if manifest.nonce.len() != 32 || !manifest.nonce.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(damaged("its nonce is not 32 hexadecimal digits".into()));
        }
        Ok(manifest)
    }
}

/// What every format has, for telling a newer one from a broken one.
#[derive(Deserialize)]
struct Head {
    format: u32,
    build: Option<String>,
}

/// The program's name and version.
pub fn build() -> String {
    concat!("occlude ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// The text of a manifest with its seal computed anew: the 64 characters after the last `"seal": "` become the digest
/// of the text with 64 zeros in that place.
pub fn seal(text: &str) -> String {
    const FIELD: &str = "\"seal\": \"";
    let Some(from) = text.rfind(FIELD).map(|at| at + FIELD.len()) else { return text.to_owned() };
    let to = from + UNSEALED.len();
    let (Some(head), Some(tail)) = (text.get(..from), text.get(to..)) else { return text.to_owned() };
    let digest = blake3::hash(format!("{head}{UNSEALED}{tail}").as_bytes()).to_hex();
    format!("{head}{digest}{tail}")
}

/// The file name of part `index`.
pub fn part_name(nonce: &str, index: usize) -> String {
    format!("{nonce}-{index:02}.safetensors")
}

/// The folder of the checkpoint at `step`, below the run: `checkpoints/step-00000200`.
pub fn folder(step: u64) -> String {
    format!("checkpoints/step-{step:08}")
}

/// The step that a folder's name stands for: `step-` and at least 8 digits, as [`folder`] writes it, nothing else.
pub fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    (format!("{step:08}") == digits).then_some(step)
}

/// The manifest in the folder `at`, with the digest of its bytes; None when there is none.
pub fn read(at: &Store, step: Option<u64>) -> Result<Option<Result<(Manifest, String), Refusal>>> {
    match at.size(MANIFEST)? {
        None => return Ok(None),
        Some(bytes) if bytes > LARGEST => {
            return Ok(Some(Err(Refusal::Damaged(format!("its manifest has {bytes} bytes, more than any manifest")))));
        }
        Some(_) => {}
    }
    // A manifest that retention removed in the meantime is absent, not a fault.
    let Some(bytes) = at.get_if_there(MANIFEST)? else { return Ok(None) };
    let digest = blake3::hash(&bytes).to_hex().to_string();
    Ok(Some(Manifest::from_bytes(&bytes, step).map(|manifest| (manifest, digest))))
}

/// What lies in one `step-` folder.
#[derive(Clone, Debug)]
pub struct Entry {
    pub step: u64,
    /// The manifest and the digest of its bytes, or why it is refused; None for a folder without a manifest.
    pub found: Option<Result<(Manifest, String), Refusal>>,
}

impl Entry {
    /// The manifest, if it can be used.
    pub fn usable(&self) -> Option<&(Manifest, String)> {
        self.found.as_ref()?.as_ref().ok()
    }
}

/// Every checkpoint folder of a run in rising order of step, manifests read (parts are not).
///
/// A manifest belongs to the lineage unless it lies beyond the `fence`, or an earlier step was committed by a later
/// writer: that writer had gone back, and what lay ahead of it is no longer the run's future.
pub fn survey(run: &Store, fence: Option<Fence>) -> Result<Vec<Entry>> {
    let mut steps: Vec<u64> = run.folders("checkpoints")?.iter().filter_map(|name| step_of(name)).collect();
    steps.sort_unstable();
    let mut entries = Vec::with_capacity(steps.len());
    let mut reached = 0;
    for step in steps {
        let found = read(&run.at(&folder(step)), Some(step))?.map(|found| {
            let (manifest, digest) = found?;
            let beyond =
                fence.is_some_and(|f| manifest.epoch < f.epoch && f.step.is_none_or(|last| manifest.step > last));
            if beyond || manifest.epoch < reached {
                return Err(Refusal::Superseded(format!(
                    "its writer (epoch {}) had lost the run, or the run was taken back to an earlier step since (epoch \
                     {}). To use it all the same, point --resume at its folder from a new run",
                    manifest.epoch,
                    reached.max(fence.map_or(0, |f| f.epoch))
                )));
            }
            reached = manifest.epoch;
            Ok((manifest, digest))
        });
        entries.push(Entry { step, found });
    }
    Ok(entries)
}

/// The fault of a checkpoint that cannot be used.
pub fn refused(place: &str, why: &str) -> Fault {
    Fault::new(Code::Checkpoint, format!("{place} cannot be used: {why}."))
}
