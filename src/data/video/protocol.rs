//! The protocol between this program and `occlude-decode`: one JSON object per line over a socket, which is the
//! process's standard input; the bytes of videos and pixels are in a shared file in memory, which is its standard
//! output. Both programs compile this file.

use serde::{Deserialize, Serialize};

/// Version of the protocol; a process of another version is refused.
pub const PROTOCOL_VERSION: u32 = 4;

/// Limits of a video; all inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeLimits {
    /// Pixels of a side.
    pub max_side: u32,
    /// Pixels of a frame.
    pub max_pixels: u64,
    /// Frames of a video.
    pub max_frames: u64,
    /// Duration of a video, in seconds.
    pub max_seconds: f64,
    /// Bytes of pixels in a response.
    pub max_response_bytes: u64,
}

/// A request to the process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeRequest {
    /// Open the file in the first `bytes` bytes of the memory. It stays open until the next one.
    Open { bytes: u64, limits: DecodeLimits },
    /// Decode frames of the open video; `indices` strictly ascend. Of each, write the pixels of `region` [left, top,
    /// width, height] (upright), perhaps with a margin, at 1/2, 1/4 or 1/8 of their size while the region keeps at
    /// least `min_size` [width, height].
    Frames { indices: Vec<u64>, region: [u32; 4], min_size: [u32; 2] },
    /// Decode the Ogg Opus file in the first `bytes` bytes of the memory, which has at most `max_samples` samples.
    Opus { bytes: u64, max_samples: u64 },
    /// Encode the open video again, scaled down to a shorter side of `short_side` pixels.
    Transcode { encoding: VideoEncoding, fps: Option<f64>, short_side: Option<u32> },
    /// Encode the `frames` consecutive images [height, width, 3] in the memory as a video.
    Encode { encoding: VideoEncoding, fps: f64, width: u32, height: u32, frames: u64 },
}

/// The options of encoding a video.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VideoEncoding {
    pub codec: Codec,
    pub container: Container,
    /// Maximum keyframe interval, in frames.
    pub max_keyframe_interval: u32,
    /// Maximum number of consecutive B-frames.
    pub max_b_frames: u32,
    /// H.264: whether frames may refer to frames before the last keyframe (open GOP).
    pub open_gop: bool,
    /// 1 to 100.
    pub quality: u8,
}

/// A video codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    H264,
    H265,
    Vp9,
    Av1,
    Mpeg4,
    Mjpeg,
}

/// A container format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Container {
    Mp4,
    Webm,
    Mkv,
    Avi,
}

/// Metadata of a video, known before any frame is decoded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VideoInfo {
    pub frames: u64,
    /// Time from the start of the first frame to the end of the last.
    pub seconds: f64,
    /// Frames per second, on average.
    pub fps: f64,
    /// Width in pixels, upright.
    pub width: u32,
    /// Height in pixels, upright.
    pub height: u32,
    /// Clockwise rotation in degrees that makes stored frames upright: 0, 90, 180, 270.
    pub rotation: u32,
    /// FFmpeg's name of the codec, such as `h264`.
    pub codec: String,
    /// FFmpeg's name of the container, such as `mov`.
    pub container: String,
}

/// A response of the process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeResponse {
    /// Sent once, before any request.
    Ready { version: u32 },
    /// The file is open.
    Open(VideoInfo),
    /// Frames [height, width, 3] of this `size` [width, height], consecutive in the memory in the requested order.
    /// `region` is the box of the requested region in them, [left, top, width, height]; `decoded` is the number of
    /// frames that were decoded to produce them.
    Frames { size: [u32; 2], region: [f64; 4], decoded: u64 },
    /// `samples` f32 values of one channel at 48 kHz, from the start of the memory.
    Audio { samples: u64 },
    /// A video in the first `bytes` bytes of the memory.
    Video { bytes: u64 },
    /// The file cannot be decoded, for this reason.
    Refused(String),
}
