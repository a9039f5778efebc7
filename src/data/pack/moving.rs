//! Videos encoded anew: smaller, with fewer frames a second, or so that a clip begins sooner.

use super::super::clip::{Codec, Container, Facts, Recipe};
use super::{EncodeVideo, Options, Videos};
use crate::fault::{Fault, Result};

impl Videos {
    /// Refuses numbers that cannot be.
    pub fn check(&self) -> Result<()> {
        match (self.fps, self.gop, self.encode) {
            (Some(fps), ..) if !(fps > 0.0 && fps <= 1000.0) => {
                Err(Fault::usage(format!("videos cannot have {fps} frames a second; more than 0, at most 1000")))
            }
            (_, Some(gop), _) if !(1..=10_000).contains(&gop) => {
                Err(Fault::usage(format!("the distance of frames that stand alone is {gop}; it is 1 to 10000")))
            }
            (_, Some(_), Some(EncodeVideo::Mjpeg)) => {
                Err(Fault::usage("in MJPEG every frame stands alone; leave the distance between such frames out"))
            }
            _ => Ok(()),
        }
    }

    /// How a video is encoded anew, and its new extension; none where it stays as it came.
    pub fn recipe(&self, facts: &Facts, options: &Options) -> Option<(Recipe, &'static str)> {
        let smaller = options.resize.is_some_and(|side| side < facts.width.min(facts.height));
        if !(smaller || self.encode.is_some() || self.gop.is_some() || self.rate(facts).is_some()) {
            return None;
        }
        // Groups are closed, so that a clip begins at the one frame that stands alone ahead of it.
        let open = false;
        Some(match self.encode.unwrap_or(EncodeVideo::H264) {
            EncodeVideo::H264 => {
                let (codec, container, quality) =
                    (Codec::H264, Container::Mp4, options.quality.unwrap_or(Options::H264));
                (Recipe { codec, container, gop: self.gop.unwrap_or(Options::GOP), b_frames: 2, open, quality }, "mp4")
            }
            EncodeVideo::Mjpeg => {
                let (codec, container) = (Codec::Mjpeg, Container::Mkv);
                let quality = options.quality.unwrap_or(Options::QUALITY);
                (Recipe { codec, container, gop: 1, b_frames: 0, open, quality }, "mkv")
            }
        })
    }

    /// Frames a second that a video is brought down to; none where it has no more.
    pub fn rate(&self, facts: &Facts) -> Option<f64> {
        // What is reckoned from time stamps is a little off.
        self.fps.filter(|fps| facts.fps > fps * 1.01)
    }
}
