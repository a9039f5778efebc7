//! `occlude-decode`: the only program that links FFmpeg. `occlude` starts one process for each of its decoding threads,
//! so that a video or an Opus file that makes a decoder crash or hang costs one sample.
//!
//! Whatever a file contains, this process cannot open another file, socket or device: it has no file descriptor left,
//! FFmpeg reads the file from memory, and playlist formats are disabled.

mod sandbox; // resource limits of this process
mod convert; // decoded frames → upright pixels
mod encode; // pixels → a video
mod frames; // decoding of selected frames
mod audio; // Ogg Opus, for which the program itself has no decoder
mod raw; // parts of FFmpeg that ffmpeg-next does not expose
mod video; // demuxing: a file → packets and metadata
#[path = "../../data/video/protocol.rs"]
mod protocol;

use protocol::{DecodeRequest, DecodeResponse, PROTOCOL_VERSION};
use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use video::DemuxedVideo;

/// The reason why a request fails.
type RequestError = String;

fn main() -> std::io::Result<()> {
    raw::close_inherited_fds()?;
    let mut socket = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let memory = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    if ffmpeg_next::init().is_err() {
        return Err(std::io::Error::other("FFmpeg does not start"));
    }
    ffmpeg_next::log::set_level(ffmpeg_next::log::Level::Quiet);
    sandbox::restrict_process()?;
    send(&mut socket, &DecodeResponse::Ready { version: PROTOCOL_VERSION })?;
    let mut open_video = None;
    for line in std::io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?).map_err(std::io::Error::other)?;
        let response = handle(request, &mut open_video, &memory).unwrap_or_else(DecodeResponse::Refused);
        send(&mut socket, &response)?;
    }
    Ok(())
}

fn send(socket: &mut File, response: &DecodeResponse) -> std::io::Result<()> {
    let line = serde_json::to_string(response)? + "\n";
    socket.write_all(line.as_bytes())
}

fn handle(
    request: DecodeRequest,
    open_video: &mut Option<DemuxedVideo>,
    memory: &File,
) -> Result<DecodeResponse, RequestError> {
    match request {
        DecodeRequest::Open { bytes, limits } => {
            *open_video = None;
            let video = open_video.insert(DemuxedVideo::open(read_file(bytes, memory)?, limits)?);
            Ok(DecodeResponse::Open(video.info.clone()))
        }
        DecodeRequest::Opus { bytes, max_samples } => {
            *open_video = None;
            audio::decode_opus(read_file(bytes, memory)?, max_samples, memory)
        }
        DecodeRequest::Frames { indices, region, min_size } => {
            let video = open_video.as_mut().ok_or("no video is open")?;
            frames::decode_frames(video, &indices, region, min_size, memory)
        }
        DecodeRequest::Transcode { encoding, fps, short_side } => {
            let video = open_video.as_mut().ok_or("no video is open")?;
            write_video(encode::transcode(video, &encoding, fps, short_side)?, memory)
        }
        DecodeRequest::Encode { encoding, fps, width, height, frames } => {
            write_video(encode::encode_images(&encoding, fps, [width, height], frames, memory)?, memory)
        }
    }
}

/// Reads the file at the beginning of the shared memory.
fn read_file(bytes: u64, memory: &File) -> Result<Vec<u8>, RequestError> {
    let mut file = vec![0; bytes as usize];
    memory.read_exact_at(&mut file, 0).map_err(|error| error.to_string())?;
    Ok(file)
}

fn write_video(video: Vec<u8>, memory: &File) -> Result<DecodeResponse, RequestError> {
    memory.write_all_at(&video, 0).map_err(|error| error.to_string())?;
    Ok(DecodeResponse::Video { bytes: video.len() as u64 })
}
