//! Names and layouts of other people's checkpoints. Ours differ from the official MAE repository's in two ways: encoder
//! and decoder are spelt out, and the patch embedding is a matrix over values in the order (frame, row, column, channel)
//! where theirs is a convolution kernel.

use crate::grid::Grid;
use tch::Tensor;

/// One of our tensors under the official repository's name and in its layout.
pub fn to_mae(name: &str, tensor: &Tensor, grid: &Grid) -> (String, Tensor) {
    if name == "encoder.embed.weight" {
        return ("patch_embed.proj.weight".into(), kernel(tensor, grid));
    }
    (rename(name), tensor.shallow_clone())
}

fn rename(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("encoder.") {
        return match rest.strip_prefix("embed.") {
            Some(leaf) => format!("patch_embed.proj.{leaf}"),
            None => rest.to_string(),
        };
    }
    match name.strip_prefix("decoder.") {
        Some("mask_token") => "mask_token".into(),
        Some(rest) => format!("decoder_{rest}"),
        None => name.to_string(),
    }
}

/// [D, P] with the channel last → [D, C, p, p], or [D, C, f, p, p] where a token covers several frames.
fn kernel(weight: &Tensor, grid: &Grid) -> Tensor {
    let (f, p) = (grid.patch_frames, grid.patch);
    let cube = weight.view([-1, f, p, p, grid.channels].as_slice()).permute([0, 4, 1, 2, 3]);
    if f == 1 { cube.squeeze_dim(2).contiguous() } else { cube.contiguous() }
}
