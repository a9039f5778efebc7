//! Tokens of captions hidden, which FLIP's paper tries in an ablation and leaves out.

use super::random::keeping;
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Sets the draw of a caption apart from that of its image.
const STREAM: u64 = 0x63_6170_7469_6f6e;

/// Which tokens of a caption the text tower sees. The one that speaks for the caption is never hidden, of which the paper
/// says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Words {
    /// The share of tokens hidden, in (0, 1) (paper: 0.5).
    pub ratio: f64,
    /// Padding is hidden before words are (paper: 67.8 against 66.0 % at random, and 68.2 % with nothing hidden).
    #[serde(default = "yes")]
    pub prioritised: bool,
    /// The token that pads captions, as the vocabulary has it.
    #[serde(default)]
    pub padding: i64,
}

fn yes() -> bool {
    true
}

impl Words {
    pub fn check(&self, at: &str, length: i64) -> Result<()> {
        let (ratio, kept) = (self.ratio, self.kept(length));
        if ratio > 0.0 && ratio < 1.0 && kept >= 1 && kept < length {
            return Ok(());
        }
        Err(Fault::usage(format!(
            "{at}.ratio is {ratio}, which keeps {kept} of {length} tokens; it is the share hidden, 0.5 in the paper, and at \
             least one must be kept and one hidden"
        )))
    }

    /// How many of `length` tokens stay.
    pub fn kept(&self, length: i64) -> i64 {
        (length as f64 * (1.0 - self.ratio)) as i64
    }

    /// Of ids [B, L], the places that stay, ascending: int64 [B, K]. `speaks` [B, 1] are the places of the tokens that speak.
    pub fn draw(&self, ids: &Tensor, speaks: &Tensor, seed: u64, origins: &Tensor) -> Tensor {
        let length = ids.size()[1];
        let line = Grid { frames: 1, rows: 1, cols: length, channels: 1, patch_frames: 1, patch: 1 };
        // When each token's turn to stay comes.
        let mut turn = keeping(&line, length, seed ^ STREAM, origins).restore();
        if self.prioritised {
            turn += ids.eq(self.padding).to_kind(ids.kind()) * length;
        }
        let turn = turn.scatter_value(1, speaks, -1);
        turn.topk(self.kept(length), 1, false, false).1.sort(1, false).0
    }
}
