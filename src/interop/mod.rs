//! Import and export of weights under the names and in the layouts of other projects.
//!
//! `name_map` describes one format for both directions; `mae`, `timm`, `transformers` and `videomae` define them.
//! `state_dict` reads and writes safetensors; `pth`, `pickle` and `torch` read PyTorch's own files without executing
//! anything; `position` recognizes sine-cosine tables.

mod derive;
mod export;
mod import;
mod mae;
mod metadata;
mod model;
mod name_map;
mod pickle;
mod position;
mod pth;
mod state_dict;
mod timm;
mod torch;
mod transformers;
mod videomae;

pub use export::export;
pub use import::{ImportOptions, import};

use crate::grid::Grid;
use name_map::NameMap;
use tch::Tensor;

/// The project whose names and layout a weight file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightFormat {
    /// The official MAE repository: encoder and decoder, or the encoder alone.
    Mae,
    /// timm's VisionTransformer: the encoder alone.
    Timm,
    /// transformers' ViTMAEForPreTraining, as 4.x and 5.x name its tensors, or VideoMAEForPreTraining.
    Transformers,
    /// The official VideoMAE repository: encoder and decoder, or the encoder alone.
    Videomae,
}

impl WeightFormat {
    const ALL: [WeightFormat; 4] =
        [WeightFormat::Mae, WeightFormat::Timm, WeightFormat::Transformers, WeightFormat::Videomae];

    /// Returns all name maps that files of the format use; export writes the first one of a method.
    fn name_maps(self) -> &'static [NameMap] {
        match self {
            WeightFormat::Mae => &[mae::NAMES],
            WeightFormat::Timm => &[timm::NAMES],
            WeightFormat::Transformers => &[
                transformers::NAMES,
                transformers::NAMES_5_SAVED,
                transformers::NAMES_5_IN_MEMORY,
                videomae::TRANSFORMERS_NAMES,
            ],
            WeightFormat::Videomae => &[videomae::NAMES],
        }
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// Converts one of our tensors to the name and layout of the official repository of `method`; a tensor that the
/// repository lacks keeps our name.
pub fn to_official(method: &str, name: &str, tensor: &Tensor, grid: &Grid) -> (String, Tensor) {
    let names = [&mae::NAMES, &videomae::NAMES].into_iter().find(|names| names.defaults.method == method);
    let converted = names.and_then(|names| names.to_theirs(name, tensor, grid)?.into_iter().next());
    converted.unwrap_or_else(|| (name.to_owned(), tensor.shallow_clone()))
}
