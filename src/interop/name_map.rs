//! The mapping between our tensor names and layouts and those of one weight format, for both directions.

use super::metadata::SourceMetadata;
use super::model::{Defaults, ModelSettings};
use super::state_dict::StateDict;
use crate::config::Config;
use crate::error::Result;
use crate::grid::Grid;
use serde_json::Value;
use tch::Tensor;

/// Our name of the patch embedding. We store a matrix over values in the order (frame, row, column, channel); all
/// formats store a convolution kernel.
pub const PATCH_EMBEDDING: &str = "encoder.embed.weight";

/// Pairs of our name and their name.
pub type NamePairs = &'static [(&'static str, &'static str)];

/// The layers of a block: our name, and their names. If they have several, ours is their concatenation along dimension
/// 0.
pub type BlockLayers = &'static [(&'static str, &'static [&'static str])];

/// File names and contents of the files written with the weights.
pub type SidecarFiles = Vec<(&'static str, Value)>;

/// The names and layouts that one format uses for the models of one method.
pub struct NameMap {
    /// Possessive name of the format, for messages.
    pub title: &'static str,
    /// Settings to assume if the file has none.
    pub defaults: &'static Defaults,
    /// True if the patch embedding is a 3-D convolution, even with one frame per token.
    pub conv3d: bool,
    /// Layers and tensors outside the blocks.
    pub top_level: NamePairs,
    /// Prefixes before the index of a block.
    pub block_prefixes: NamePairs,
    pub block_layers: BlockLayers,
    /// Position tables [1, 1+N, D], the class token's row first: "encoder" or "decoder", and their name.
    pub position_tables: NamePairs,
    /// Reads the settings stored with the weights; fails if the model cannot be represented here.
    pub read_metadata: fn(&StateDict) -> Result<SourceMetadata>,
    /// Builds the files that are written with the weights.
    pub sidecar_files: fn(&Config, &ModelSettings) -> Result<SidecarFiles>,
    /// Python expression that loads an export from FOLDER.
    pub load_snippet: &'static str,
}

impl NameMap {
    /// Returns their names for one of our tensors, or `None` if the format lacks it.
    pub fn their_names(&self, ours: &str) -> Option<Vec<String>> {
        for (prefix, theirs) in self.top_level {
            match ours.strip_prefix(prefix) {
                Some("") => return Some(vec![theirs.to_string()]),
                Some(leaf) if leaf.starts_with('.') => return Some(vec![format!("{theirs}{leaf}")]),
                _ => {}
            }
        }
        let (theirs, rest) =
            self.block_prefixes.iter().find_map(|(prefix, theirs)| Some((theirs, ours.strip_prefix(prefix)?)))?;
        let (index, rest) = rest.split_once('.')?;
        let (layer, leaf) = rest.rsplit_once('.')?;
        let (_, layers) = self.block_layers.iter().find(|(ours, _)| *ours == layer)?;
        Some(layers.iter().map(|layer| format!("{theirs}{index}.{layer}.{leaf}")).collect())
    }

    /// Returns their name for the position table of `part` ("encoder" or "decoder").
    pub fn position_table(&self, part: &str) -> Option<&'static str> {
        self.position_tables.iter().find(|(ours, _)| *ours == part).map(|(_, theirs)| *theirs)
    }

    /// Returns true if `theirs` is a name of a decoder tensor.
    pub fn is_decoder_name(&self, theirs: &str) -> bool {
        [self.top_level, self.block_prefixes, self.position_tables]
            .into_iter()
            .flatten()
            .any(|(ours, prefix)| ours.starts_with("decoder") && theirs.starts_with(prefix))
    }

    /// Converts one of our tensors to their names and layout; `None` if the format lacks it.
    pub fn to_theirs(&self, ours: &str, tensor: &Tensor, grid: &Grid) -> Option<Vec<(String, Tensor)>> {
        let names = self.their_names(ours)?;
        let tensor = if ours == PATCH_EMBEDDING { self.to_kernel(tensor, grid) } else { tensor.shallow_clone() };
        let parts = tensor.chunk(names.len() as i64, 0);
        Some(names.into_iter().zip(parts).map(|(name, part)| (name, part.contiguous())).collect())
    }

    /// Converts their tensors, in the order of `their_names`, to ours: the inverse of `to_theirs`.
    pub fn to_ours(&self, ours: &str, parts: &[Tensor], grid: &Grid) -> Tensor {
        let joined = Tensor::cat(parts, 0);
        if ours == PATCH_EMBEDDING { from_kernel(&joined, grid) } else { joined }
    }

    /// Returns the shape of each of the `parts` tensors that make up our tensor of shape `shape`.
    pub fn their_shape(&self, ours: &str, shape: &[i64], parts: usize, grid: &Grid) -> Vec<i64> {
        let mut shape = if ours == PATCH_EMBEDDING { self.kernel_shape(shape[0], grid) } else { shape.to_vec() };
        shape[0] /= parts as i64;
        shape
    }

    /// Returns [D, C, f, p, p] for a 3-D convolution, else [D, C, p, p].
    fn kernel_shape(&self, width: i64, grid: &Grid) -> Vec<i64> {
        let f = grid.patch_frames;
        let p = grid.patch;
        if self.conv3d { vec![width, grid.channels, f, p, p] } else { vec![width, grid.channels, p, p] }
    }

    /// Converts a matrix [D, P], channel last, to a convolution kernel.
    fn to_kernel(&self, weight: &Tensor, grid: &Grid) -> Tensor {
        let f = grid.patch_frames;
        let p = grid.patch;
        let cube = weight.view([-1, f, p, p, grid.channels].as_slice()).permute([0, 4, 1, 2, 3]);
        cube.reshape(self.kernel_shape(weight.size()[0], grid))
    }
}

/// Converts a convolution kernel to a matrix [D, P], channel last.
fn from_kernel(kernel: &Tensor, grid: &Grid) -> Tensor {
    let f = grid.patch_frames;
    let p = grid.patch;
    let cube = kernel.view([-1, grid.channels, f, p, p].as_slice()).permute([0, 2, 3, 4, 1]);
    cube.reshape([-1, grid.patch_values()])
}
