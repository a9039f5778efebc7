//! What the formats need to know of a method's config, and what its makers' custom says where files are silent.

use crate::fault::{Fault, Result};
use crate::method::catalog;
use crate::part::encoder::vit::Shape;

/// The numbers of a config's `method`, under one set of names.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Its key in the config.
    pub method: &'static str,
    pub encoder: Shape,
    pub decoder: Shape,
    /// The share hidden.
    pub ratio: f64,
    pub normalize: bool,
    /// The encoder sees mask tokens.
    pub in_place: bool,
    /// The grid whose positions are interpolated to this one.
    pub trained_grid: Option<[i64; 2]>,
}

impl Model {
    /// Faults with Code::Usage on a method that no format is for.
    pub fn of(method: &catalog::Config) -> Result<Model> {
        use crate::method::mae::MaskTokens;
        Ok(match method {
            catalog::Config::Mae(mae) => Model {
                method: super::mae::CUSTOM.method,
                encoder: mae.encoder,
                decoder: mae.decoder,
                ratio: mae.mask.ratio,
                normalize: mae.target.normalize,
                in_place: mae.mask_tokens == MaskTokens::Encoder,
                trained_grid: mae.trained_grid,
            },
            catalog::Config::VideoMae(video) => Model {
                method: super::videomae::CUSTOM.method,
                encoder: video.encoder,
                decoder: video.decoder,
                ratio: video.mask.ratio,
                normalize: video.target.normalize,
                in_place: false,
                trained_grid: None,
            },
            catalog::Config::AudioMae(_) => {
                return Err(Fault::usage(
                    "there is no format for weights of method.audio_mae: transformers has no masked autoencoder of \
                     spectrograms, and the other formats' models are of pictures and videos",
                ));
            }
            other => {
                let name =
                    serde_json::to_value(other).ok().and_then(|value| Some(value.as_object()?.keys().next()?.clone()));
                let name = name.unwrap_or_default();
                return Err(Fault::usage(format!("there is no format for weights of method.{name} yet")));
            }
        })
    }

    /// The encoder's and the decoder's heads, which no shape of a tensor shows.
    pub fn heads(&self) -> [(&'static str, Shape); 2] {
        [("encoder", self.encoder), ("decoder", self.decoder)]
    }
}

/// The custom of a method's makers.
pub struct Custom {
    /// The method's key in the config.
    pub method: &'static str,
    /// A config of theirs: the recipe for going on.
    pub recipe: &'static str,
    /// Whose recipe it is.
    pub paper: &'static str,
    /// The usual number of heads of ("encoder" or "decoder", width).
    pub heads: fn(&str, i64) -> i64,
    /// Whether targets are normalised where nothing says it.
    pub normalize: bool,
    /// Sides in pixels and number of frames where neither positions nor settings tell them.
    pub size: i64,
    pub frames: i64,
}
