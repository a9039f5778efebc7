//! Weights in and out, under other people's names and in their layouts.
//!
//! `names` is the one table for both directions; `mae`, `timm` and `transformers` fill it, a format each; `file` reads
//! and writes safetensors; `pth`, `torch` and `pickle` read PyTorch's own files and execute nothing; `position` tells a
//! sine-cosine table from learned positions.

mod about;
mod derive;
mod export;
mod file;
mod import;
mod mae;
mod names;
mod pickle;
mod position;
mod pth;
mod timm;
mod torch;
mod transformers;

pub use export::export;
pub use import::{Order, import};

use crate::fault::Result;
use crate::grid::Grid;
use about::About;
use file::Sheet;
use names::Names;
use tch::Tensor;

/// Whose names and layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The official MAE repository: encoder and decoder, or the encoder alone.
    Mae,
    /// timm's VisionTransformer: the encoder alone.
    Timm,
    /// transformers' ViTMAEForPreTraining, as 4.x and 5.x name its tensors.
    Transformers,
}

impl Format {
    const ALL: [Format; 3] = [Format::Mae, Format::Timm, Format::Transformers];

    /// Every set of names that the format is met with; the first one is written.
    fn names(self) -> &'static [Names] {
        match self {
            Format::Mae => &[mae::NAMES],
            Format::Timm => &[timm::NAMES],
            Format::Transformers => &[transformers::NAMES, transformers::SAVED_BY_5, transformers::IN_MEMORY_5],
        }
    }

    /// What stands beside the weights.
    fn about(self, sheet: &Sheet) -> Result<About> {
        match self {
            Format::Mae => Ok(mae::about(&sheet.config, &sheet.arguments)),
            Format::Timm => Ok(timm::about(&sheet.config)),
            Format::Transformers => transformers::about(&sheet.config, &sheet.preprocessor),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// One of our tensors under the official MAE repository's name and in its layout; one that it does not know keeps ours.
pub fn to_mae(name: &str, tensor: &Tensor, grid: &Grid) -> (String, Tensor) {
    let given = mae::NAMES.give(name, tensor, grid).and_then(|parts| parts.into_iter().next());
    given.unwrap_or_else(|| (name.to_owned(), tensor.shallow_clone()))
}
