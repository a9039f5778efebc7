//! Tokens of a spectrogram hidden one by one, or whole moments and frequencies of it (Audio-MAE, Huang et al., 2022, §3,
//! "Masking strategies"; official `random_masking` and `random_masking_2d`).

use super::{Mask, Ratio};
use crate::fault::{Fault, Result};
use crate::grid::Grid;
use crate::op::shuffle::Plan;
use crate::part::lengths::Group;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The config's `mask` of spectrograms: `{"ratio": 0.8}`, or `{"time": 0.7, "frequency": 0.3}`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lines {
    /// The share of patches hidden, each as likely as any other; in (0, 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Instead of it: the share of moments, rows of patches, of which nothing is seen; in [0, 1), 0 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<f64>,
    /// And the share of frequencies, columns of patches, of which nothing is seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency: Option<f64>,
}

impl Default for Lines {
    /// The paper's.
    fn default() -> Self {
        Lines { ratio: Some(0.8), time: None, frequency: None }
    }
}

impl Lines {
    /// Refuses shares that hide nothing or all of a grid; they stand at `<at>` in the config.
    pub fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        let refuse = |message: String| Err(Fault::usage(message));
        let (ratio, shares) = match (self.ratio, self.time, self.frequency) {
            (Some(ratio), None, None) => {
                return Ratio { ratio }.check(at, grid.tokens(), grid.kept(ratio), 0.8);
            }
            (None, None, None) => {
                return refuse(format!("{at} is empty; give ratio, 0.8 in the paper, or time and frequency"));
            }
            (ratio, time, frequency) => (ratio, [("time", time), ("frequency", frequency)]),
        };
        if ratio.is_some() {
            return refuse(format!(
                "{at} has a ratio and time or frequency; patches are hidden one by one, or by whole moments and \
                 frequencies: leave one out"
            ));
        }
        for (name, share) in shares {
            if let Some(share) = share.filter(|share| !(0.0..1.0).contains(share)) {
                return refuse(format!("{at}.{name} is {share}; it is the share hidden and must lie in [0, 1)"));
            }
        }
        match self.axes(grid) {
            [0, _] | [_, 0] => refuse(format!(
                "{at} keeps none of {} rows or none of {} columns of patches; make its shares smaller",
                grid.rows, grid.cols
            )),
            [rows, cols] if rows * cols == grid.tokens() => {
                refuse(format!("{at} hides none of {} patches; make a share larger", grid.tokens()))
            }
            _ => Ok(()),
        }
    }

    /// Rows and columns that are kept at these shares, truncated as the official code does.
    fn axes(&self, grid: &Grid) -> [i64; 2] {
        let kept = |lines: i64, share: Option<f64>| (lines as f64 * (1.0 - share.unwrap_or(0.0))) as i64;
        [kept(grid.rows, self.time), kept(grid.cols, self.frequency)]
    }

    /// K of a grid of no more rows than that which was checked: at least one token.
    pub fn kept(&self, grid: &Grid) -> i64 {
        match self.ratio {
            Some(ratio) => grid.kept(ratio).max(1),
            None => self.axes(grid).into_iter().map(|lines| lines.max(1)).product(),
        }
    }

    /// Drawn for each sample of a group, on the grid that they fill.
    pub fn draw(&self, group: &Group, seed: u64) -> Mask {
        let grid = &group.grid;
        let plan = match self.ratio {
            Some(_) => Plan::random(grid, [1, 1, 1], self.kept(grid)),
            None => {
                let [rows, cols] = self.axes(grid);
                Plan::axes(grid, rows.max(1), cols.max(1))
            }
        };
        Mask::drawn(&plan.expect("no more kept than there are"), seed, &group.origins)
    }
}
