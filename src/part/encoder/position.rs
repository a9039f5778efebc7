//! Fixed sine-cosine positions: by row and column, of the grid itself or of another one stretched over it; or by number.

use crate::fault::{Fault, Result};
use crate::grid::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use tch::{Device, Tensor};

/// A table fp32 [N, D] wherever it is asked for: copied to a device once, and there for good, since a captured graph
/// reads it where it lay.
pub struct Positions(RefCell<Vec<Tensor>>);

impl From<Tensor> for Positions {
    fn from(table: Tensor) -> Positions {
        Positions(RefCell::new(vec![table]))
    }
}

impl Positions {
    pub fn on(&self, device: Device) -> Tensor {
        let mut copies = self.0.borrow_mut();
        let there = copies.iter().find(|copy| copy.device() == device).map(Tensor::shallow_clone);
        there.unwrap_or_else(|| {
            let copy = copies[0].to_device(device);
            copies.push(copy.shallow_clone());
            copy
        })
    }
}

/// The table of a grid: its own, or where the weights were trained on a grid of `trained` [rows, columns], that one's
/// table brought to this grid's size by bicubic interpolation (official `interpolate_pos_embed`). fp32 [N, D].
pub fn table(grid: &Grid, width: i64, trained: Option<[i64; 2]>) -> Tensor {
    match trained {
        Some([rows, cols]) if [rows, cols] != [grid.rows, grid.cols] => {
            let table = sine_cosine(&Grid { rows, cols, ..*grid }, width);
            let table = table.view([1, rows, cols, width]).permute([0, 3, 1, 2]);
            let table = table.upsample_bicubic2d([grid.rows, grid.cols], false, None, None);
            table.permute([0, 2, 3, 1]).reshape([grid.rows * grid.cols, width])
        }
        _ => sine_cosine(grid, width),
    }
}

/// The config's `positions` of spectrograms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Axes {
    /// A token has the position of its row and column.
    #[default]
    Grid,
    /// Tokens, which stand row by row, have the positions of a grid of as many rows as theirs has columns and as many
    /// columns as theirs has rows, row by row: the official Audio-MAE code takes one axis for the other, and weights that
    /// were trained by it know no other table.
    Swapped,
}

impl Axes {
    /// fp32 [N, D].
    pub fn table(self, grid: &Grid, width: i64) -> Tensor {
        match self {
            Axes::Grid => sine_cosine(grid, width),
            Axes::Swapped => sine_cosine(&Grid { rows: grid.cols, cols: grid.rows, ..*grid }, width),
        }
    }
}

/// fp32 [N, D], computed in fp64 (official `get_2d_sincos_pos_embed`): the first half of the channels encodes the
/// column, the second half the row; inside each half all sines, then all cosines; frequencies 10000^(−i / (D/4)).
/// D must be a multiple of 4; one frame.
pub fn sine_cosine(grid: &Grid, width: i64) -> Tensor {
    let quarter = (width / 4) as usize;
    let mut table = Vec::with_capacity((grid.tokens() * width) as usize);
    for row in 0..grid.rows {
        for col in 0..grid.cols {
            for at in [col, row] {
                let angle = |i: usize| at as f64 / 10000f64.powf(i as f64 / quarter as f64);
                table.extend((0..quarter).map(|i| angle(i).sin() as f32));
                table.extend((0..quarter).map(|i| angle(i).cos() as f32));
            }
        }
    }
    Tensor::from_slice(&table).view([grid.rows * grid.cols, width])
}

/// fp32 [N, D], computed in fp64 (official VideoMAE `get_sinusoid_encoding_table`, after Vaswani et al., 2017, §3.5):
/// tokens counted in row-major order through all frames; sines in the even channels, cosines in the odd ones,
/// frequencies 10000^(−2i / D).
pub fn by_number(grid: &Grid, width: i64) -> Tensor {
    let angle = |token: i64, pair: i64| token as f64 / 10000f64.powf(2.0 * pair as f64 / width as f64);
    let value = |token, channel: i64| match channel % 2 {
        0 => angle(token, channel / 2).sin() as f32,
        _ => angle(token, channel / 2).cos() as f32,
    };
    let table: Vec<f32> =
        (0..grid.tokens()).flat_map(|token| (0..width).map(move |channel| value(token, channel))).collect();
    Tensor::from_slice(&table).view([grid.tokens(), width])
}

/// Refuses a `trained_grid` that is none.
pub fn check(at: &str, trained: Option<[i64; 2]>) -> Result<()> {
    match trained.filter(|sides| sides.iter().any(|side| !(1..=4096).contains(side))) {
        Some([rows, cols]) => Err(Fault::usage(format!(
            "{at} is [{rows}, {cols}]; it is the rows and columns of patches that weights were trained on"
        ))),
        None => Ok(()),
    }
}
