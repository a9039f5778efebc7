//! Checkpoints: safetensors parts with names that are never reused, and a manifest written last.
//!
//! ```text
//! <run>/checkpoints/step-00000200/<nonce>-00.safetensors   parts, each with its digest in the manifest
//!                                 <nonce>-01.safetensors
//!                                 manifest.json            the commit: a folder without it is not a checkpoint
//! ```
//!
//! A writer that is interrupted at any moment leaves the previous checkpoint intact. A reader verifies lengths and
//! digests before it returns a tensor. It skips a damaged checkpoint with a warning and reads the one before.

pub mod lease; // one writer per run
mod load; // the reader
mod manifest; // the format
mod save; // the writer
pub mod weights; // weights alone: for reading, and to start another training

pub use load::{CheckpointSelector, LoadedCheckpoint, load_from_run, load_from_url};
pub use manifest::{CheckpointPart, FORMAT_VERSION, Manifest, seal, step_folder};
use manifest::{Fence, scan};
pub use save::{Retention, SavePoint, Saver, required_bytes};

use safetensors::Dtype;

/// One tensor as bytes: row-major, little-endian, as it is written and read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Everything that a run needs to continue after `step`. It is taken between two steps and owns its data, so that it
/// can be written while training continues.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// Samples consumed: the position in the sample order.
    pub samples: u64,
    /// Number of ranks that trained it.
    pub world: usize,
    /// The caller's own data, such as the config. A number with a fraction belongs into a tensor or must be stored as
    /// its bits, since JSON does not preserve every bit.
    pub meta: serde_json::Value,
    pub tensors: Vec<NamedTensor>,
}
