//! Bytes of a member become pixels.

/// One decoded sample before its view: 8-bit pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    pub width: u32,
    pub height: u32,
    /// Channels interleaved: [height, width, channels].
    pub channels: u32,
    pub pixels: Vec<u8>,
}
