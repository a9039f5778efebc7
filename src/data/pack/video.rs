//! Options of video encoding: smaller frames, fewer frames per second, or a shorter keyframe interval.

use super::super::video::{Codec, Container, VideoEncoding, VideoInfo};
use super::{PackOptions, VideoCodec, VideoOptions};
use crate::error::{Error, Result};

impl VideoOptions {
    /// Refuses numbers out of range, and a keyframe interval for MJPEG.
    pub fn check(&self) -> Result<()> {
        match (self.fps, self.gop, self.encode) {
            (Some(fps), ..) if !(fps > 0.0 && fps <= 1000.0) => {
                Err(Error::usage(format!("videos cannot have {fps} frames per second; more than 0, at most 1000")))
            }
            (_, Some(gop), _) if !(1..=10_000).contains(&gop) => {
                Err(Error::usage(format!("the keyframe interval is {gop}; it is 1 to 10000")))
            }
            (_, Some(_), Some(VideoCodec::Mjpeg)) => {
                Err(Error::usage("in MJPEG every frame is a keyframe; leave the keyframe interval out"))
            }
            _ => Ok(()),
        }
    }

    /// Returns the encoding of a video and its extension; none where its bytes do not change.
    pub fn encoding_recipe(&self, info: &VideoInfo, options: &PackOptions) -> Option<(VideoEncoding, &'static str)> {
        let shrinks = options.resize.is_some_and(|side| side < info.width.min(info.height));
        if !(shrinks || self.encode.is_some() || self.gop.is_some() || self.target_fps(info).is_some()) {
            return None;
        }
        // Closed groups, so that decoding of a clip starts at the one keyframe before it.
        let open_gop = false;
        Some(match self.encode.unwrap_or(VideoCodec::H264) {
            VideoCodec::H264 => {
                let encoding = VideoEncoding {
                    codec: Codec::H264,
                    container: Container::Mp4,
                    max_keyframe_interval: self.gop.unwrap_or(PackOptions::DEFAULT_GOP),
                    max_b_frames: 2,
                    open_gop,
                    quality: options.quality.unwrap_or(PackOptions::DEFAULT_H264_QUALITY),
                };
                (encoding, "mp4")
            }
            VideoCodec::Mjpeg => {
                let encoding = VideoEncoding {
                    codec: Codec::Mjpeg,
                    container: Container::Mkv,
                    max_keyframe_interval: 1,
                    max_b_frames: 0,
                    open_gop,
                    quality: options.quality.unwrap_or(PackOptions::DEFAULT_JPEG_QUALITY),
                };
                (encoding, "mkv")
            }
        })
    }

    /// Returns the frames per second to which a video is reduced; none where it has no more.
    pub fn target_fps(&self, info: &VideoInfo) -> Option<f64> {
        // Frames per second computed from time stamps are slightly inexact.
        self.fps.filter(|fps| info.fps > fps * 1.01)
    }
}
