//! Settings that are stored with foreign weights and that tensor shapes do not show.

use serde_json::Value;

/// Settings of a foreign model, from `config.json`, `preprocessor_config.json` or saved training arguments. A field is
/// `None` if no source has it.
#[derive(Debug, Default)]
pub struct SourceMetadata {
    /// Attention heads of the encoder.
    pub heads: Option<i64>,
    /// Attention heads of the decoder.
    pub decoder_heads: Option<i64>,
    /// True if the targets were normalized per patch.
    pub normalize_target: Option<bool>,
    /// Fraction of tokens hidden in training.
    pub mask_ratio: Option<f64>,
    /// Frames per clip.
    pub frames: Option<i64>,
    /// Height and width in pixels.
    pub image_size: Option<[i64; 2]>,
    /// Pixel mean per channel.
    pub mean: Option<Vec<f64>>,
    /// Pixel standard deviation per channel.
    pub std: Option<Vec<f64>>,
    /// Messages for the user.
    pub notes: Vec<String>,
}

/// Returns a JSON array of numbers as a vector, or `None` for any other value.
pub fn number_list(value: &Value) -> Option<Vec<f64>> {
    value.as_array()?.iter().map(Value::as_f64).collect()
}
