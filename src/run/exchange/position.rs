//! Positions in other people's files. Here they are a fixed sine-cosine table, made for whatever grid a model has; there
//! they are a tensor, which must be that table.

use crate::grid::Grid;
use crate::part::encoder::position;
use tch::{Kind, Tensor};

/// fp32 [1, 1+N, D]: a row of zeros for the class token, then the model's table.
pub fn table(grid: &Grid, width: i64, trained: Option<[i64; 2]>) -> Tensor {
    let patches = position::table(grid, width, trained);
    Tensor::cat(&[Tensor::zeros([1, width], (Kind::Float, patches.device())), patches], 0).unsqueeze(0)
}

/// The (rows, columns) whose sine-cosine table this is, to within its dtype's rounding. None where there are none: the
/// positions were learned.
pub fn grid_of(found: &Tensor) -> Option<(i64, i64)> {
    let [1, rows, width] = found.size()[..] else { return None };
    if rows < 2 || width < 4 || width % 4 != 0 {
        return None;
    }
    let tokens = rows - 1;
    let within = match found.kind() {
        Kind::BFloat16 => 8e-3,
        Kind::Half => 1e-3,
        _ => 1e-4, // Some ports compute the angles in fp32.
    };
    let found = found.to_kind(Kind::Float);
    let side = (tokens as f64).sqrt() as i64;
    let mut pairs: Vec<(i64, i64)> = (1..=side + 1).filter(|n| tokens % n == 0).map(|n| (n, tokens / n)).collect();
    pairs.reverse(); // A square first.
    pairs.into_iter().flat_map(|(a, b)| [(a, b), (b, a)]).find(|&(rows, cols)| {
        let grid = Grid { frames: 1, rows, cols, channels: 1, patch_frames: 1, patch: 1 };
        let off = (&found - table(&grid, width, None)).abs().max().double_value(&[]);
        off <= within
    })
}
