//! The settings of a method's config that weight formats need, and the defaults for foreign files that lack some.

use crate::error::{Error, Result};
use crate::method::catalog;
use crate::method::mae::MaskTokens;
use crate::part::encoder::vit::Shape;

/// Config key of the masked autoencoder of images (He et al., 2022).
pub const MAE: &str = "mae";
/// Config key of the masked autoencoder of videos (Tong et al., 2022).
pub const VIDEOMAE: &str = "videomae";

/// The settings of a masked autoencoder, independent of its method.
#[derive(Clone, Copy, Debug)]
pub struct ModelSettings {
    /// Key of the method in the config.
    pub method: &'static str,
    pub encoder: Shape,
    pub decoder: Shape,
    /// Fraction of tokens hidden in training.
    pub mask_ratio: f64,
    /// True if the targets are normalized per patch.
    pub normalize_target: bool,
    /// True if the encoder sees mask tokens.
    pub mask_tokens_in_encoder: bool,
    /// Rows and columns of the grid from which the positions are interpolated.
    pub trained_grid: Option<[i64; 2]>,
}

impl ModelSettings {
    /// Reads the settings from a method's config.
    ///
    /// # Errors
    /// [`ExitCode::Usage`](crate::error::ExitCode::Usage) if no weight format supports the method.
    pub fn from_method(method: &catalog::Config) -> Result<ModelSettings> {
        Ok(match method {
            catalog::Config::Mae(mae) => ModelSettings {
                method: MAE,
                encoder: mae.encoder,
                decoder: mae.decoder,
                mask_ratio: mae.mask.ratio,
                normalize_target: mae.target.normalize,
                mask_tokens_in_encoder: mae.mask_tokens == MaskTokens::Encoder,
                trained_grid: mae.trained_grid,
            },
            catalog::Config::VideoMae(video) => ModelSettings {
                method: VIDEOMAE,
                encoder: video.encoder,
                decoder: video.decoder,
                mask_ratio: video.mask.ratio,
                normalize_target: video.target.normalize,
                mask_tokens_in_encoder: false,
                trained_grid: None,
            },
            catalog::Config::AudioMae(_) => {
                return Err(Error::usage(
                    "there is no format for weights of method.audiomae: transformers has no masked autoencoder of \
                     spectrograms, and the other formats are for images and videos",
                ));
            }
            other => {
                let name =
                    serde_json::to_value(other).ok().and_then(|value| Some(value.as_object()?.keys().next()?.clone()));
                let name = name.unwrap_or_default();
                return Err(Error::usage(format!("there is no format for weights of method.{name} yet")));
            }
        })
    }

    /// Returns the shapes of encoder and decoder with their config keys.
    pub fn shapes(&self) -> [(&'static str, Shape); 2] {
        [("encoder", self.encoder), ("decoder", self.decoder)]
    }
}

/// The defaults of a method for foreign files that lack a setting.
pub struct Defaults {
    /// Key of the method in the config.
    pub method: &'static str,
    /// Config (JSON) of the paper's training recipe, used to continue training.
    pub recipe: &'static str,
    /// Citation of the recipe.
    pub paper: &'static str,
    /// Usual number of heads for ("encoder" or "decoder", width).
    pub heads: fn(&str, i64) -> i64,
    /// True if targets are normalized per patch.
    pub normalize_target: bool,
    /// Height and width in pixels.
    pub image_size: i64,
    /// Frames per clip.
    pub frames: i64,
}
