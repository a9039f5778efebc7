//! Positions in foreign files. We compute a fixed sine-cosine table for any grid; foreign files store a tensor, which
//! must equal that table.

use crate::grid::Grid;
use crate::part::encoder::position::grid_positions;
use tch::{Kind, Tensor};

/// Returns a position table, fp32 [1, 1+N, D]: a row of zeros for the class token, then the model's sine-cosine table.
pub fn sincos_table(grid: &Grid, width: i64, trained_grid: Option<[i64; 2]>) -> Tensor {
    let patches = grid_positions(grid, width, trained_grid);
    Tensor::cat(&[Tensor::zeros([1, width], (Kind::Float, patches.device())), patches], 0).unsqueeze(0)
}

/// Returns the (rows, columns) whose sine-cosine table `table` is, up to the rounding of its dtype; `None` if there are
/// none, which means that the positions were learned.
pub fn infer_grid(table: &Tensor) -> Option<(i64, i64)> {
    let [1, table_rows, width] = table.size()[..] else { return None };
    if table_rows < 2 || width < 4 || width % 4 != 0 {
        return None;
    }
    let tokens = table_rows - 1;
    let tolerance = match table.kind() {
        Kind::BFloat16 => 8e-3,
        Kind::Half => 1e-3,
        _ => 1e-4, // Some ports compute the angles in fp32.
    };
    let table = table.to_kind(Kind::Float);
    let side = (tokens as f64).sqrt() as i64;
    // Factors nearest to a square first.
    let factors = (1..=side + 1).rev().filter(|n| tokens % n == 0).map(|n| (n, tokens / n));
    factors.flat_map(|(a, b)| [(a, b), (b, a)]).find(|&(rows, cols)| {
        let grid = Grid { frames: 1, rows, cols, channels: 1, patch_frames: 1, patch: 1 };
        let max_difference = (&table - sincos_table(&grid, width, None)).abs().max().double_value(&[]);
        max_difference <= tolerance
    })
}
