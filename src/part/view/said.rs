//! The config's `view` as it is written: keys for pictures, or `sound` alone. A key that would do nothing is refused.

use super::View;
use super::augment::Augment;
use super::caption::Caption;
use super::clip::Clip;
use super::crop::Crop;
use super::spectrogram::Sound;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// How a sample becomes a view: `sound` alone where samples are sounds, otherwise any of the other keys.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Said {
    /// The random box that training shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Crop")]
    crop: Option<Crop>,
    /// How likely training mirrors a sample, left to right; 0.5 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    flip: Option<f64>,
    /// Share of the resized picture's side that evaluation's central crop shows; 0.875 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "f64")]
    center: Option<f64>,
    /// What training does to colours and shape after crop and flip; nothing when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Augment")]
    augment: Option<Augment>,
    /// Whether training may decode a JPEG, or a video's frames, at a fraction of its size; false when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "bool")]
    scaled_decode: Option<bool>,
    /// Of videos: which frames are shown, as many as `input.frames` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Clip")]
    clip: Option<Clip>,
    /// Captions (`.txt` members) are read along with pictures, for a method that wants them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Caption")]
    caption: Option<Caption>,
    /// Of still pictures beside videos, for a method that reads both: `crop`, `flip`, `center`, `augment` and
    /// `scaled_decode` as above, which are then those of videos.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "View")]
    still: Option<Box<View>>,
    /// Samples are sounds, and this is how they become spectrograms. No other key of `view` is given beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Sound")]
    sound: Option<Sound>,
}

impl TryFrom<Said> for View {
    type Error = String;

    fn try_from(said: Said) -> Result<View, String> {
        let Said { crop, flip, center, augment, scaled_decode, clip, caption, still, sound } = said;
        let given = [
            ("crop", crop.is_some()),
            ("flip", flip.is_some()),
            ("center", center.is_some()),
            ("augment", augment.is_some()),
            ("scaled_decode", scaled_decode.is_some()),
            ("clip", clip.is_some()),
            ("caption", caption.is_some()),
            ("still", still.is_some()),
        ];
        if let (Some((key, _)), Some(_)) = (given.iter().find(|(_, given)| *given), &sound) {
            return Err(format!(
                "view.{key} is for pictures, and view.sound says that samples are sounds; leave one out"
            ));
        }
        let View { crop: box_, flip: mirror, center: middle, augment: change, scaled_decode: scaled, .. } =
            View::default();
        Ok(View {
            crop: crop.unwrap_or(box_),
            flip: flip.unwrap_or(mirror),
            center: center.unwrap_or(middle),
            augment: augment.unwrap_or(change),
            scaled_decode: scaled_decode.unwrap_or(scaled),
            clip,
            still,
            sound,
            caption,
        })
    }
}

impl From<View> for Said {
    fn from(view: View) -> Said {
        let View { crop, flip, center, augment, scaled_decode, clip, still, sound, caption } = view;
        match sound {
            Some(_) => Said {
                crop: None,
                flip: None,
                center: None,
                augment: None,
                scaled_decode: None,
                clip: None,
                caption: None,
                still: None,
                sound,
            },
            None => Said {
                crop: Some(crop),
                flip: Some(flip),
                center: Some(center),
                augment: Some(augment),
                scaled_decode: Some(scaled_decode),
                clip,
                caption,
                still,
                sound,
            },
        }
    }
}

impl JsonSchema for View {
    fn schema_name() -> Cow<'static, str> {
        "View".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Said::json_schema(generator)
    }
}
