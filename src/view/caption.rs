//! The config's `view.caption`: how captions are read.

use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Captions and their tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptionConfig {
    /// Path of a vocabulary: `tokenizer.json`, BERT's `vocab.txt`, CLIP's `vocab.json` (with `merges.txt` beside it) or
    /// `bpe_simple_vocab_16e6.txt.gz`; `occlude pack --train-tokenizer` makes one.
    pub tokenizer: String,
    /// Tokens of a caption: longer ones are cut, shorter ones padded (FLIP 32, CLIP 77).
    pub context_length: i64,
}

impl CaptionConfig {
    /// Refuses a length out of range.
    pub fn check(&self) -> Result<()> {
        if (1..=4096).contains(&self.context_length) {
            return Ok(());
        }
        Err(Error::usage(format!("view.caption.context_length is {}; it must lie in 1..=4096", self.context_length)))
    }
}
