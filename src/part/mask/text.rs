//! Tokens of captions hidden, which FLIP's paper tries in an ablation and leaves out.

use super::policy::random_keep;
use crate::error::{Error, Result};
use crate::grid::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Sets the draw of a caption apart from that of its image.
const STREAM: u64 = 0x63_6170_7469_6f6e;

/// Hides tokens of a caption from the text encoder. The pooled token is never hidden; the paper leaves that open.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextMask {
    /// The share of tokens hidden, in (0, 1) (paper: 0.5).
    pub ratio: f64,
    /// Padding is hidden before words are (paper: 67.8 against 66.0 % at random, and 68.2 % with nothing hidden).
    #[serde(default = "yes")]
    pub padding_first: bool,
    /// The token that pads captions, as the vocabulary has it.
    #[serde(default)]
    pub padding: i64,
}

fn yes() -> bool {
    true
}

impl TextMask {
    /// Checks the values, which stand at `at` in the config, for captions of `length` tokens.
    pub fn check(&self, at: &str, length: i64) -> Result<()> {
        let ratio = self.ratio;
        let kept = self.visible_tokens(length);
        if ratio > 0.0 && ratio < 1.0 && kept >= 1 && kept < length {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{at}.ratio is {ratio}, which keeps {kept} of {length} tokens; it is the share hidden, 0.5 in the paper, and at \
             least one must be kept and one hidden"
        )))
    }

    /// Returns the number of visible tokens of `length`.
    pub fn visible_tokens(&self, length: i64) -> i64 {
        (length as f64 * (1.0 - self.ratio)) as i64
    }

    /// Samples the visible positions of ids [B, L], ascending: int64 [B, K]. `pooled_index` [B, 1] holds the positions
    /// of the pooled tokens.
    pub fn sample(&self, ids: &Tensor, pooled_index: &Tensor, seed: u64, origins: &Tensor) -> Tensor {
        let length = ids.size()[1];
        let line = Grid { frames: 1, rows: 1, cols: length, channels: 1, patch_frames: 1, patch: 1 };
        // When each token's turn to stay comes.
        let mut turn = random_keep(&line, length, seed ^ STREAM, origins).restore();
        if self.padding_first {
            turn += ids.eq(self.padding).to_kind(ids.kind()) * length;
        }
        let turn = turn.scatter_value(1, pooled_index, -1);
        turn.topk(self.visible_tokens(length), 1, false, false).1.sort(1, false).0
    }
}
