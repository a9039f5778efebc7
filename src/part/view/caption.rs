//! How captions are read: the config's `view.caption`.

use crate::fault::{Fault, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Caption {
    /// A local vocabulary: `tokenizer.json`, BERT's `vocab.txt`, CLIP's `vocab.json` (with `merges.txt` beside it) or
    /// `bpe_simple_vocab_16e6.txt.gz`; `occlude pack --train-tokenizer` makes one.
    pub tokenizer: String,
    /// Tokens of a caption: longer ones are cut, shorter ones padded (FLIP 32, CLIP 77).
    pub length: i64,
}

impl Caption {
    pub fn check(&self) -> Result<()> {
        match (1..=4096).contains(&self.length) {
            true => Ok(()),
            false => Err(Fault::usage(format!("view.caption.length is {}; it must lie in 1..=4096", self.length))),
        }
    }
}
