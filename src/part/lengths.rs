//! Samples that do not fill the grid: what lies behind their last row is padding. Where it is left out, those of one length
//! go through a model together, on the grid that they fill, as if there were no other.

use crate::grid::Grid;
use crate::op::sizes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::Tensor;

/// The config's `padding`: what becomes of patches behind the end of a short sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// They are neither seen nor hidden nor guessed. A patch that the sample fills in part is the sample's.
    #[default]
    LeftOut,
    /// They are as good as the sample.
    Seen,
}

/// Samples of a batch that fill as much of the grid.
pub struct Group {
    /// What they fill.
    pub grid: Grid,
    /// Their numbers in the batch.
    pub which: Vec<i64>,
    /// [n, C, T, Y, X], padding and all.
    pub pixels: Tensor,
    /// int64 [3, n].
    pub origins: Tensor,
}

impl Padding {
    /// How much of the grid is read of a sample of which the first `valid` rows of pixels are not padding: whole rows of
    /// patches, at least one.
    pub fn read(self, grid: &Grid, valid: u32) -> Grid {
        let begun = (i64::from(valid) + grid.patch - 1) / grid.patch;
        match self {
            Padding::LeftOut => Grid { rows: begun.clamp(1, grid.rows), ..*grid },
            Padding::Seen => *grid,
        }
    }

    /// The samples by how much is read of each, short ones first; where `valid` is none, all of all.
    pub fn groups(self, grid: &Grid, pixels: &Tensor, origins: &Tensor, valid: Option<&[u32]>) -> Vec<Group> {
        let [samples, ..] = sizes::<5>(pixels);
        let mut by_rows: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        for sample in 0..samples {
            let grid = valid.map_or(*grid, |valid| self.read(grid, valid[sample as usize]));
            by_rows.entry(grid.rows).or_default().push(sample);
        }
        let alone = by_rows.len() == 1;
        let pick = |x: &Tensor, dim: i64, which: &[i64]| match alone {
            true => x.shallow_clone(),
            false => Tensor::cat(&which.iter().map(|&at| x.narrow(dim, at, 1)).collect::<Vec<_>>(), dim),
        };
        let group = |(rows, which): (i64, Vec<i64>)| Group {
            grid: Grid { rows, ..*grid },
            pixels: pick(pixels, 0, &which),
            origins: pick(origins, 1, &which),
            which,
        };
        by_rows.into_iter().map(group).collect()
    }
}

/// What was made of each group's samples [n, ..], in the order of the batch.
pub fn in_order(groups: &[Group], made: &[Tensor]) -> Tensor {
    let rows = groups.iter().zip(made).flat_map(|(group, made)| group.which.iter().zip(made.unbind(0)));
    let rows: BTreeMap<i64, Tensor> = rows.map(|(sample, row)| (*sample, row)).collect();
    Tensor::stack(&rows.into_values().collect::<Vec<_>>(), 0)
}
