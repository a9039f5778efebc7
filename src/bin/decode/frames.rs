//! Decoding of selected frames in one forward pass: from the last keyframe before the first wanted frame, with jumps to
//! later keyframes where that skips packets that no wanted frame needs.

use crate::RequestError;
use crate::convert::Converter;
use crate::protocol::DecodeResponse;
use crate::video::DemuxedVideo;
use ffmpeg_next::codec::threading;
use ffmpeg_next::util::frame::Video as Frame;
use ffmpeg_next::{Discard, Error, codec, decoder};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;

/// Maximum number of unneeded packets between two ranges that are decoded rather than skipped.
const MAX_GAP: usize = 4;
/// Number of packets behind a range that flush the frames that a decoder delays for reordering: the maximum delay.
const FLUSH_PACKETS: usize = 16;

/// Receives a frame and its index.
pub type FrameVisitor<'a> = dyn FnMut(usize, &Frame) -> Result<(), RequestError> + 'a;

/// Decodes frames and writes their pixels to the shared memory.
pub fn decode_frames(
    video: &mut DemuxedVideo,
    indices: &[u64],
    region: [u32; 4],
    min_size: [u32; 2],
    memory: &File,
) -> Result<DecodeResponse, RequestError> {
    let count = video.info.frames;
    if !indices.windows(2).all(|pair| pair[0] < pair[1]) || indices.last().is_none_or(|&last| last >= count) {
        return Err(format!("frame indices must be increasing and below {count}; got {indices:?}"));
    }
    let mut converter = Converter::new(&video.info, region, min_size)?;
    let frame_bytes = converter.frame_bytes() as u64;
    if frame_bytes * indices.len() as u64 > video.limits.max_response_bytes {
        return Err(format!(
            "{} frames of {} MB each are more than {} MB; pack the videos again with --resize",
            indices.len(),
            frame_bytes >> 20,
            video.limits.max_response_bytes >> 20
        ));
    }
    let slots: BTreeMap<usize, u64> = indices.iter().map(|&frame| frame as usize).zip(0..).collect();
    let mut write = |index: usize, frame: &Frame| {
        let pixels = converter.convert(frame)?;
        memory.write_all_at(pixels, slots[&index] * frame_bytes).map_err(|error| error.to_string())
    };
    let decoded = decode(video, &slots.keys().copied().collect(), &mut write)?;
    Ok(DecodeResponse::Frames { size: converter.output_size(), region: converter.region(), decoded })
}

/// Passes the wanted frames to `visit` in presentation order. If frames are missing because the file is damaged, they
/// follow out of order from a second pass that starts at the first packet. Returns the number of frames that the
/// decoder returned.
pub fn decode(video: &DemuxedVideo, wanted: &BTreeSet<usize>, visit: &mut FrameVisitor) -> Result<u64, RequestError> {
    let mut frames =
        FrameDecoder { video, decoder: open_decoder(video)?, missing: wanted.clone(), decoded: 0, last_error: None };
    if video.has_timestamps {
        for range in packet_ranges(video, wanted) {
            frames.decode_packets(range.clone(), true, visit)?;
            // When it is flushed, FFmpeg 5.1 drops delayed frames of H.264 with open groups of pictures; with further
            // packets nothing needs to be flushed.
            if frames.missing.iter().any(|&frame| range.contains(&video.frames[frame].packet_index)) {
                let end = (range.end() + FLUSH_PACKETS).min(video.packets.len() - 1);
                frames.decode_packets(*range.start()..=end, true, visit)?;
            }
        }
    }
    if let Some(last) = frames.missing.iter().map(|&frame| video.frames[frame].packet_index).max() {
        // Without timestamps frames are identified by counting, from the first to the last.
        let last = if video.has_timestamps { last } else { video.packets.len() - 1 };
        frames.decode_packets(0..=last, false, visit)?;
    }
    let Some(frame) = frames.missing.first() else { return Ok(frames.decoded) };
    let reason = frames.last_error.map_or("the file was cut or damaged".into(), |error| error.to_string());
    Err(format!("frame {frame} of {} cannot be decoded: {reason}", video.frames.len()))
}

fn open_decoder(video: &DemuxedVideo) -> Result<decoder::Video, RequestError> {
    let context = codec::Context::from_parameters(video.parameters.clone()).map_err(|error| error.to_string())?;
    let mut decoder = context.decoder();
    decoder.set_threading(threading::Config { kind: threading::Type::None, count: 1, ..Default::default() });
    decoder.video().map_err(|error| format!("its decoder does not start: {error}"))
}

/// Returns the ranges of packets that the wanted frames need, in increasing order and more than [`MAX_GAP`] apart.
fn packet_ranges(video: &DemuxedVideo, wanted: &BTreeSet<usize>) -> Vec<RangeInclusive<usize>> {
    let keyframes: Vec<usize> = (0..video.packets.len()).filter(|&packet| video.packets[packet].is_key()).collect();
    let mut ranges: Vec<RangeInclusive<usize>> = Vec::new();
    for frame in wanted.iter().map(|&frame| &video.frames[frame]) {
        // A frame that follows a keyframe in the file but is shown before it may need packets before the keyframe.
        let is_start = |keyframe: &&usize| video.packets[**keyframe].pts().is_some_and(|pts| pts <= frame.pts);
        let preceding = &keyframes[..keyframes.partition_point(|&keyframe| keyframe <= frame.packet_index)];
        let first = preceding.iter().rev().find(is_start).copied().unwrap_or(0);
        match ranges.last_mut().filter(|range| first <= *range.end() + MAX_GAP) {
            Some(range) => *range = (*range.start()).min(first)..=(*range.end()).max(frame.packet_index),
            None => ranges.push(first..=frame.packet_index),
        }
    }
    ranges
}

struct FrameDecoder<'a> {
    video: &'a DemuxedVideo,
    decoder: decoder::Video,
    /// Wanted frames that were not decoded yet.
    missing: BTreeSet<usize>,
    /// Number of frames that the decoder returned.
    decoded: u64,
    last_error: Option<Error>,
}

impl FrameDecoder<'_> {
    /// Decodes packets and visits those of their frames that are missing. With `skip`, frames are not decoded if they
    /// are neither missing nor referenced by other frames.
    fn decode_packets(
        &mut self,
        packets: RangeInclusive<usize>,
        skip: bool,
        visit: &mut FrameVisitor,
    ) -> Result<(), RequestError> {
        let video = self.video;
        let packet_index = |frame: &usize| video.frames[*frame].packet_index;
        let needed: BTreeSet<usize> =
            self.missing.iter().map(packet_index).filter(|packet| packets.contains(packet)).collect();
        let missing_elsewhere = self.missing.len() - needed.len();
        let mut received = 0;
        self.decoder.flush();
        for packet in packets {
            let is_skippable = skip && !needed.contains(&packet);
            self.decoder.skip_frame(if is_skippable { Discard::NonReference } else { Discard::Default });
            // After a damaged packet its frames remain in `missing`.
            if let Err(error) = self.decoder.send_packet(&video.packets[packet]) {
                self.last_error = Some(error);
            }
            self.receive(&mut received, visit)?;
            if self.missing.len() == missing_elsewhere {
                return Ok(());
            }
        }
        self.decoder.skip_frame(Discard::Default);
        if let Err(error) = self.decoder.send_eof() {
            self.last_error = Some(error);
        }
        self.receive(&mut received, visit)
    }

    /// Receives the frames that the decoder has ready. `received` counts the frames of this pass.
    fn receive(&mut self, received: &mut usize, visit: &mut FrameVisitor) -> Result<(), RequestError> {
        let mut frame = Frame::empty();
        loop {
            match self.decoder.receive_frame(&mut frame) {
                Ok(()) => {}
                Err(Error::Eof | Error::Other { .. }) => return Ok(()),
                Err(error) => {
                    self.last_error = Some(error);
                    return Ok(());
                }
            }
            let index = self.frame_index(&frame, *received);
            *received += 1;
            self.decoded += 1;
            // A decoder may conceal damage with an invented frame.
            let is_intact = !frame.is_corrupt() && !frame.has_decode_errors();
            if let Some(index) = index.filter(|index| is_intact && self.missing.contains(index)) {
                let [width, height] = self.video.coded_size;
                if [frame.width(), frame.height()] != [width, height] {
                    return Err(format!("a frame of {}x{} among {width}x{height}", frame.width(), frame.height()));
                }
                visit(index, &frame)?;
                self.missing.remove(&index);
            }
        }
    }

    /// Returns the index of a frame: by its timestamp, or by counting in a video without timestamps.
    fn frame_index(&self, frame: &Frame, received: usize) -> Option<usize> {
        if !self.video.has_timestamps {
            return Some(received);
        }
        let pts = frame.pts()?;
        self.video.frames.binary_search_by_key(&pts, |frame| frame.pts).ok()
    }
}
