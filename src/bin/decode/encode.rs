//! Encoding of videos: a decoded video transcoded, or a sequence of images.

use crate::RequestError;
use crate::convert::Converter;
use crate::frames;
use crate::protocol::{Codec, Container, VideoEncoding};
use crate::video::DemuxedVideo;
use ffmpeg_next::codec::packet::Packet;
use ffmpeg_next::codec::{self, Flags as CodecFlags, threading};
use ffmpeg_next::format::context::{Output, StreamIo};
use ffmpeg_next::format::{Flags as FormatFlags, Pixel};
use ffmpeg_next::software::scaling::{Context as Scaler, Flags as ScalerFlags};
use ffmpeg_next::util::frame::Video as Frame;
use ffmpeg_next::{Dictionary, Rational, encoder, format};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Cursor, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

/// Transcodes the open video: upright, downscaled so that the short side is at most `short_side`, and resampled to
/// `fps` frames per second by repeating or dropping frames. What is `None` stays unchanged.
pub fn transcode(
    video: &DemuxedVideo,
    encoding: &VideoEncoding,
    fps: Option<f64>,
    short_side: Option<u32>,
) -> Result<Vec<u8>, RequestError> {
    let info = &video.info;
    let fps = fps.unwrap_or(info.fps);
    let size = [info.width, info.height];
    let scale = short_side.map_or(1.0, |side| (f64::from(side) / f64::from(info.width.min(info.height))).min(1.0));
    // Chroma of half the size needs even sides.
    let scaled_size = size.map(|side| ((f64::from(side) * scale / 2.0).round() as u32 * 2).max(2));
    let mut converter = Converter::new(info, [0, 0, info.width, info.height], size)?;
    let mut writer = VideoWriter::new(encoding, fps, scaled_size)?;
    let repeats = frame_repeats(video, fps);
    let wanted: BTreeSet<usize> = (0..repeats.len()).filter(|&frame| repeats[frame] > 0).collect();
    let mut next = 0;
    frames::decode(video, &wanted, &mut |index, frame| {
        if index < next {
            return Err("its frames cannot be decoded in their order".into());
        }
        next = index;
        let image = rgb_frame(converter.convert(frame)?, size);
        (0..repeats[index]).try_for_each(|_| writer.write_frame(&image))
    })?;
    writer.finish()
}

/// Returns how often each frame is shown at `fps` frames per second.
fn frame_repeats(video: &DemuxedVideo, fps: f64) -> Vec<usize> {
    let frames = &video.frames;
    let pts_seconds = if video.has_timestamps { f64::from(video.time_base) } else { 1.0 / video.info.fps };
    let mut repeats = vec![0; frames.len()];
    let count = (video.info.seconds * fps).round().max(1.0) as usize;
    for index in 0..count {
        // Plus a thousandth of a frame, because timestamps are rounded.
        let time = (index as f64 + 1e-3) / fps;
        let following = frames.partition_point(|frame| (frame.pts - frames[0].pts) as f64 * pts_seconds <= time);
        repeats[following.max(1) - 1] += 1;
    }
    repeats
}

/// Encodes `frames` images of `size` [width, height] from the shared memory.
pub fn encode_images(
    encoding: &VideoEncoding,
    fps: f64,
    size: [u32; 2],
    frames: u64,
    memory: &File,
) -> Result<Vec<u8>, RequestError> {
    let mut writer = VideoWriter::new(encoding, fps, size)?;
    let mut pixels = vec![0; size[0] as usize * size[1] as usize * 3];
    for index in 0..frames {
        let offset = index * pixels.len() as u64;
        memory.read_exact_at(&mut pixels, offset).map_err(|error| error.to_string())?;
        writer.write_frame(&rgb_frame(&pixels, size))?;
    }
    writer.finish()
}

/// Copies pixels [height, width, 3] to an FFmpeg frame.
fn rgb_frame(pixels: &[u8], [width, height]: [u32; 2]) -> Frame {
    let mut frame = Frame::new(Pixel::RGB24, width, height);
    let stride = frame.stride(0);
    let rows = pixels.chunks_exact(width as usize * 3);
    frame.data_mut(0).chunks_mut(stride).zip(rows).for_each(|(to, row)| to[..row.len()].copy_from_slice(row));
    frame
}

/// Encodes and muxes a video.
struct VideoWriter {
    output: Output,
    encoder: encoder::video::Encoder,
    time_base: Rational,
    /// Created for the first frame.
    scaler: Option<Scaler>,
    frames: i64,
    file: OutputBuffer,
}

impl VideoWriter {
    fn new(encoding: &VideoEncoding, fps: f64, size: [u32; 2]) -> Result<VideoWriter, RequestError> {
        if size.iter().any(|side| side % 2 == 1) {
            return Err(format!("a video of {}x{} pixels: both sides must be even", size[0], size[1]));
        }
        if !(fps > 0.0 && fps <= 1000.0) {
            return Err(format!("a video of {fps} frames per second: more than 0, at most 1000"));
        }
        Self::open(encoding, fps, size).map_err(|error| format!("{:?} cannot be encoded here: {error}", encoding.codec))
    }

    fn open(encoding: &VideoEncoding, fps: f64, size: [u32; 2]) -> Result<VideoWriter, ffmpeg_next::Error> {
        let file = OutputBuffer::default();
        let io = StreamIo::from_write_seek(file.clone())?;
        let mut output = format::output_to_stream(io, None, Some(muxer_name(encoding.container)))?;
        let time_base = Rational::new(1000, (fps * 1000.0).round() as i32);
        let wants_global_header = output.format().flags().contains(FormatFlags::GLOBAL_HEADER);
        let encoder = open_encoder(encoding, time_base, size, wants_global_header)?;
        let mut stream = output.add_stream_with(&encoder)?;
        stream.set_time_base(time_base);
        stream.set_avg_frame_rate(time_base.invert());
        let mut options = Dictionary::new();
        options.set("fflags", "+bitexact");
        output.write_header_with(options)?;
        Ok(VideoWriter { output, encoder, time_base, scaler: None, frames: 0, file })
    }

    /// Scales an image to the video's size and appends it.
    fn write_frame(&mut self, image: &Frame) -> Result<(), RequestError> {
        let encoder = &self.encoder;
        let mut out = Frame::new(encoder.format(), encoder.width(), encoder.height());
        if self.scaler.is_none() {
            let flags = ScalerFlags::BICUBIC | ScalerFlags::ACCURATE_RND | ScalerFlags::BITEXACT;
            let scaler = Scaler::get(
                Pixel::RGB24,
                image.width(),
                image.height(),
                encoder.format(),
                encoder.width(),
                encoder.height(),
                flags,
            );
            self.scaler = Some(scaler.map_err(|error| error.to_string())?);
        }
        self.scaler.as_mut().expect("created above").run(image, &mut out).map_err(|error| error.to_string())?;
        out.set_pts(Some(self.frames));
        self.frames += 1;
        let sent = self.encoder.send_frame(&out);
        sent.and_then(|()| self.write_packets()).map_err(|error| format!("a frame cannot be encoded: {error}"))
    }

    fn write_packets(&mut self) -> Result<(), ffmpeg_next::Error> {
        let mut packet = Packet::empty();
        let stream_time_base = self.output.stream(0).expect("the one stream").time_base();
        while self.encoder.receive_packet(&mut packet).is_ok() {
            packet.set_stream(0);
            if packet.duration() == 0 {
                packet.set_duration(1);
            }
            packet.rescale_ts(self.time_base, stream_time_base);
            packet.write_interleaved(&mut self.output)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>, RequestError> {
        let sent = self.encoder.send_eof();
        let finished = sent.and_then(|()| self.write_packets()).and_then(|()| self.output.write_trailer());
        finished.map_err(|error| format!("the video cannot be finished: {error}"))?;
        // Dropping the output flushes FFmpeg's buffer.
        drop(self.output);
        Ok(std::mem::take(self.file.0.lock().expect("no panic while locked").get_mut()))
    }
}

fn open_encoder(
    encoding: &VideoEncoding,
    time_base: Rational,
    [width, height]: [u32; 2],
    global_header: bool,
) -> Result<encoder::video::Encoder, ffmpeg_next::Error> {
    let codec = encoder::find_by_name(encoder_name(encoding.codec)).ok_or(ffmpeg_next::Error::EncoderNotFound)?;
    let mut context = codec::Context::new_with_codec(codec);
    let mut flags = CodecFlags::BITEXACT;
    flags.set(CodecFlags::GLOBAL_HEADER, global_header);
    flags.set(CodecFlags::CLOSED_GOP, encoding.codec == Codec::H264 && !encoding.open_gop);
    context.set_flags(flags);
    // One thread, because the output of some encoders depends on the number of threads.
    context.set_threading(threading::Config { kind: threading::Type::None, count: 1, ..Default::default() });
    let mut video = context.encoder().video()?;
    video.set_width(width);
    video.set_height(height);
    video.set_format(pixel_format(encoding.codec));
    video.set_time_base(time_base);
    video.set_frame_rate(Some(time_base.invert()));
    video.set_gop(encoding.max_keyframe_interval);
    video.set_max_b_frames(encoding.max_b_frames as usize);
    video.open_as_with(codec, encoder_options(encoding))
}

/// Returns FFmpeg's name of the encoder.
fn encoder_name(codec: Codec) -> &'static str {
    match codec {
        Codec::H264 => "libx264",
        Codec::H265 => "libx265",
        Codec::Vp9 => "libvpx-vp9",
        Codec::Av1 => "libaom-av1",
        Codec::Mpeg4 => "mpeg4",
        Codec::Mjpeg => "mjpeg",
    }
}

/// Returns the pixel format that the encoder gets.
fn pixel_format(codec: Codec) -> Pixel {
    if codec == Codec::Mjpeg { Pixel::YUVJ420P } else { Pixel::YUV420P }
}

/// Returns FFmpeg's name of the muxer.
fn muxer_name(container: Container) -> &'static str {
    match container {
        Container::Mp4 => "mp4",
        Container::Webm => "webm",
        Container::Mkv => "matroska",
        Container::Avi => "avi",
    }
}

/// Returns the options of the encoder. Quality 1 to 100 is mapped to each encoder's own scale.
fn encoder_options(encoding: &VideoEncoding) -> Dictionary<'static> {
    let quantizer = |max: f64| ((100.0 - f64::from(encoding.quality)) / 99.0 * max).round();
    let mut options = Dictionary::new();
    match encoding.codec {
        Codec::H264 => {
            options.set("crf", &quantizer(51.0).to_string());
            options.set("preset", "medium");
        }
        Codec::H265 => {
            let interval = encoding.max_keyframe_interval;
            let b_frames = encoding.max_b_frames;
            options.set("crf", &quantizer(51.0).to_string());
            options.set(
                "x265-params",
                &format!("pools=none:frame-threads=1:log-level=none:keyint={interval}:bframes={b_frames}"),
            );
        }
        Codec::Vp9 | Codec::Av1 => {
            options.set("crf", &quantizer(63.0).to_string());
            options.set("b", "0");
            options.set("cpu-used", "8");
            options.set("row-mt", "0");
        }
        Codec::Mpeg4 | Codec::Mjpeg => {
            let scale = (2.0 + quantizer(29.0)).to_string();
            options.set("qmin", &scale);
            options.set("qmax", &scale);
        }
    }
    options
}

/// The file that is written, in memory.
#[derive(Clone, Default)]
struct OutputBuffer(Arc<Mutex<Cursor<Vec<u8>>>>);

impl Write for OutputBuffer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic while locked").write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for OutputBuffer {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.lock().expect("no panic while locked").seek(to)
    }
}
