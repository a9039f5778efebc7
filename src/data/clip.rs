//! Videos: what is known of one, and the frames that are wanted of it. They are decoded by a process of its own,
//! `occlude-decode`, which alone links FFmpeg; this is its parent's side. It decodes Opus too, for `sound.rs`.
//!
//! A video that makes the child crash, or hang past the deadline, is Code::Corrupt as a damaged picture is; the next
//! one gets a new child. The child sees the file's bytes in memory and can open nothing else.

mod child; // the process: started, asked, ended
mod sample; // which frames a clip shows
pub mod wire; // what both programs say to each other

use crate::fault::{Code, Fault, Result};
use child::Child;
pub use child::program;
pub use sample::Sampling;
use std::time::Duration;
use wire::{Answer, Ask, Bounds};
pub use wire::{Codec, Container, Facts, Recipe};

/// What a video may cost; all inclusive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes of the file.
    pub max_bytes: usize,
    /// Pixels of a side.
    pub max_side: u32,
    /// Pixels of a frame.
    pub max_pixels: u64,
    /// Frames of a video.
    pub max_frames: u64,
    /// Length of a video, seconds.
    pub max_seconds: f64,
    /// How long one answer may take. A video that is encoded anew may take four times its own length more.
    pub deadline: Duration,
}

impl Default for Limits {
    /// 512 MiB, 8,192 pixels a side, 4096 × 2304 pixels, a million frames, four hours; 60 s for an answer.
    fn default() -> Self {
        Limits {
            max_bytes: 512 << 20,
            max_side: 8192,
            max_pixels: 4096 * 2304,
            max_frames: 1_000_000,
            max_seconds: 4.0 * 3600.0,
            deadline: Duration::from_secs(60),
        }
    }
}

impl Limits {
    /// The most bytes of pixels that one clip may have.
    const ANSWER: u64 = 1 << 30;

    /// Whether facts can be reckoned with. The child has seen to it, but a file may have taken it over.
    fn allow(&self, facts: &Facts) -> bool {
        let Facts { frames, seconds, fps, width, height, .. } = *facts;
        (1..=self.max_frames).contains(&frames)
            && seconds > 0.0
            && seconds <= self.max_seconds
            && fps > 0.0
            && fps.is_finite()
            && width.min(height) > 0
            && width.max(height) <= self.max_side
            && u64::from(width) * u64::from(height) <= self.max_pixels
    }

    fn bounds(&self) -> Bounds {
        let Limits { max_side, max_pixels, max_frames, max_seconds, .. } = *self;
        Bounds { max_side, max_pixels, max_frames, max_seconds, max_answer: Self::ANSWER }
    }
}

/// Whether these are the first bytes of a video: MP4 or QuickTime, Matroska or WebM, AVI.
pub fn is_video(bytes: &[u8]) -> bool {
    let at = |from: usize, what: &[u8]| bytes.get(from..from + what.len()) == Some(what);
    let atoms: [&[u8]; 6] = [b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"];
    atoms.iter().any(|atom| at(4, atom)) || at(0, b"\x1A\x45\xDF\xA3") || at(0, b"RIFF") && at(8, b"AVI ")
}

/// Reads videos one after another; one for each thread. Its child is started at the first video, and belongs to the
/// thread that asked for it: it dies with that thread.
pub struct Videos {
    limits: Limits,
    child: Option<Child>,
}

/// A video whose packets were read: whole as far as its container says, and within the limits.
pub struct Video<'a> {
    pub facts: Facts,
    videos: &'a mut Videos,
}

/// Pixels of frames as they came, in the child's memory.
pub struct Frames<'a> {
    /// Width and height of each.
    pub size: [u32; 2],
    /// Where the region that was asked for lies in each: [left, top, width, height].
    pub place: [f64; 4],
    /// How many frames were decoded for them.
    pub decoded: u64,
    child: &'a Child,
}

impl Videos {
    pub fn new(limits: Limits) -> Videos {
        Videos { limits, child: None }
    }

    /// Reads a file's packets. Faults: Code::Corrupt for anything that is not a video within the limits, Code::Usage
    /// where the program that decodes videos is not there or does not start.
    pub fn open(&mut self, bytes: &[u8]) -> Result<Video<'_>> {
        let most = self.limits.max_bytes;
        if bytes.len() > most {
            return Err(corrupt(format!("{} bytes, the limit is {most}", bytes.len())));
        }
        let ask = Ask::Open { bytes: bytes.len() as u64, bounds: self.limits.bounds() };
        self.child()?.write(bytes)?;
        match self.ask(&ask, Duration::ZERO)?.map_err(corrupt)? {
            Answer::Open(facts) if self.limits.allow(&facts) => Ok(Video { facts, videos: self }),
            other => Err(self.nonsense(&other)),
        }
    }

    /// Makes a video of pictures [height, width, 3], which lie one after another.
    pub fn encode(&mut self, recipe: &Recipe, fps: f64, [width, height]: [u32; 2], pixels: &[u8]) -> Result<Vec<u8>> {
        let frames = pixels.len() as u64 / (u64::from(width) * u64::from(height) * 3);
        self.child()?.write(pixels)?;
        self.made(&Ask::Encode { recipe: recipe.clone(), fps, width, height, frames }, Duration::from_secs(600))
    }

    /// Decodes an Ogg Opus file of at most `most` samples: one channel, the mean of all, at 48 kHz. Of a file that is none, why.
    pub fn sound(&mut self, bytes: &[u8], most: u64, samples: &mut Vec<f32>) -> Result<Result<(), String>> {
        self.child()?.write(bytes)?;
        let count = match self.ask(&Ask::Sound { bytes: bytes.len() as u64, most }, Duration::ZERO)? {
            Ok(Answer::Sound { samples }) if samples <= most.min(self.child()?.length()? / 4) => samples,
            Ok(other) => return Ok(Err(self.nonsense(&other).message)),
            Err(why) => return Ok(Err(why)),
        };
        let mut raw = vec![0; 4 * count as usize];
        self.child()?.read(&mut raw, 0)?;
        samples.extend(raw.as_chunks::<4>().0.iter().map(|four| f32::from_ne_bytes(*four)));
        Ok(Ok(()))
    }

    /// The child's process id, for those who watch it; none before the first video.
    pub fn process(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn child(&mut self) -> Result<&mut Child> {
        if self.child.is_none() {
            self.child = Some(Child::start()?);
        }
        Ok(self.child.as_mut().expect("started above"))
    }

    /// Asks; a child that does not answer in time, or is gone, is given up. Instead of an answer, why the file is none.
    fn ask(&mut self, ask: &Ask, more: Duration) -> Result<Result<Answer, String>> {
        let deadline = self.limits.deadline + more;
        match self.child()?.ask(ask, deadline) {
            Ok(Answer::Refused(why)) => Ok(Err(why)),
            Ok(answer) => Ok(Ok(answer)),
            Err(lost) => {
                let end = self.child.take().map(Child::end).unwrap_or_default();
                Ok(Err(match lost {
                    child::Lost::Late => format!("its decoder gave no answer in {deadline:?}, and was ended"),
                    child::Lost::Gone => format!("its decoder ended on it ({end})"),
                }))
            }
        }
    }

    fn made(&mut self, ask: &Ask, more: Duration) -> Result<Vec<u8>> {
        match self.ask(ask, more)?.map_err(corrupt)? {
            Answer::Video { bytes } if bytes <= self.child()?.length()? => {
                let mut video = vec![0; bytes as usize];
                self.child()?.read(&mut video, 0)?;
                Ok(video)
            }
            other => Err(self.nonsense(&other)),
        }
    }

    /// A child that a video has taken over may say anything.
    fn nonsense(&mut self, answer: &Answer) -> Fault {
        self.child.take().map(Child::end);
        corrupt(format!("its decoder answered another question: {answer:?}"))
    }
}

impl<'a> Video<'a> {
    /// Frames `indices`, rising, each once; of each the pixels of `region` [left, top, width, height] (upright)
    /// or a little more, smaller by 1/2, 1/4 or 1/8 while the region still has `least` [width, height].
    pub fn frames(self, indices: &[u64], region: [u32; 4], least: [u32; 2]) -> Result<Frames<'a>> {
        let Video { videos, .. } = self;
        let ask = Ask::Frames { indices: indices.to_vec(), region, least };
        match videos.ask(&ask, Duration::ZERO)?.map_err(corrupt)? {
            Answer::Frames { size, place, decoded } if plausible(size, place, region) => {
                Ok(Frames { size, place, decoded, child: videos.child.as_ref().expect("it has answered") })
            }
            other => Err(videos.nonsense(&other)),
        }
    }

    /// The video encoded anew, upright; the shorter side brought down to `shorter` where it is longer, at `fps` frames
    /// a second. Where the same libraries encode, the same video gives the same bytes.
    pub fn recode(self, recipe: &Recipe, fps: Option<f64>, shorter: Option<u32>) -> Result<Vec<u8>> {
        let more = Duration::from_secs_f64(4.0 * self.facts.seconds);
        self.videos.made(&Ask::Recode { recipe: recipe.clone(), fps, shorter }, more)
    }
}

/// Whether an answer's numbers can be reckoned with: a box inside of pixels that are no more than were asked for.
fn plausible([width, height]: [u32; 2], [left, top, w, h]: [f64; 4], region: [u32; 4]) -> bool {
    let within = |from: f64, size: f64, all: u32| from >= 0.0 && size > 0.0 && from + size <= f64::from(all) + 1e-6;
    let most = |side: u32, asked: u32| side > 0 && side <= asked.saturating_add(2);
    within(left, w, width) && within(top, h, height) && most(width, region[2]) && most(height, region[3])
}

impl Frames<'_> {
    /// Bytes of each.
    pub fn bytes(&self) -> usize {
        self.size[0] as usize * self.size[1] as usize * 3
    }

    /// The pixels [height, width, 3] of the frame that was asked for after `at` others.
    pub fn read(&self, at: usize, pixels: &mut [u8]) -> Result<()> {
        assert_eq!(pixels.len(), self.bytes(), "bytes of a frame");
        self.child.read(pixels, (at * self.bytes()) as u64)
    }
}

fn corrupt(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Corrupt, format!("not a video that can be decoded: {why}"))
}
