//! Masks of spectrograms: random patches, or whole rows (time) and columns (frequency) of patches (Audio-MAE, Huang et
//! al., 2022, §3, "Masking strategies"; official `random_masking` and `random_masking_2d`).

use super::{Mask, MaskPolicy, Ratio};
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::op::shuffle::MaskPlan;
use crate::part::batch::Batch;
use crate::part::step::Step;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The config's `mask` of spectrograms: `{"ratio": 0.8}`, or `{"time": 0.7, "frequency": 0.3}`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TimeFrequencyMask {
    /// Fraction of patches hidden at random, in (0, 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Instead of `ratio`: fraction of the rows of patches (time) that are hidden whole; in [0, 1), 0 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<f64>,
    /// Instead of `ratio`: fraction of the columns of patches (frequency) that are hidden whole; as `time`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency: Option<f64>,
}

impl Default for TimeFrequencyMask {
    /// The paper's ratio.
    fn default() -> Self {
        TimeFrequencyMask { ratio: Some(0.8), time: None, frequency: None }
    }
}

impl TimeFrequencyMask {
    /// Checks the key `<at>` of the config.
    ///
    /// # Errors
    /// ExitCode::Usage if the mask would hide nothing or everything on this grid, or mixes the two kinds.
    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        let has_axis = self.time.is_some() || self.frequency.is_some();
        match self.ratio {
            Some(ratio) if !has_axis => Ratio { ratio }.check(at, grid.tokens(), grid.visible(ratio), 0.8),
            Some(_) => Err(Error::usage(format!(
                "{at} has a ratio and time or frequency; patches are hidden one by one, or by whole rows and columns: \
                 leave one out"
            ))),
            None if !has_axis => {
                Err(Error::usage(format!("{at} is empty; give ratio, 0.8 in the paper, or time and frequency")))
            }
            None => self.check_axes(at, grid),
        }
    }

    fn check_axes(&self, at: &str, grid: &Grid) -> Result<()> {
        for (name, fraction) in [("time", self.time), ("frequency", self.frequency)] {
            if let Some(fraction) = fraction.filter(|fraction| !(0.0..1.0).contains(fraction)) {
                return Err(Error::usage(format!(
                    "{at}.{name} is {fraction}; it is the fraction hidden and must be in [0, 1)"
                )));
            }
        }
        let rows = visible_lines(grid.rows, self.time);
        let cols = visible_lines(grid.cols, self.frequency);
        if rows == 0 || cols == 0 {
            return Err(Error::usage(format!(
                "{at} keeps none of {} rows or none of {} columns of patches; make its fractions smaller",
                grid.rows, grid.cols
            )));
        }
        if rows * cols == grid.tokens() {
            return Err(Error::usage(format!("{at} hides none of {} patches; make a fraction larger", grid.tokens())));
        }
        Ok(())
    }
}

impl MaskPolicy for TimeFrequencyMask {
    /// At least one token, also on a grid shorter than the one that was checked.
    fn visible(&self, grid: &Grid) -> i64 {
        match self.ratio {
            Some(ratio) => grid.visible(ratio).max(1),
            None => visible_lines(grid.rows, self.time).max(1) * visible_lines(grid.cols, self.frequency).max(1),
        }
    }

    fn sample(&self, _step: &Step, grid: &Grid, batch: &Batch) -> Result<Mask> {
        let plan = match self.ratio {
            Some(_) => MaskPlan::random(grid, [1, 1, 1], self.visible(grid)),
            None => MaskPlan::axes(
                grid,
                visible_lines(grid.rows, self.time).max(1),
                visible_lines(grid.cols, self.frequency).max(1),
            ),
        };
        Ok(Mask::sample(&plan.expect("no more visible than there are"), batch.seed, &batch.keys))
    }
}

/// Rows or columns that stay visible, truncated as the official code does.
fn visible_lines(lines: i64, hidden: Option<f64>) -> i64 {
    (lines as f64 * (1.0 - hidden.unwrap_or(0.0))) as i64
}
