//! The frames that are wanted, decoded in one run forward: from the last frame that stands alone before the first one
//! wanted, and on from a later such frame where that skips frames which nobody wants.

use crate::Refusal;
use crate::convert::Converter;
use crate::video::Video;
use crate::wire::Answer;
use ffmpeg_next::codec::threading;
use ffmpeg_next::util::frame::Video as Frame;
use ffmpeg_next::{Discard, Error, codec, decoder};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;

/// Packets between two runs that nobody needs and that are rather gone through than left out.
const APART: usize = 4;
/// Packets behind a run that make a decoder give what it keeps back for the order of showing: as many as it can keep.
const BEHIND: usize = 16;

/// Takes a frame and its number.
pub type See<'a> = dyn FnMut(usize, &Frame) -> Result<(), Refusal> + 'a;

/// Decodes frames and lays their pixels into the memory.
pub fn answer(
    video: &mut Video,
    indices: &[u64],
    region: [u32; 4],
    least: [u32; 2],
    memory: &File,
) -> Result<Answer, Refusal> {
    let count = video.facts.frames;
    if !indices.windows(2).all(|two| two[0] < two[1]) || indices.last().is_none_or(|&last| last >= count) {
        return Err(format!("of {count} frames these are wanted: {indices:?}"));
    }
    let mut converter = Converter::new(&video.facts, region, least)?;
    let each = converter.bytes() as u64;
    if each * indices.len() as u64 > video.bounds.max_answer {
        return Err(format!(
            "{} frames of {} MB each are more than {} MB; pack the videos again with --resize",
            indices.len(),
            each >> 20,
            video.bounds.max_answer >> 20
        ));
    }
    let place: BTreeMap<usize, u64> =
        indices.iter().enumerate().map(|(at, &frame)| (frame as usize, at as u64)).collect();
    let mut lay = |number: usize, frame: &Frame| {
        let pixels = converter.convert(frame)?;
        memory.write_all_at(pixels, place[&number] * each).map_err(|error| error.to_string())
    };
    let decoded = decode(video, &place.keys().copied().collect(), &mut lay)?;
    Ok(Answer::Frames { size: converter.size(), place: converter.place(), decoded })
}

/// Shows the wanted frames to `see`, in the order of showing but where damage forces a second run, from the very first
/// packet. How many frames came for them.
pub fn decode(video: &Video, wanted: &BTreeSet<usize>, see: &mut See) -> Result<u64, Refusal> {
    let mut left = wanted.clone();
    let mut run = Run { video, decoder: open(video)?, decoded: 0, reason: None };
    if video.timed {
        for range in ranges(video, wanted) {
            run.forward(range.clone(), &mut left, true, see)?;
            // At an end FFmpeg 5.1 drops what is kept back of H.264 whose groups of pictures are open: then there is none.
            if left.iter().any(|&frame| range.contains(&video.frames[frame].packet)) {
                let end = (range.end() + BEHIND).min(video.packets.len() - 1);
                run.forward(*range.start()..=end, &mut left, true, see)?;
            }
        }
    }
    if let Some(last) = left.iter().map(|&frame| video.frames[frame].packet).max() {
        // Frames that are counted are told apart by nothing else than all those before them.
        let last = if video.timed { last } else { video.packets.len() - 1 };
        run.forward(0..=last, &mut left, false, see)?;
    }
    match left.first() {
        None => Ok(run.decoded),
        Some(frame) => {
            let reason = run.reason.map_or("the file was cut or damaged".into(), |error| error.to_string());
            Err(format!("frame {frame} of {} cannot be decoded: {reason}", video.frames.len()))
        }
    }
}

fn open(video: &Video) -> Result<decoder::Video, Refusal> {
    let context = codec::Context::from_parameters(video.parameters.clone()).map_err(|error| error.to_string())?;
    let mut decoder = context.decoder();
    decoder.set_threading(threading::Config { kind: threading::Type::None, count: 1, ..Default::default() });
    decoder.video().map_err(|error| format!("its decoder does not start: {error}"))
}

/// Runs of packets that the wanted frames need, rising and apart from each other.
fn ranges(video: &Video, wanted: &BTreeSet<usize>) -> Vec<RangeInclusive<usize>> {
    let alone: Vec<usize> = (0..video.packets.len()).filter(|&at| video.packets[at].is_key()).collect();
    let mut ranges: Vec<RangeInclusive<usize>> = Vec::new();
    for frame in wanted.iter().map(|&frame| &video.frames[frame]) {
        // What is shown before the frame that stands alone and follows it in the file may need what lies before it.
        let begins = |at: &&usize| video.packets[**at].pts().is_some_and(|pts| pts <= frame.pts);
        let before = &alone[..alone.partition_point(|&at| at <= frame.packet)];
        let first = before.iter().rev().find(begins).copied().unwrap_or(0);
        match ranges.last_mut().filter(|range| first <= *range.end() + APART) {
            Some(range) => *range = (*range.start()).min(first)..=(*range.end()).max(frame.packet),
            None => ranges.push(first..=frame.packet),
        }
    }
    ranges
}

struct Run<'a> {
    video: &'a Video,
    decoder: decoder::Video,
    /// Frames that came.
    decoded: u64,
    /// What the decoder complained of last.
    reason: Option<Error>,
}

impl Run<'_> {
    /// Decodes these packets and shows those of their frames that are left.
    fn forward(
        &mut self,
        packets: RangeInclusive<usize>,
        left: &mut BTreeSet<usize>,
        skip: bool,
        see: &mut See,
    ) -> Result<(), Refusal> {
        let video = self.video;
        let packet = |frame: &usize| video.frames[*frame].packet;
        let needed: BTreeSet<usize> = left.iter().map(packet).filter(|at| packets.contains(at)).collect();
        let rest = left.len() - needed.len();
        let mut counted = 0;
        self.decoder.flush();
        for at in packets {
            // A frame that no other is made from, and nobody wants, need not be decoded at all.
            let skip = if skip && !needed.contains(&at) { Discard::NonReference } else { Discard::Default };
            self.decoder.skip_frame(skip);
            // A damaged packet costs its own frames, which are missed below.
            if let Err(error) = self.decoder.send_packet(&video.packets[at]) {
                self.reason = Some(error);
            }
            self.receive(left, &mut counted, see)?;
            if left.len() == rest {
                return Ok(());
            }
        }
        self.decoder.skip_frame(Discard::Default);
        if let Err(error) = self.decoder.send_eof() {
            self.reason = Some(error);
        }
        self.receive(left, &mut counted, see)
    }

    fn receive(&mut self, left: &mut BTreeSet<usize>, counted: &mut usize, see: &mut See) -> Result<(), Refusal> {
        let mut frame = Frame::empty();
        loop {
            match self.decoder.receive_frame(&mut frame) {
                Ok(()) => {}
                Err(Error::Eof | Error::Other { .. }) => return Ok(()),
                Err(error) => {
                    self.reason = Some(error);
                    return Ok(());
                }
            }
            let frames = &self.video.frames;
            let number = match (self.video.timed, frame.pts()) {
                (true, Some(pts)) => frames.binary_search_by_key(&pts, |frame| frame.pts).ok(),
                (true, None) => None,
                (false, _) => Some(*counted),
            };
            *counted += 1;
            self.decoded += 1;
            // What a decoder made up in the place of damage is no frame of this video.
            let sound = !frame.is_corrupt() && !frame.has_decode_errors();
            if let Some(number) = number.filter(|number| sound && left.contains(number)) {
                if [frame.width(), frame.height()] != self.video.stored {
                    let [width, height] = self.video.stored;
                    return Err(format!("a frame of {}x{} among {width}x{height}", frame.width(), frame.height()));
                }
                see(number, &frame)?;
                left.remove(&number);
            }
        }
    }
}
