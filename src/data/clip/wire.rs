//! What this program and `occlude-decode` say to each other: one JSON object a line over a socket, which is the
//! child's standard input; bytes of videos and pixels through a file in memory, which is its standard output. Both
//! programs compile this file.

use serde::{Deserialize, Serialize};

/// Of what is said here; a child of another build is refused.
pub const VERSION: u32 = 3;

/// What a video may cost; all inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// Pixels of a side.
    pub max_side: u32,
    /// Pixels of a frame.
    pub max_pixels: u64,
    /// Frames of a video.
    pub max_frames: u64,
    /// Length of a video.
    pub max_seconds: f64,
    /// Bytes of an answer.
    pub max_answer: u64,
}

/// What the parent asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Read the file in the first so many bytes of the memory. It stays open until the next one.
    Open { bytes: u64, bounds: Bounds },
    /// Frames of the open video, rising, each once; of each the pixels of `region` [left, top, width, height] (upright)
    /// or a little more, smaller by 1/2, 1/4 or 1/8 while the region still has `least` [width, height].
    Frames { indices: Vec<u64>, region: [u32; 4], least: [u32; 2] },
    /// Decode the Ogg Opus file in the first so many bytes of the memory, which has at most so many samples.
    Sound { bytes: u64, most: u64 },
    /// The open video, encoded anew; the shorter side brought down to so many pixels where it is longer.
    Recode { recipe: Recipe, fps: Option<f64>, shorter: Option<u32> },
    /// So many pictures [height, width, 3], which lie one after another in the memory, as a video.
    Encode { recipe: Recipe, fps: f64, width: u32, height: u32, frames: u64 },
}

/// How a video is encoded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    pub codec: Codec,
    pub container: Container,
    /// The most frames from one that stands alone to the next.
    pub gop: u32,
    /// The most frames in a row that are made from frames on both sides.
    pub b_frames: u32,
    /// H.264: whether frames may be made from such that lie before the last one that stands alone.
    pub open: bool,
    /// 1 to 100.
    pub quality: u8,
}

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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Container {
    Mp4,
    Webm,
    Mkv,
    Avi,
}

/// What a video is, before any frame is decoded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub frames: u64,
    /// From the first frame's beginning to the last one's end.
    pub seconds: f64,
    /// Frames a second, on average.
    pub fps: f64,
    /// Upright, in pixels.
    pub width: u32,
    pub height: u32,
    /// Degrees clockwise by which stored frames are turned to stand upright: 0, 90, 180, 270.
    pub rotation: u32,
    /// As FFmpeg calls it, such as `h264`.
    pub codec: String,
    /// As FFmpeg calls it, such as `mov`.
    pub container: String,
}

/// What the child answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Said once, ahead of any question.
    Ready {
        version: u32,
    },
    Open(Facts),
    /// Frames [height, width, 3] of this `size` [width, height], one after another in the memory in the order in which
    /// they were asked for; the region lies at `place` [left, top, width, height] in them. So many came from the decoder
    /// for them.
    Frames {
        size: [u32; 2],
        place: [f64; 4],
        decoded: u64,
    },
    /// So many f32 of one channel at 48 kHz, from the beginning of the memory.
    Sound {
        samples: u64,
    },
    /// A video, in the first so many bytes of the memory.
    Video {
        bytes: u64,
    },
    /// The file is not one that can be decoded, and why.
    Refused(String),
}
