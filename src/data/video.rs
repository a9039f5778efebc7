//! Videos: metadata and selected frames. They are decoded by a separate process, `occlude-decode`, which alone links
//! FFmpeg; this is the parent's side. The process also decodes Opus, for `audio.rs`.
//!
//! A video that makes the process crash, or hang past the deadline, is ExitCode::Corrupt like a damaged image; the next
//! video gets a new process. The process receives a file's bytes in memory and can open nothing else.

mod process; // the decoder process
pub mod protocol; // messages between both programs
mod sampling; // frames of a clip

use crate::error::{Error, ExitCode, Result};
use process::DecoderProcess;
pub use process::decoder_path;
pub use protocol::{Codec, Container, VideoEncoding, VideoInfo};
use protocol::{DecodeLimits, DecodeRequest, DecodeResponse};
pub use sampling::Sampling;
use std::time::Duration;

/// Maximum bytes of pixels of one clip.
const MAX_CLIP_BYTES: u64 = 1 << 30;
/// Maximum duration of encoding a video from pixels.
const ENCODE_EXTRA_TIME: Duration = Duration::from_secs(600);

/// Limits of a video; all inclusive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VideoLimits {
    /// Bytes of the file.
    pub max_bytes: usize,
    /// Pixels of a side.
    pub max_side: u32,
    /// Pixels of a frame.
    pub max_pixels: u64,
    /// Frames of a video.
    pub max_frames: u64,
    /// Duration of a video, in seconds.
    pub max_seconds: f64,
    /// Maximum time of one response. Transcoding may take four times the duration of the video more.
    pub deadline: Duration,
}

impl Default for VideoLimits {
    /// 512 MiB, 8,192 pixels a side, 4096 × 2304 pixels, a million frames, four hours; 60 s per response.
    fn default() -> Self {
        VideoLimits {
            max_bytes: 512 << 20,
            max_side: 8192,
            max_pixels: 4096 * 2304,
            max_frames: 1_000_000,
            max_seconds: 4.0 * 3600.0,
            deadline: Duration::from_secs(60),
        }
    }
}

impl VideoLimits {
    /// Returns whether metadata are within the limits. The process checks that too, but a file may have compromised it.
    fn allows(&self, info: &VideoInfo) -> bool {
        let VideoInfo { frames, seconds, fps, width, height, .. } = *info;
        (1..=self.max_frames).contains(&frames)
            && seconds > 0.0
            && seconds <= self.max_seconds
            && fps > 0.0
            && fps.is_finite()
            && width.min(height) > 0
            && width.max(height) <= self.max_side
            && u64::from(width) * u64::from(height) <= self.max_pixels
    }

    fn decode_limits(&self) -> DecodeLimits {
        let VideoLimits { max_side, max_pixels, max_frames, max_seconds, .. } = *self;
        DecodeLimits { max_side, max_pixels, max_frames, max_seconds, max_response_bytes: MAX_CLIP_BYTES }
    }
}

/// Returns whether `bytes` begin like a video: MP4 or QuickTime, Matroska or WebM, AVI.
pub fn is_video(bytes: &[u8]) -> bool {
    let has = |offset: usize, magic: &[u8]| bytes.get(offset..offset + magic.len()) == Some(magic);
    let atoms: [&[u8]; 6] = [b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"];
    atoms.iter().any(|atom| has(4, atom)) || has(0, b"\x1A\x45\xDF\xA3") || has(0, b"RIFF") && has(8, b"AVI ")
}

/// A decoder of videos; one per thread. Its process is started at the first video and is bound to the thread that
/// started it: it ends with that thread.
pub struct VideoDecoder {
    limits: VideoLimits,
    process: Option<DecoderProcess>,
}

/// A video whose packets were read: complete according to its container, and within the limits.
pub struct VideoReader<'a> {
    pub info: VideoInfo,
    decoder: &'a mut VideoDecoder,
}

/// Decoded frames in the process's memory.
pub struct DecodedFrames<'a> {
    /// Width and height of each.
    pub size: [u32; 2],
    /// Box of the requested region in each: [left, top, width, height].
    pub region: [f64; 4],
    /// Number of frames that were decoded to produce them.
    pub decoded: u64,
    process: &'a DecoderProcess,
}

impl VideoDecoder {
    /// Makes a decoder; no process is started yet.
    pub fn new(limits: VideoLimits) -> VideoDecoder {
        VideoDecoder { limits, process: None }
    }

    /// Reads the packets of a file.
    ///
    /// # Errors
    /// ExitCode::Corrupt for anything that is not a video within the limits, ExitCode::Usage where `occlude-decode` is
    /// missing or does not start.
    pub fn open(&mut self, bytes: &[u8]) -> Result<VideoReader<'_>> {
        let max_bytes = self.limits.max_bytes;
        if bytes.len() > max_bytes {
            return Err(corrupt_video(format!("{} bytes, the limit is {max_bytes}", bytes.len())));
        }
        let request = DecodeRequest::Open { bytes: bytes.len() as u64, limits: self.limits.decode_limits() };
        self.process()?.write_memory(bytes)?;
        match self.request(&request, Duration::ZERO)?.map_err(corrupt_video)? {
            DecodeResponse::Open(info) if self.limits.allows(&info) => Ok(VideoReader { info, decoder: self }),
            other => Err(self.protocol_error(&other)),
        }
    }

    /// Encodes a video from consecutive frames [height, width, 3].
    pub fn encode(
        &mut self,
        encoding: &VideoEncoding,
        fps: f64,
        [width, height]: [u32; 2],
        pixels: &[u8],
    ) -> Result<Vec<u8>> {
        let frames = pixels.len() as u64 / (u64::from(width) * u64::from(height) * 3);
        self.process()?.write_memory(pixels)?;
        let request = DecodeRequest::Encode { encoding: encoding.clone(), fps, width, height, frames };
        self.request_video(&request, ENCODE_EXTRA_TIME)
    }

    /// Decodes an Ogg Opus file of at most `max_samples` samples to one channel, the mean of all, at 48 kHz. The inner
    /// error is the reason why the file cannot be decoded.
    pub fn decode_opus(
        &mut self,
        bytes: &[u8],
        max_samples: u64,
        samples: &mut Vec<f32>,
    ) -> Result<Result<(), String>> {
        self.process()?.write_memory(bytes)?;
        let request = DecodeRequest::Opus { bytes: bytes.len() as u64, max_samples };
        let count = match self.request(&request, Duration::ZERO)? {
            Ok(DecodeResponse::Audio { samples })
                if samples <= max_samples.min(self.process()?.memory_length()? / 4) =>
            {
                samples
            }
            Ok(other) => return Ok(Err(self.protocol_error(&other).message)),
            Err(why) => return Ok(Err(why)),
        };
        let mut raw = vec![0; 4 * count as usize];
        self.process()?.read_memory(&mut raw, 0)?;
        samples.extend(raw.as_chunks::<4>().0.iter().map(|four| f32::from_ne_bytes(*four)));
        Ok(Ok(()))
    }

    /// Returns the id of the process, for tests; none before the first video.
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(DecoderProcess::id)
    }

    fn process(&mut self) -> Result<&mut DecoderProcess> {
        if self.process.is_none() {
            self.process = Some(DecoderProcess::start()?);
        }
        Ok(self.process.as_mut().expect("started above"))
    }

    /// Sends a request; a process that does not respond within the deadline plus `extra_time`, or has ended, is
    /// dropped. The inner error is the reason why the file cannot be decoded.
    fn request(&mut self, request: &DecodeRequest, extra_time: Duration) -> Result<Result<DecodeResponse, String>> {
        let deadline = self.limits.deadline + extra_time;
        match self.process()?.request(request, deadline) {
            Ok(DecodeResponse::Refused(why)) => Ok(Err(why)),
            Ok(response) => Ok(Ok(response)),
            Err(failure) => {
                let status = self.process.take().map(DecoderProcess::end).unwrap_or_default();
                Ok(Err(match failure {
                    process::ProcessFailure::TimedOut => {
                        format!("its decoder gave no answer in {deadline:?}, and was ended")
                    }
                    process::ProcessFailure::Exited => format!("its decoder ended on it ({status})"),
                }))
            }
        }
    }

    /// Sends a request whose response is a video.
    fn request_video(&mut self, request: &DecodeRequest, extra_time: Duration) -> Result<Vec<u8>> {
        match self.request(request, extra_time)?.map_err(corrupt_video)? {
            DecodeResponse::Video { bytes } if bytes <= self.process()?.memory_length()? => {
                let mut video = vec![0; bytes as usize];
                self.process()?.read_memory(&mut video, 0)?;
                Ok(video)
            }
            other => Err(self.protocol_error(&other)),
        }
    }

    /// Ends a process that violated the protocol, as one that a video has compromised may.
    fn protocol_error(&mut self, response: &DecodeResponse) -> Error {
        self.process.take().map(DecoderProcess::end);
        corrupt_video(format!("its decoder gave an unexpected response: {response:?}"))
    }
}

impl<'a> VideoReader<'a> {
    /// Decodes the frames `indices`, which strictly ascend. Of each, returns the pixels of `region` [left, top, width,
    /// height] (upright), perhaps with a margin, at 1/2, 1/4 or 1/8 of their size while the region keeps at least
    /// `min_size` [width, height].
    pub fn frames(self, indices: &[u64], region: [u32; 4], min_size: [u32; 2]) -> Result<DecodedFrames<'a>> {
        let VideoReader { decoder, .. } = self;
        let request = DecodeRequest::Frames { indices: indices.to_vec(), region, min_size };
        match decoder.request(&request, Duration::ZERO)?.map_err(corrupt_video)? {
            DecodeResponse::Frames { size, region: returned, decoded } if is_plausible(size, returned, region) => {
                let process = decoder.process.as_ref().expect("it has responded");
                Ok(DecodedFrames { size, region: returned, decoded, process })
            }
            other => Err(decoder.protocol_error(&other)),
        }
    }

    /// Encodes the video again, upright, at `fps` frames per second, scaled down to a shorter side of `short_side`.
    /// With the same libraries the result is deterministic.
    pub fn transcode(self, encoding: &VideoEncoding, fps: Option<f64>, short_side: Option<u32>) -> Result<Vec<u8>> {
        let extra_time = Duration::from_secs_f64(4.0 * self.info.seconds);
        let request = DecodeRequest::Transcode { encoding: encoding.clone(), fps, short_side };
        self.decoder.request_video(&request, extra_time)
    }
}

/// Returns whether a response is consistent: a box inside pixels that are no more than the requested region with its
/// margin.
fn is_plausible(size: [u32; 2], returned: [f64; 4], requested: [u32; 4]) -> bool {
    let [left, top, region_width, region_height] = returned;
    let [width, height] = size;
    let inside =
        |start: f64, length: f64, side: u32| start >= 0.0 && length > 0.0 && start + length <= f64::from(side) + 1e-6;
    let bounded = |side: u32, max: u32| side > 0 && side <= max.saturating_add(2);
    inside(left, region_width, width)
        && inside(top, region_height, height)
        && bounded(width, requested[2])
        && bounded(height, requested[3])
}

impl DecodedFrames<'_> {
    /// Returns the bytes of each frame.
    pub fn bytes(&self) -> usize {
        self.size[0] as usize * self.size[1] as usize * 3
    }

    /// Reads the pixels [height, width, 3] of the frame at position `position` of the requested indices.
    pub fn read(&self, position: usize, pixels: &mut [u8]) -> Result<()> {
        assert_eq!(pixels.len(), self.bytes(), "bytes of a frame");
        self.process.read_memory(pixels, (position * self.bytes()) as u64)
    }
}

fn corrupt_video(why: impl std::fmt::Display) -> Error {
    Error::new(ExitCode::Corrupt, format!("not a video that can be decoded: {why}"))
}
