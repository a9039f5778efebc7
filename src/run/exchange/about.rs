//! What the files beside the weights say of them.

use serde_json::Value;

/// What shapes cannot tell; None where nothing says it.
#[derive(Debug, Default)]
pub struct About {
    pub heads: Option<i64>,
    pub decoder_heads: Option<i64>,
    /// The decoder's targets were normalised patches.
    pub normalize: Option<bool>,
    /// The share hidden.
    pub ratio: Option<f64>,
    /// Frames of a clip.
    pub frames: Option<i64>,
    /// [height, width] in pixels.
    pub size: Option<[i64; 2]>,
    pub mean: Option<Vec<f64>>,
    pub std: Option<Vec<f64>>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// A list of numbers, and nothing else.
pub fn numbers(value: &Value) -> Option<Vec<f64>> {
    value.as_array()?.iter().map(Value::as_f64).collect()
}
