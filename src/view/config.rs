//! The config's `view` as it is written: keys for images and videos, or `audio` alone. A key that would have no effect
//! is refused.

use super::View;
use super::augment::Augment;
use super::caption::CaptionConfig;
use super::clip::ClipConfig;
use super::crop::Crop;
use super::spectrogram::AudioView;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// How a sample becomes a view: `audio` alone where samples are audio, otherwise any of the other keys.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ViewConfig {
    /// Random box in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Crop")]
    crop: Option<Crop>,
    /// Probability of a horizontal flip in training; 0.5 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    hflip: Option<f64>,
    /// Fraction of the resized image's side that evaluation's center crop shows; 0.875 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    center_crop: Option<f64>,
    /// Training's changes of colors and shape after crop and flip; nothing when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Augment")]
    augment: Option<Augment>,
    /// Lets training decode a JPEG, or a video's frames, at a fraction of their size; false when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "bool")]
    scaled_decode: Option<bool>,
    /// Sampling of the `input.frames` frames of a video.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "ClipConfig")]
    clip: Option<ClipConfig>,
    /// Captions (`.txt` members), which are read along with images, for a method that uses them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "CaptionConfig")]
    caption: Option<CaptionConfig>,
    /// View of images beside videos, for a method that reads both: `crop`, `hflip`, `center_crop`, `augment` and
    /// `scaled_decode` as above, which then apply to videos alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "View")]
    image: Option<Box<View>>,
    /// How audio becomes a spectrogram. No other key of `view` may be given with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "AudioView")]
    audio: Option<AudioView>,
}

impl TryFrom<ViewConfig> for View {
    type Error = String;

    fn try_from(config: ViewConfig) -> Result<View, String> {
        let image_keys = [
            ("crop", config.crop.is_some()),
            ("hflip", config.hflip.is_some()),
            ("center_crop", config.center_crop.is_some()),
            ("augment", config.augment.is_some()),
            ("scaled_decode", config.scaled_decode.is_some()),
            ("clip", config.clip.is_some()),
            ("caption", config.caption.is_some()),
            ("image", config.image.is_some()),
        ];
        let given = image_keys.iter().find(|(_, is_given)| *is_given);
        if let (Some((key, _)), Some(_)) = (given, &config.audio) {
            return Err(format!("view.{key} is for images, and view.audio says that samples are audio; leave one out"));
        }
        let default = View::default();
        Ok(View {
            crop: config.crop.unwrap_or(default.crop),
            hflip: config.hflip.unwrap_or(default.hflip),
            center_crop: config.center_crop.unwrap_or(default.center_crop),
            augment: config.augment.unwrap_or(default.augment),
            scaled_decode: config.scaled_decode.unwrap_or(default.scaled_decode),
            clip: config.clip,
            image: config.image,
            audio: config.audio,
            caption: config.caption,
        })
    }
}

impl From<View> for ViewConfig {
    fn from(view: View) -> ViewConfig {
        if view.audio.is_some() {
            return ViewConfig { audio: view.audio, ..ViewConfig::default() };
        }
        ViewConfig {
            crop: Some(view.crop),
            hflip: Some(view.hflip),
            center_crop: Some(view.center_crop),
            augment: Some(view.augment),
            scaled_decode: Some(view.scaled_decode),
            clip: view.clip,
            caption: view.caption,
            image: view.image,
            audio: None,
        }
    }
}

impl JsonSchema for View {
    fn schema_name() -> Cow<'static, str> {
        "View".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        ViewConfig::json_schema(generator)
    }
}
