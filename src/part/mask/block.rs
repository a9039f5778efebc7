//! Blocks of tokens hidden together (BEiT §2.3; MaskFeat's cubes in videos).

use super::{Mask, MaskPolicy, can_sample_on_device};
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::op::shuffle::{BlockOptions, MaskPlan};
use crate::part::batch::Batch;
use crate::part::step::Step;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The config's `mask` of a policy that hides blocks. Every sample hides the same number of tokens, our own choice:
/// where blocks fall short, random tokens complete them (official code: the counts differ).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockMask {
    /// The share of tokens hidden, in (0, 1).
    pub ratio: f64,
    /// Tokens [frames, rows, columns] that are hidden together: the resolution of the blocks.
    #[serde(default = "BlockMask::single_token")]
    pub unit: [i64; 3],
    /// Smallest area of a block, as a share of the largest: all that is hidden, or a whole frame if that is less.
    #[serde(default = "BlockMask::fifth")]
    pub min_block: f64,
    /// Blocks in a row that may fail to fit before random tokens complete the mask.
    #[serde(default = "BlockMask::tries")]
    pub max_tries: i64,
}

/// Smallest ratio of a block's sides (official BEiT code).
const MIN_ASPECT: f64 = 0.3;

impl BlockMask {
    fn single_token() -> [i64; 3] {
        [1; 3]
    }
    fn fifth() -> f64 {
        0.2
    }
    fn tries() -> i64 {
        10
    }

    fn units(&self, grid: &Grid) -> i64 {
        grid.tokens() / self.unit.iter().product::<i64>()
    }

    fn plan(&self, grid: &Grid) -> Result<MaskPlan> {
        let target = ((self.units(grid) as f64 * self.ratio).round() as i64).max(1);
        // A block's area is that in one frame; it also covers several frames.
        let max_area = target.min(self.units(grid) * self.unit[0] / grid.frames);
        let min_area = ((max_area as f64 * self.min_block) as i64).max(1);
        let blocks = BlockOptions { target, min_area, max_area, max_tries: self.max_tries, min_aspect: MIN_ASPECT };
        MaskPlan::blocks(grid, self.unit, self.units(grid) - target, blocks)
    }

    /// Checks the values, which stand at `at` in the config.
    ///
    /// # Errors
    /// ExitCode::Usage on a value that hides nothing or everything, or does not divide the grid.
    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        if !(self.ratio > 0.0 && self.ratio < 1.0 && (0.0..=1.0).contains(&self.min_block)) {
            return Err(Error::usage(format!(
                "{at}: ratio = {}, min_block = {}; the share hidden must lie in (0, 1), the smallest block in [0, 1]",
                self.ratio, self.min_block
            )));
        }
        let tokens = [grid.frames, grid.rows, grid.cols];
        if self.unit.iter().zip(tokens).any(|(&unit, tokens)| unit < 1 || tokens % unit != 0) {
            return Err(Error::usage(format!(
                "{at}.unit is {:?} (frames, rows, columns), which does not divide the {tokens:?} tokens; choose divisors",
                self.unit
            )));
        }
        let plan = self.plan(grid).map_err(|error| error.with_context(at))?;
        let visible = plan.visible_tokens();
        if visible == 0 || visible == grid.tokens() {
            return Err(Error::usage(format!(
                "{at}.ratio is {}, which keeps {visible} of {} tokens; at least one must be kept and one hidden",
                self.ratio,
                grid.tokens()
            )));
        }
        Ok(())
    }
}

impl MaskPolicy for BlockMask {
    fn visible(&self, grid: &Grid) -> i64 {
        self.plan(grid).expect("checked with the config").visible_tokens()
    }
    fn sample(&self, _step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        Ok(Mask::sample(&self.plan(grid)?, batch.seed, &batch.keys))
    }
    fn can_capture(&self, grid: &Grid) -> Result<(), &'static str> {
        can_sample_on_device(self.units(grid))
    }
}
