//! A file in memory becomes packets and facts. All packets are read at once, which costs little against decoding one
//! frame, and says which frame stands where without trusting what the container says about it.

use crate::Refusal;
use crate::raw;
use crate::wire::{Bounds, Facts};
use ffmpeg_next::codec::packet::Packet;
use ffmpeg_next::codec::{Id, packet::side_data};
use ffmpeg_next::format::context::{Input, StreamIo};
use ffmpeg_next::format::stream::Stream;
use ffmpeg_next::{Dictionary, Error, Rational, codec, format, media};
use std::io::Cursor;

/// Demuxers by FFmpeg's names: MP4 and QuickTime, Matroska and WebM, AVI.
const FORMATS: &str = "mov,matroska,avi";
/// Decoders by FFmpeg's names.
const DECODERS: &str = "h264,hevc,vp9,libdav1d,libaom-av1,av1,mpeg4,mjpeg";
/// Codecs by FFmpeg's ids.
const CODECS: [Id; 6] = [Id::H264, Id::HEVC, Id::VP9, Id::AV1, Id::MPEG4, Id::MJPEG];

/// A frame that is shown.
pub struct Shown {
    /// When, in units of the stream; of a video whose packets do not say it, its number.
    pub pts: i64,
    /// Its packet.
    pub packet: usize,
}

/// An open video.
pub struct Video {
    pub facts: Facts,
    pub bounds: Bounds,
    pub parameters: codec::Parameters,
    pub time_base: Rational,
    /// In the order of decoding.
    pub packets: Vec<Packet>,
    /// In the order of showing.
    pub frames: Vec<Shown>,
    /// Whether packets say when their frame is shown. Otherwise frames are counted from the first.
    pub timed: bool,
    /// Width and height of stored frames.
    pub stored: [u32; 2],
    // Parameters are part of it; dropped last.
    _input: Input,
}

impl Video {
    /// Reads the file. Refuses what is no video within the bounds.
    pub fn open(file: Vec<u8>, bounds: Bounds) -> Result<Video, Refusal> {
        let mut input = demuxer(file, FORMATS, DECODERS).map_err(|error| {
            format!("it is none of MP4, QuickTime, WebM, Matroska, AVI, or its beginning is damaged ({error})")
        })?;
        let container = input.format().name().split(',').next().unwrap_or_default().to_owned();
        let stream = input.streams().best(media::Type::Video).ok_or("there are no pictures in it")?;
        let (number, time_base, rotation) = (stream.index(), stream.time_base(), rotation(&stream)?);
        let average = f64::from(stream.avg_frame_rate());
        let parameters = stream.parameters();
        let id = parameters.id();
        if !CODECS.contains(&id) {
            return Err(format!("its pictures are coded as {}, which is none of {CODECS:?}", id.name()));
        }
        let stored = size(&parameters, &bounds)?;
        let packets = packets(&mut input, number, &bounds)?;
        let (frames, timed) = frames(&packets);
        let (Some(first), Some(last)) = (frames.first(), frames.last()) else {
            return Err("there is no frame in it".into());
        };
        let one = 1.0 / if average > 0.0 { average } else { 25.0 };
        let seconds = match timed {
            true => (last.pts - first.pts) as f64 * f64::from(time_base) + one,
            false => frames.len() as f64 * one,
        };
        if !(seconds > 0.0 && seconds <= bounds.max_seconds) {
            return Err(format!("it is {seconds} s long, the limit is {}", bounds.max_seconds));
        }
        let [width, height] = if rotation.is_multiple_of(180) { stored } else { [stored[1], stored[0]] };
        let facts = Facts {
            frames: frames.len() as u64,
            seconds,
            fps: frames.len() as f64 / seconds,
            width,
            height,
            rotation,
            codec: id.name().into(),
            container,
        };
        Ok(Video { facts, bounds, parameters, time_base, packets, frames, timed, stored, _input: input })
    }
}

/// FFmpeg on a file in memory, of whose formats those alone are allowed that name no other file.
pub fn demuxer(file: Vec<u8>, formats: &str, decoders: &str) -> Result<Input, Error> {
    let mut options = Dictionary::new();
    for (key, value) in
        [("format_whitelist", formats), ("codec_whitelist", decoders), ("protocol_whitelist", ""), ("threads", "1")]
    {
        options.set(key, value);
    }
    format::input_from_stream(StreamIo::from_read_seek(Cursor::new(file))?, None, Some(options))
}

/// Width and height of stored frames, as far as they are known before decoding.
fn size(parameters: &codec::Parameters, bounds: &Bounds) -> Result<[u32; 2], Refusal> {
    let [width, height] = raw::size(parameters);
    if width == 0 || height == 0 || width.max(height) > bounds.max_side {
        return Err(format!("{width}x{height} pixels, a side may have {}", bounds.max_side));
    }
    if u64::from(width) * u64::from(height) > bounds.max_pixels {
        return Err(format!("frames of {width}x{height} pixels, the limit is {} in all", bounds.max_pixels));
    }
    Ok([width, height])
}

fn packets(input: &mut Input, stream: usize, bounds: &Bounds) -> Result<Vec<Packet>, Refusal> {
    let mut packets = Vec::new();
    for (_, packet) in input.packets().filter(|(_, packet)| packet.stream() == stream && packet.size() > 0) {
        if packets.len() as u64 >= bounds.max_frames {
            return Err(format!("it has more than {} frames, which is the limit", bounds.max_frames));
        }
        packets.push(packet);
    }
    Ok(packets)
}

/// The frames in the order of showing, and whether packets say what that is.
fn frames(packets: &[Packet]) -> (Vec<Shown>, bool) {
    let shown = || packets.iter().enumerate().filter(|(_, packet)| !raw::hidden(packet));
    let timed: Option<Vec<Shown>> =
        shown().map(|(at, packet)| packet.pts().map(|pts| Shown { pts, packet: at })).collect();
    if let Some(mut frames) = timed {
        frames.sort_by_key(|frame| frame.pts);
        if frames.windows(2).all(|two| two[0].pts < two[1].pts) {
            return (frames, true);
        }
    }
    (shown().enumerate().map(|(number, (at, _))| Shown { pts: number as i64, packet: at }).collect(), false)
}

/// Degrees clockwise that the container's matrix turns stored frames by.
fn rotation(stream: &Stream) -> Result<u32, Refusal> {
    let Some(matrix) = stream.side_data().find(|data| data.kind() == side_data::Type::DisplayMatrix) else {
        return Ok(0);
    };
    let entry = |at: usize| {
        matrix.data().get(4 * at..4 * at + 4).map(|four| i32::from_ne_bytes([four[0], four[1], four[2], four[3]]))
    };
    let (Some(across), Some(down)) = (entry(0), entry(1)) else {
        return Err("its matrix of rotation is cut".into());
    };
    let degrees = f64::from(down).atan2(f64::from(across)).to_degrees();
    Ok(((degrees / 90.0).round() as i32).rem_euclid(4) as u32 * 90)
}
