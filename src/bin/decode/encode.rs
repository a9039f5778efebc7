//! Pixels become a video: one that was decoded, encoded anew, or pictures one after another.

use crate::Refusal;
use crate::convert::Converter;
use crate::frames;
use crate::video::Video;
use crate::wire::{Codec, Container, Recipe};
use ffmpeg_next::codec::packet::Packet;
use ffmpeg_next::codec::{self, Flags as CodecFlags, threading};
use ffmpeg_next::format::context::{Output, StreamIo};
use ffmpeg_next::format::{Flags as FormatFlags, Pixel};
use ffmpeg_next::software::scaling::{Context as Scaler, Flags};
use ffmpeg_next::util::frame::Video as Frame;
use ffmpeg_next::{Dictionary, Rational, encoder, format};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Cursor, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

/// The open video anew: upright, the shorter side brought down to `shorter` where it is longer, at `fps` frames a
/// second, of which each is the one shown at its time. What is left out stays as it is.
pub fn recode(video: &Video, recipe: &Recipe, fps: Option<f64>, shorter: Option<u32>) -> Result<Vec<u8>, Refusal> {
    let facts = &video.facts;
    let fps = fps.unwrap_or(facts.fps);
    let [width, height] = [facts.width, facts.height];
    let factor = shorter.map_or(1.0, |side| (f64::from(side) / f64::from(width.min(height))).min(1.0));
    // Chroma of half the size wants even sides.
    let even = |side: u32| ((f64::from(side) * factor / 2.0).round() as u32 * 2).max(2);
    let mut converter = Converter::new(facts, [0, 0, width, height], [width, height])?;
    let mut writer = Writer::new(recipe, fps, [even(width), even(height)])?;
    let times = times(video, fps);
    let wanted: BTreeSet<usize> = (0..times.len()).filter(|&frame| times[frame] > 0).collect();
    let mut next = 0;
    frames::decode(video, &wanted, &mut |number, frame| {
        if number < next {
            return Err("its frames cannot be decoded in their order".into());
        }
        next = number;
        let pixels = picture(converter.convert(frame)?, [width, height]);
        (0..times[number]).try_for_each(|_| writer.frame(&pixels))
    })?;
    writer.finish()
}

/// How often each frame is shown at so many frames a second.
fn times(video: &Video, fps: f64) -> Vec<usize> {
    let frames = &video.frames;
    let one = if video.timed { f64::from(video.time_base) } else { 1.0 / video.facts.fps };
    let mut times = vec![0; frames.len()];
    let shown = (video.facts.seconds * fps).round().max(1.0) as usize;
    for number in 0..shown {
        // A thousandth of a frame, against rounding of time stamps.
        let at = (number as f64 + 1e-3) / fps;
        let after = frames.partition_point(|frame| (frame.pts - frames[0].pts) as f64 * one <= at);
        times[after.max(1) - 1] += 1;
    }
    times
}

/// So many pictures of `size` [width, height] in the memory.
pub fn pictures(recipe: &Recipe, fps: f64, size: [u32; 2], frames: u64, memory: &File) -> Result<Vec<u8>, Refusal> {
    let mut writer = Writer::new(recipe, fps, size)?;
    let mut pixels = vec![0; size[0] as usize * size[1] as usize * 3];
    for number in 0..frames {
        let at = number * pixels.len() as u64;
        memory.read_exact_at(&mut pixels, at).map_err(|error| error.to_string())?;
        writer.frame(&picture(&pixels, size))?;
    }
    writer.finish()
}

/// [height, width, 3] as FFmpeg wants it.
fn picture(pixels: &[u8], [width, height]: [u32; 2]) -> Frame {
    let mut frame = Frame::new(Pixel::RGB24, width, height);
    let stride = frame.stride(0);
    let rows = pixels.chunks_exact(width as usize * 3);
    frame.data_mut(0).chunks_mut(stride).zip(rows).for_each(|(to, row)| to[..row.len()].copy_from_slice(row));
    frame
}

/// A video being written.
struct Writer {
    output: Output,
    encoder: encoder::video::Encoder,
    time_base: Rational,
    scaler: Option<Scaler>,
    frames: i64,
    file: Memory,
}

impl Writer {
    fn new(recipe: &Recipe, fps: f64, size: [u32; 2]) -> Result<Writer, Refusal> {
        if size.iter().any(|side| side % 2 == 1) {
            return Err(format!("a video of {}x{} pixels: both sides must be even", size[0], size[1]));
        }
        if !(fps > 0.0 && fps <= 1000.0) {
            return Err(format!("a video of {fps} frames a second: more than 0, at most 1000"));
        }
        Self::begin(recipe, fps, size).map_err(|error| format!("{:?} cannot be encoded here: {error}", recipe.codec))
    }

    fn begin(recipe: &Recipe, fps: f64, [width, height]: [u32; 2]) -> Result<Writer, ffmpeg_next::Error> {
        let (name, pixel) = encoder_of(recipe.codec);
        let found = encoder::find_by_name(name).ok_or(ffmpeg_next::Error::EncoderNotFound)?;
        let file = Memory::default();
        let io = StreamIo::from_write_seek(file.clone())?;
        let mut output = format::output_to_stream(io, None, Some(muxer(recipe.container)))?;
        let mut context = codec::Context::new_with_codec(found);
        let mut flags = CodecFlags::BITEXACT;
        flags.set(CodecFlags::GLOBAL_HEADER, output.format().flags().contains(FormatFlags::GLOBAL_HEADER));
        flags.set(CodecFlags::CLOSED_GOP, recipe.codec == Codec::H264 && !recipe.open);
        context.set_flags(flags);
        // One thread: what it writes must not depend on how many there are.
        context.set_threading(threading::Config { kind: threading::Type::None, count: 1, ..Default::default() });
        let time_base = Rational::new(1000, (fps * 1000.0).round() as i32);
        let mut video = context.encoder().video()?;
        video.set_width(width);
        video.set_height(height);
        video.set_format(pixel);
        video.set_time_base(time_base);
        video.set_frame_rate(Some(time_base.invert()));
        video.set_gop(recipe.gop);
        video.set_max_b_frames(recipe.b_frames as usize);
        let encoder = video.open_as_with(found, options(recipe))?;
        let mut stream = output.add_stream_with(&encoder)?;
        stream.set_time_base(time_base);
        stream.set_avg_frame_rate(time_base.invert());
        let mut options = Dictionary::new();
        options.set("fflags", "+bitexact");
        output.write_header_with(options)?;
        Ok(Writer { output, encoder, time_base, scaler: None, frames: 0, file })
    }

    /// Appends one picture, brought to the video's size.
    fn frame(&mut self, picture: &Frame) -> Result<(), Refusal> {
        let encoder = &self.encoder;
        let mut out = Frame::new(encoder.format(), encoder.width(), encoder.height());
        if self.scaler.is_none() {
            let (from, to) = ([picture.width(), picture.height()], [encoder.width(), encoder.height()]);
            let flags = Flags::BICUBIC | Flags::ACCURATE_RND | Flags::BITEXACT;
            let made = Scaler::get(Pixel::RGB24, from[0], from[1], encoder.format(), to[0], to[1], flags);
            self.scaler = Some(made.map_err(|error| error.to_string())?);
        }
        self.scaler.as_mut().expect("made above").run(picture, &mut out).map_err(|error| error.to_string())?;
        out.set_pts(Some(self.frames));
        self.frames += 1;
        let sent = self.encoder.send_frame(&out);
        sent.and_then(|()| self.packets()).map_err(|error| format!("a frame cannot be encoded: {error}"))
    }

    fn packets(&mut self) -> Result<(), ffmpeg_next::Error> {
        let mut packet = Packet::empty();
        let base = self.output.stream(0).expect("the one stream").time_base();
        while self.encoder.receive_packet(&mut packet).is_ok() {
            packet.set_stream(0);
            if packet.duration() == 0 {
                packet.set_duration(1);
            }
            packet.rescale_ts(self.time_base, base);
            packet.write_interleaved(&mut self.output)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>, Refusal> {
        let end = self.encoder.send_eof().and_then(|()| self.packets()).and_then(|()| self.output.write_trailer());
        end.map_err(|error| format!("the video cannot be ended: {error}"))?;
        // The last bytes leave FFmpeg's buffer with it.
        drop(self.output);
        Ok(std::mem::take(self.file.0.lock().expect("no panic while held").get_mut()))
    }
}

/// FFmpeg's name for a codec's encoder, and what it is given.
fn encoder_of(codec: Codec) -> (&'static str, Pixel) {
    match codec {
        Codec::H264 => ("libx264", Pixel::YUV420P),
        Codec::H265 => ("libx265", Pixel::YUV420P),
        Codec::Vp9 => ("libvpx-vp9", Pixel::YUV420P),
        Codec::Av1 => ("libaom-av1", Pixel::YUV420P),
        Codec::Mpeg4 => ("mpeg4", Pixel::YUV420P),
        Codec::Mjpeg => ("mjpeg", Pixel::YUVJ420P),
    }
}

fn muxer(container: Container) -> &'static str {
    match container {
        Container::Mp4 => "mp4",
        Container::Webm => "webm",
        Container::Mkv => "matroska",
        Container::Avi => "avi",
    }
}

/// What encoders are told in their own words. Quality 1 to 100 becomes each one's own scale.
fn options(recipe: &Recipe) -> Dictionary<'static> {
    let worst = |scale: f64| ((100.0 - f64::from(recipe.quality)) / 99.0 * scale).round();
    let mut options = Dictionary::new();
    let mut set = |key: &str, value: &str| options.set(key, value);
    match recipe.codec {
        Codec::H264 => {
            set("crf", &worst(51.0).to_string());
            set("preset", "medium");
        }
        Codec::H265 => {
            set("crf", &worst(51.0).to_string());
            let (gop, frames) = (recipe.gop, recipe.b_frames);
            set("x265-params", &format!("pools=none:frame-threads=1:log-level=none:keyint={gop}:bframes={frames}"));
        }
        Codec::Vp9 | Codec::Av1 => {
            set("crf", &worst(63.0).to_string());
            set("b", "0");
            set("cpu-used", "8");
            set("row-mt", "0");
        }
        Codec::Mpeg4 | Codec::Mjpeg => {
            let scale = (2.0 + worst(29.0)).to_string();
            set("qmin", &scale);
            set("qmax", &scale);
        }
    }
    options
}

/// The file being written.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Cursor<Vec<u8>>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic while held").write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Memory {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.lock().expect("no panic while held").seek(to)
    }
}
