//! What other people call our tensors, and how theirs are laid out: one table for both directions.

use super::about::About;
use super::file::Sheet;
use super::model::{Custom, Model};
use crate::config::Config;
use crate::fault::Result;
use crate::grid::Grid;
use serde_json::Value;
use tch::Tensor;

/// The patch embedding: a matrix over values in the order (frame, row, column, channel) here, a convolution kernel
/// everywhere else.
pub const EMBEDDING: &str = "encoder.embed.weight";

/// Our side of a table: layers and lone tensors, what stands before a block's number, the layers of a block.
pub type Pairs = &'static [(&'static str, &'static str)];

/// The layers of a block: ours, theirs.
pub type Layers = &'static [(&'static str, &'static [&'static str])];

/// Files beside the weights: name and content.
pub type Settings = Vec<(&'static str, Value)>;

/// One format's names of one method's models.
pub struct Names {
    /// What to call it in messages.
    pub title: &'static str,
    /// The method, and what goes without saying.
    pub custom: &'static Custom,
    /// Their embedding is a convolution over frames, even where a token covers one.
    pub cubes: bool,
    /// Outside the blocks: ours, theirs.
    pub outside: Pairs,
    /// What stands before a block's number: ours, theirs.
    pub blocks: Pairs,
    /// The layers of a block: ours, and theirs. Where theirs are several, their rows stand one below the other in ours.
    pub layers: Layers,
    /// Tables of positions [1, 1+N, D], the class token's row first: the part of ours that has it, theirs.
    pub positions: Pairs,
    /// What stands beside the weights, or why the model is none that can run here.
    pub about: fn(&Sheet) -> Result<About>,
    /// The files that are written beside them.
    pub settings: fn(&Config, &Model) -> Result<Settings>,
    /// How to open what was written into FOLDER.
    pub load: &'static str,
}

impl Names {
    /// Their names of one of our tensors; None where the format has no place for it.
    pub fn theirs(&self, ours: &str) -> Option<Vec<String>> {
        for (prefix, theirs) in self.outside {
            match ours.strip_prefix(prefix) {
                Some("") => return Some(vec![theirs.to_string()]),
                Some(leaf) if leaf.starts_with('.') => return Some(vec![format!("{theirs}{leaf}")]),
                _ => {}
            }
        }
        let (theirs, rest) =
            self.blocks.iter().find_map(|(prefix, theirs)| Some((theirs, ours.strip_prefix(prefix)?)))?;
        let (number, rest) = rest.split_once('.')?;
        let (layer, leaf) = rest.rsplit_once('.')?;
        let (_, layers) = self.layers.iter().find(|(ours, _)| *ours == layer)?;
        Some(layers.iter().map(|layer| format!("{theirs}{number}.{layer}.{leaf}")).collect())
    }

    /// Their name of the table of positions that `part` ("encoder" or "decoder") adds.
    pub fn position(&self, part: &str) -> Option<&'static str> {
        self.positions.iter().find(|(ours, _)| *ours == part).map(|(_, theirs)| *theirs)
    }

    /// Whether this is one of their names for what the decoder has.
    pub fn is_decoders(&self, theirs: &str) -> bool {
        let side =
            |pairs: Pairs| pairs.iter().filter(|(ours, _)| ours.starts_with("decoder")).map(|(_, theirs)| *theirs);
        side(self.outside).chain(side(self.blocks)).chain(side(self.positions)).any(|prefix| theirs.starts_with(prefix))
    }

    /// One of our tensors under their names and in their layout; None where the format has no place for it.
    pub fn give(&self, ours: &str, tensor: &Tensor, grid: &Grid) -> Option<Vec<(String, Tensor)>> {
        let names = self.theirs(ours)?;
        let tensor = if ours == EMBEDDING { self.to_kernel(tensor, grid) } else { tensor.shallow_clone() };
        let parts = tensor.chunk(names.len() as i64, 0);
        Some(names.into_iter().zip(parts).map(|(name, part)| (name, part.contiguous())).collect())
    }

    /// The inverse of `give`: their tensors, in the order of `theirs`, as ours.
    pub fn take(&self, ours: &str, parts: &[Tensor], grid: &Grid) -> Tensor {
        let whole = Tensor::cat(parts, 0);
        if ours == EMBEDDING { from_kernel(&whole, grid) } else { whole }
    }

    /// The shape that each of their tensors has for one of ours.
    pub fn shape(&self, ours: &str, shape: &[i64], parts: usize, grid: &Grid) -> Vec<i64> {
        let mut shape = if ours == EMBEDDING { self.kernel(shape[0], grid) } else { shape.to_vec() };
        shape[0] /= parts as i64;
        shape
    }
    /// [D, C, p, p], or [D, C, f, p, p] where it goes over frames.
    fn kernel(&self, width: i64, grid: &Grid) -> Vec<i64> {
        let (f, p) = (grid.patch_frames, grid.patch);
        if self.cubes { vec![width, grid.channels, f, p, p] } else { vec![width, grid.channels, p, p] }
    }

    /// [D, P] with the channel last → a convolution's kernel.
    fn to_kernel(&self, weight: &Tensor, grid: &Grid) -> Tensor {
        let (f, p) = (grid.patch_frames, grid.patch);
        let cube = weight.view([-1, f, p, p, grid.channels].as_slice()).permute([0, 4, 1, 2, 3]);
        cube.reshape(self.kernel(weight.size()[0], grid))
    }
}

/// A convolution's kernel → [D, P] with the channel last.
fn from_kernel(kernel: &Tensor, grid: &Grid) -> Tensor {
    let (f, p) = (grid.patch_frames, grid.patch);
    let cube = kernel.view([-1, grid.channels, f, p, p].as_slice()).permute([0, 2, 3, 4, 1]);
    cube.reshape([-1, grid.values()])
}
