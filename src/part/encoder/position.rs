//! Fixed sine-cosine positions: 2-D by row and column, of the grid itself or interpolated from another one; or 1-D.

use crate::error::{Error, Result};
use crate::grid::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use tch::{Device, Tensor};

/// A table of positions fp32 [N, D] with one copy per device. Copies are never freed, because captured graphs read them
/// at their address.
pub struct Positions(RefCell<Vec<Tensor>>);

impl From<Tensor> for Positions {
    fn from(table: Tensor) -> Positions {
        Positions(RefCell::new(vec![table]))
    }
}

impl Positions {
    /// Returns the table on a device, whose copy the first call creates.
    pub fn table(&self, device: Device) -> Tensor {
        let mut copies = self.0.borrow_mut();
        let existing = copies.iter().find(|copy| copy.device() == device).map(Tensor::shallow_clone);
        existing.unwrap_or_else(|| {
            let copy = copies[0].to_device(device);
            copies.push(copy.shallow_clone());
            copy
        })
    }
}

/// Returns the 2-D positions of a grid, fp32 [N, D]. If the weights were trained on a grid of other [rows, columns],
/// `trained`, its table is resized by bicubic interpolation (official `interpolate_pos_embed`).
pub fn grid_positions(grid: &Grid, width: i64, trained: Option<[i64; 2]>) -> Tensor {
    match trained {
        Some([rows, cols]) if [rows, cols] != [grid.rows, grid.cols] => {
            let table = sincos_2d(&Grid { rows, cols, ..*grid }, width);
            let table = table.view([1, rows, cols, width]).permute([0, 3, 1, 2]);
            let table = table.upsample_bicubic2d([grid.rows, grid.cols], false, None, None);
            table.permute([0, 2, 3, 1]).reshape([grid.rows * grid.cols, width])
        }
        _ => sincos_2d(grid, width),
    }
}

/// The config's `positions` of spectrograms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PositionAxes {
    /// A token has the position of its row and column.
    #[default]
    Grid,
    /// Tokens, in row-major order, have the positions of the transposed grid in row-major order. The official Audio-MAE
    /// code confuses the two axes, and weights trained by it need this table.
    Swapped,
}

impl PositionAxes {
    /// Returns the positions of a grid, fp32 [N, D].
    pub fn positions(self, grid: &Grid, width: i64) -> Tensor {
        match self {
            PositionAxes::Grid => sincos_2d(grid, width),
            PositionAxes::Swapped => sincos_2d(&Grid { rows: grid.cols, cols: grid.rows, ..*grid }, width),
        }
    }
}

/// Returns 2-D sine-cosine positions, fp32 [N, D], computed in fp64 (official `get_2d_sincos_pos_embed`). The first
/// half of the channels encodes the column, the second half the row; each half has all sines, then all cosines, with
/// frequencies 10000^(−i / (D/4)). D must be a multiple of 4. For a grid of one frame.
pub fn sincos_2d(grid: &Grid, width: i64) -> Tensor {
    let quarter = (width / 4) as usize;
    let mut table = Vec::with_capacity((grid.tokens() * width) as usize);
    for row in 0..grid.rows {
        for col in 0..grid.cols {
            for coordinate in [col, row] {
                let angle = |i: usize| coordinate as f64 / 10000f64.powf(i as f64 / quarter as f64);
                table.extend((0..quarter).map(|i| angle(i).sin() as f32));
                table.extend((0..quarter).map(|i| angle(i).cos() as f32));
            }
        }
    }
    Tensor::from_slice(&table).view([grid.rows * grid.cols, width])
}

/// Returns 1-D sine-cosine positions of tokens in row-major order through all frames, fp32 [N, D], computed in fp64
/// (official VideoMAE `get_sinusoid_encoding_table`, after Vaswani et al., 2017, §3.5): sines in even channels, cosines
/// in odd ones, with frequencies 10000^(−2i / D).
pub fn sincos_1d(grid: &Grid, width: i64) -> Tensor {
    let mut table = Vec::with_capacity((grid.tokens() * width) as usize);
    for token in 0..grid.tokens() {
        for channel in 0..width {
            let pair = channel / 2;
            let angle = token as f64 / 10000f64.powf(2.0 * pair as f64 / width as f64);
            let value = if channel % 2 == 0 { angle.sin() } else { angle.cos() };
            table.push(value as f32);
        }
    }
    Tensor::from_slice(&table).view([grid.tokens(), width])
}

/// Checks a `trained_grid`, which is at `path` in the config.
///
/// # Errors
/// A usage error if a side is out of range.
pub fn check_trained_grid(path: &str, trained: Option<[i64; 2]>) -> Result<()> {
    match trained.filter(|sides| sides.iter().any(|side| !(1..=4096).contains(side))) {
        Some([rows, cols]) => Err(Error::usage(format!(
            "{path} is [{rows}, {cols}]; it is the rows and columns of patches that weights were trained on"
        ))),
        None => Ok(()),
    }
}
