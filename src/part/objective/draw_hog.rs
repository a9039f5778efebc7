//! Pictures of histograms of oriented gradients: each cell as nine strokes.

use super::hog::{BINS, CELL, hog_target};
use crate::error::Result;
use crate::grid::Grid;
use crate::op::patch::gather;
use crate::part::mask::Mask;
use crate::part::patchify::{Patchify, Reconstruction};
use std::f64::consts::PI;
use tch::{Device, Kind, Tensor};

/// Draws a prediction at the hidden tokens, fp32 [B, M, C · 9 · cells²], beside the targets: each cell as nine strokes
/// along its edges, as bright as their share.
pub fn draw_hog(patchify: &Patchify, x: &Tensor, pred: &Tensor, mask: &Mask) -> Result<Reconstruction> {
    let grid = patchify.grid_of(x);
    let target = hog_target(patchify, x)?;
    let visible = gather(&target, &mask.keep);
    let picture = |hidden: &Tensor| {
        let tokens = gather(&Tensor::cat(&[&visible, hidden], 1), &mask.restore());
        draw_tokens(&tokens, &grid)
    };
    let hidden = gather(&target, &mask.drop);
    Ok(Reconstruction { original: picture(&hidden), masked: picture(&hidden.zeros_like()), predicted: picture(pred) })
}

/// Histograms [B, N, C · 9 · cells²] → strokes as 0..1, [B, C, T, Y, X].
fn draw_tokens(tokens: &Tensor, grid: &Grid) -> Tensor {
    let cells = grid.patch / CELL;
    let batch = tokens.size()[0];
    let shape = [batch, grid.frames, grid.rows, grid.cols, grid.channels, BINS, cells * cells];
    let by_bin = tokens.reshape(shape.as_slice()).transpose(5, 6); // [.., cells², 9]
    let strokes = by_bin.matmul(&strokes(tokens.device())).clamp(0.0, 1.0); // [.., cells², 64]
    let shape = [batch, grid.frames, grid.rows, grid.cols, grid.channels, cells, cells, CELL, CELL];
    let pixels = strokes.reshape(shape.as_slice()).permute([0, 4, 1, 2, 5, 7, 3, 6, 8]);
    let side = cells * CELL;
    pixels.reshape([batch, grid.channels, grid.frames, grid.rows * side, grid.cols * side]).repeat_interleave_self_int(
        grid.patch_frames,
        2,
        None,
    )
}

/// Returns for each orientation a stroke through the middle of a cell, across the gradient: fp32 [9, 64].
fn strokes(device: Device) -> Tensor {
    let mut values = Vec::new();
    for bin in 0..BINS {
        // The gradient is (sin, cos) of this angle in (x, y).
        let angle = (bin as f64 + 0.5) * PI / BINS as f64;
        for pixel in 0..CELL * CELL {
            let middle = (CELL - 1) as f64 / 2.0;
            let x = (pixel % CELL) as f64 - middle;
            let y = (pixel / CELL) as f64 - middle;
            let distance = (x * angle.sin() + y * angle.cos()).abs();
            values.push((1.0 - distance).max(0.0) as f32);
        }
    }
    Tensor::from_slice(&values).view([BINS, CELL * CELL]).to_kind(Kind::Float).to_device(device)
}
