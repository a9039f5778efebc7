//! `occlude-decode`: the program that links FFmpeg, so that nothing else has to. `occlude` starts one for each of its
//! decoding threads and survives it: a video that makes a decoder crash or hang costs one sample. So does an Opus file.
//!
//! Whatever a file says, this process opens no other file, no socket and no device: it has no descriptor left for one,
//! FFmpeg reads the file out of memory, and playlists are no format that it knows.

mod confine; // the limits that this process sets itself
mod convert; // frames as decoded → upright pixels
mod encode; // pixels become a video
mod frames; // the frames that are wanted, and no others
mod sound; // Opus, which no library decodes in the program itself
mod raw; // the few things that ffmpeg-next leaves out
mod video; // a file becomes packets and facts
#[path = "../../data/clip/wire.rs"]
mod wire;

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use video::Video;
use wire::{Answer, Ask, VERSION};

/// Why a request is refused.
type Refusal = String;

fn main() -> std::io::Result<()> {
    raw::close_inherited()?;
    let mut answers = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let memory = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    if ffmpeg_next::init().is_err() {
        return Err(std::io::Error::other("FFmpeg does not start"));
    }
    ffmpeg_next::log::set_level(ffmpeg_next::log::Level::Quiet);
    confine::confine()?;
    say(&mut answers, &Answer::Ready { version: VERSION })?;
    let mut open = None;
    for line in std::io::stdin().lock().lines() {
        let ask = serde_json::from_str(&line?).map_err(std::io::Error::other)?;
        let answer = answer(ask, &mut open, &memory).unwrap_or_else(Answer::Refused);
        say(&mut answers, &answer)?;
    }
    Ok(())
}

fn say(answers: &mut File, answer: &Answer) -> std::io::Result<()> {
    let line = serde_json::to_string(answer)? + "\n";
    answers.write_all(line.as_bytes())
}

fn answer(ask: Ask, open: &mut Option<Video>, memory: &File) -> Result<Answer, Refusal> {
    match ask {
        Ask::Open { bytes, bounds } => {
            *open = None;
            let video = open.insert(Video::open(given(bytes, memory)?, bounds)?);
            Ok(Answer::Open(video.facts.clone()))
        }
        Ask::Sound { bytes, most } => {
            *open = None;
            sound::answer(given(bytes, memory)?, most, memory)
        }
        Ask::Frames { indices, region, least } => {
            let video = open.as_mut().ok_or("no video is open")?;
            frames::answer(video, &indices, region, least, memory)
        }
        Ask::Recode { recipe, fps, shorter } => {
            let video = open.as_mut().ok_or("no video is open")?;
            written(encode::recode(video, &recipe, fps, shorter)?, memory)
        }
        Ask::Encode { recipe, fps, width, height, frames } => {
            written(encode::pictures(&recipe, fps, [width, height], frames, memory)?, memory)
        }
    }
}

/// The first so many bytes of the memory.
fn given(bytes: u64, memory: &File) -> Result<Vec<u8>, Refusal> {
    let mut file = vec![0; bytes as usize];
    memory.read_exact_at(&mut file, 0).map_err(|error| error.to_string())?;
    Ok(file)
}

fn written(video: Vec<u8>, memory: &File) -> Result<Answer, Refusal> {
    memory.write_all_at(&video, 0).map_err(|error| error.to_string())?;
    Ok(Answer::Video { bytes: video.len() as u64 })
}
