//! Weights in and out, under other people's names and in their layouts.
//!
//! `names` is the one table for both directions; `mae`, `timm`, `transformers` and `videomae` fill it; `file` reads
//! and writes safetensors; `pth`, `torch` and `pickle` read PyTorch's own files and execute nothing; `position` tells a
//! sine-cosine table from learned positions.

mod about;
mod derive;
mod export;
mod file;
mod import;
mod mae;
mod model;
mod names;
mod pickle;
mod position;
mod pth;
mod timm;
mod torch;
mod transformers;
mod videomae;

pub use export::export;
pub use import::{Order, import};

use crate::grid::Grid;
use names::Names;
use tch::Tensor;

/// Whose names and layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The official MAE repository: encoder and decoder, or the encoder alone.
    Mae,
    /// timm's VisionTransformer: the encoder alone.
    Timm,
    /// transformers' ViTMAEForPreTraining, as 4.x and 5.x name its tensors, or VideoMAEForPreTraining.
    Transformers,
    /// The official VideoMAE repository: encoder and decoder, or the encoder alone.
    Videomae,
}

impl Format {
    const ALL: [Format; 4] = [Format::Mae, Format::Timm, Format::Transformers, Format::Videomae];

    /// Every set of names that the format is met with; the first one of a method is written.
    fn names(self) -> &'static [Names] {
        match self {
            Format::Mae => &[mae::NAMES],
            Format::Timm => &[timm::NAMES],
            Format::Transformers => {
                &[transformers::NAMES, transformers::SAVED_BY_5, transformers::IN_MEMORY_5, videomae::TRANSFORMERS]
            }
            Format::Videomae => &[videomae::NAMES],
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// One of our tensors under the name and in the layout of the official repository of `method`; one that it does not know
/// keeps ours.
pub fn official(method: &str, name: &str, tensor: &Tensor, grid: &Grid) -> (String, Tensor) {
    let names = [&mae::NAMES, &videomae::NAMES].into_iter().find(|names| names.custom.method == method);
    let given = names.and_then(|names| names.give(name, tensor, grid)?.into_iter().next());
    given.unwrap_or_else(|| (name.to_owned(), tensor.shallow_clone()))
}
