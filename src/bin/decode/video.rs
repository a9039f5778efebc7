//! Demuxing of a file in memory. All packets are read at once, which is cheap compared with decoding one frame, and
//! gives the index of every frame without relying on the container's own.

use crate::RequestError;
use crate::protocol::{DecodeLimits, VideoInfo};
use crate::raw;
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
pub struct FrameEntry {
    /// Presentation timestamp in units of the stream; in a video without timestamps, the index of the frame.
    pub pts: i64,
    pub packet_index: usize,
}

/// An open video.
pub struct DemuxedVideo {
    pub info: VideoInfo,
    pub limits: DecodeLimits,
    pub parameters: codec::Parameters,
    pub time_base: Rational,
    /// Packets in decoding order.
    pub packets: Vec<Packet>,
    /// Frames in presentation order.
    pub frames: Vec<FrameEntry>,
    /// True if packets have valid timestamps. Otherwise frames are counted from the first.
    pub has_timestamps: bool,
    /// Width and height of coded frames.
    pub coded_size: [u32; 2],
    // Owns the memory of `parameters`; dropped last.
    _input: Input,
}

impl DemuxedVideo {
    /// Reads all packets of a file.
    ///
    /// # Errors
    /// If the file is not a supported video or exceeds the limits.
    pub fn open(file: Vec<u8>, limits: DecodeLimits) -> Result<DemuxedVideo, RequestError> {
        let mut input = open_demuxer(file, FORMATS, DECODERS).map_err(|error| {
            format!("it is none of MP4, QuickTime, WebM, Matroska, AVI, or its beginning is damaged ({error})")
        })?;
        let container = input.format().name().split(',').next().unwrap_or_default().to_owned();
        let stream = input.streams().best(media::Type::Video).ok_or("it has no video stream")?;
        let stream_index = stream.index();
        let time_base = stream.time_base();
        let rotation = rotation(&stream)?;
        let average_fps = f64::from(stream.avg_frame_rate());
        let parameters = stream.parameters();
        let codec = parameters.id();
        if !CODECS.contains(&codec) {
            return Err(format!("its video codec is {}, which is none of {CODECS:?}", codec.name()));
        }
        let coded_size = checked_size(&parameters, &limits)?;
        let packets = read_packets(&mut input, stream_index, &limits)?;
        let timed_frames = timed_frames(&packets);
        let has_timestamps = timed_frames.is_some();
        let frames = timed_frames.unwrap_or_else(|| counted_frames(&packets));
        let (Some(first), Some(last)) = (frames.first(), frames.last()) else {
            return Err("there is no frame in it".into());
        };
        let frame_seconds = 1.0 / if average_fps > 0.0 { average_fps } else { 25.0 };
        let seconds = if has_timestamps {
            (last.pts - first.pts) as f64 * f64::from(time_base) + frame_seconds
        } else {
            frames.len() as f64 * frame_seconds
        };
        if !(seconds > 0.0 && seconds <= limits.max_seconds) {
            return Err(format!("it is {seconds} s long, the limit is {}", limits.max_seconds));
        }
        let [coded_width, coded_height] = coded_size;
        let [width, height] = if rotation.is_multiple_of(180) { coded_size } else { [coded_height, coded_width] };
        let info = VideoInfo {
            frames: frames.len() as u64,
            seconds,
            fps: frames.len() as f64 / seconds,
            width,
            height,
            rotation,
            codec: codec.name().into(),
            container,
        };
        Ok(DemuxedVideo {
            info,
            limits,
            parameters,
            time_base,
            packets,
            frames,
            has_timestamps,
            coded_size,
            _input: input,
        })
    }
}

/// Opens a file in memory with FFmpeg. Only formats that refer to no other file may be permitted.
pub fn open_demuxer(file: Vec<u8>, formats: &str, decoders: &str) -> Result<Input, Error> {
    let mut options = Dictionary::new();
    options.set("format_whitelist", formats);
    options.set("codec_whitelist", decoders);
    options.set("protocol_whitelist", "");
    options.set("threads", "1");
    format::input_from_stream(StreamIo::from_read_seek(Cursor::new(file))?, None, Some(options))
}

/// Returns the width and height of coded frames according to the container, if they are within the limits.
fn checked_size(parameters: &codec::Parameters, limits: &DecodeLimits) -> Result<[u32; 2], RequestError> {
    let [width, height] = raw::coded_size(parameters);
    if width == 0 || height == 0 || width.max(height) > limits.max_side {
        return Err(format!("{width}x{height} pixels, a side may have {}", limits.max_side));
    }
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(format!("frames of {width}x{height} pixels, the limit is {} in all", limits.max_pixels));
    }
    Ok([width, height])
}

fn read_packets(input: &mut Input, stream: usize, limits: &DecodeLimits) -> Result<Vec<Packet>, RequestError> {
    let mut packets = Vec::new();
    for (_, packet) in input.packets().filter(|(_, packet)| packet.stream() == stream && packet.size() > 0) {
        if packets.len() as u64 >= limits.max_frames {
            return Err(format!("it has more than {} frames, which is the limit", limits.max_frames));
        }
        packets.push(packet);
    }
    Ok(packets)
}

/// Returns the packets whose frames are shown, with their indices.
fn shown_packets(packets: &[Packet]) -> impl Iterator<Item = (usize, &Packet)> {
    packets.iter().enumerate().filter(|(_, packet)| !raw::is_discarded(packet))
}

/// Returns the frames in presentation order, if all packets have different timestamps.
fn timed_frames(packets: &[Packet]) -> Option<Vec<FrameEntry>> {
    let entry = |(packet_index, packet): (usize, &Packet)| Some(FrameEntry { pts: packet.pts()?, packet_index });
    let mut frames = shown_packets(packets).map(entry).collect::<Option<Vec<_>>>()?;
    frames.sort_by_key(|frame| frame.pts);
    frames.windows(2).all(|pair| pair[0].pts < pair[1].pts).then_some(frames)
}

/// Returns the frames in file order, with their indices as timestamps.
fn counted_frames(packets: &[Packet]) -> Vec<FrameEntry> {
    let indices = shown_packets(packets).map(|(packet_index, _)| packet_index);
    indices.zip(0..).map(|(packet_index, pts)| FrameEntry { pts, packet_index }).collect()
}

/// Returns the clockwise rotation in degrees (0, 90, 180, 270) that the container's display matrix asks for.
fn rotation(stream: &Stream) -> Result<u32, RequestError> {
    let Some(matrix) = stream.side_data().find(|data| data.kind() == side_data::Type::DisplayMatrix) else {
        return Ok(0);
    };
    let entry = |index: usize| {
        let bytes: Option<&[u8; 4]> = matrix.data()[..].get(4 * index..)?.first_chunk();
        bytes.map(|bytes| i32::from_ne_bytes(*bytes))
    };
    let (Some(across), Some(down)) = (entry(0), entry(1)) else {
        return Err("its display matrix is truncated".into());
    };
    let degrees = f64::from(down).atan2(f64::from(across)).to_degrees();
    Ok(((degrees / 90.0).round() as i32).rem_euclid(4) as u32 * 90)
}
