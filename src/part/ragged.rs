//! Samples that do not fill the grid: rows of pixels beyond a sample's last valid one are padding. Where padding is
//! ignored, samples of one length go through a model together, on the grid that they fill.

use crate::error::Result;
use crate::grid::Grid;
use crate::part::batch::Batch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::Tensor;

/// The config's `padding`: whether patches beyond the end of a short sample take part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// Padding is neither visible nor hidden nor predicted. A patch that the sample fills in part belongs to the
    /// sample.
    #[default]
    Ignore,
    /// Padding is treated like the sample.
    Keep,
}

impl Padding {
    /// Returns the grid that a sample with `valid` rows of pixels fills: whole rows of patches, at least one.
    pub fn valid_grid(self, grid: &Grid, valid: u32) -> Grid {
        let rows = (i64::from(valid) + grid.patch - 1) / grid.patch;
        match self {
            Padding::Ignore => Grid { rows: rows.clamp(1, grid.rows), ..*grid },
            Padding::Keep => *grid,
        }
    }

    /// Counts the samples by the grid that each fills, short ones first.
    pub fn grids(self, grid: &Grid, samples: i64, valid: Option<&[u32]>) -> Vec<(Grid, i64)> {
        self.indices_by_rows(grid, samples, valid).map(|(grid, indices)| (grid, indices.len() as i64)).collect()
    }

    /// Groups a batch by the grid that each sample fills, short ones first. A batch of one length is not copied.
    pub fn groups(self, grid: &Grid, batch: &Batch) -> Result<Vec<LengthGroup>> {
        let samples = batch.size();
        let groups = self.indices_by_rows(grid, samples, batch.side.valid.as_deref());
        groups
            .map(|(grid, indices)| {
                let is_whole = indices.len() as i64 == samples;
                let batch = if is_whole { batch.slice(0..samples as usize)? } else { batch.select(&indices)? };
                Ok(LengthGroup { grid, indices, batch })
            })
            .collect()
    }

    fn indices_by_rows(
        self,
        grid: &Grid,
        samples: i64,
        valid: Option<&[u32]>,
    ) -> impl Iterator<Item = (Grid, Vec<i64>)> + use<> {
        let grid = *grid;
        let mut by_rows: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        for sample in 0..samples {
            let filled = valid.map_or(grid, |valid| self.valid_grid(&grid, valid[sample as usize]));
            by_rows.entry(filled.rows).or_default().push(sample);
        }
        by_rows.into_iter().map(move |(rows, indices)| (Grid { rows, ..grid }, indices))
    }
}

/// The samples of a batch that fill the same grid.
pub struct LengthGroup {
    pub grid: Grid,
    /// Their indices in the batch.
    pub indices: Vec<i64>,
    /// Views are [n, C, T, Y, X] with the padding still there.
    pub batch: Batch,
}

/// Puts the rows that were computed for each group, [n, ..], back into the order of the batch.
pub fn unpermute(groups: &[LengthGroup], computed: &[Tensor]) -> Tensor {
    if let [only] = computed {
        return only.shallow_clone();
    }
    let rows = groups.iter().zip(computed).flat_map(|(group, rows)| group.indices.iter().zip(rows.unbind(0)));
    let rows: BTreeMap<i64, Tensor> = rows.map(|(sample, row)| (*sample, row)).collect();
    Tensor::stack(&rows.into_values().collect::<Vec<_>>(), 0)
}
