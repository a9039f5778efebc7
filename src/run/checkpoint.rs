//! Checkpoints: safetensors parts under names never reused, then a manifest as the last write.
//!
//! ```text
//! <run>/checkpoints/step-00000200/<nonce>-00.safetensors   parts, each with its digest in the manifest
//!                                 <nonce>-01.safetensors
//!                                 manifest.json            the commit: without it the folder is no checkpoint
//! ```
//!
//! A writer cut off at any moment leaves the checkpoint before it whole. A reader trusts nothing: lengths and digests
//! are checked before a tensor is handed out, and a damaged checkpoint is passed over for the one before it, aloud.
//!
//! `manifest` is the format, `save` the writer, `load` the reader.

mod load;
mod manifest;
mod save;

pub use load::{Loaded, Which, find, open};
pub use manifest::{FORMAT, Manifest, Part, folder, seal};
pub(super) use manifest::{Fence, survey};
pub use save::{Keep, Point, Saver, required_bytes};

use safetensors::Dtype;

/// One tensor as bytes: row-major, little-endian, exactly as they are written and read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// All that a run needs to go on after `step`, taken between two steps and owned, so that it can be written while
/// training continues.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// Samples consumed: the position in the order of samples.
    pub samples: u64,
    /// Ranks that trained it.
    pub world: usize,
    /// What else the caller wants back: digests of config and model, the optimizer's scalars. Numbers with a fraction
    /// belong into a tensor, or here as their bits: JSON does not bring every one back to the last bit.
    pub meta: serde_json::Value,
    pub tensors: Vec<Named>,
}
