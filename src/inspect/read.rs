//! Reads samples: neighbors in one request, and several requests at a time.

use super::run_on_all_cores;
use super::stats::DatasetStats;
use crate::data::audio;
use crate::data::decode::{ImageLimits, VisualDecoder};
use crate::data::index::MemberRef;
use crate::data::set::DataSet;
use crate::data::shard::{AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Shard};
use crate::data::store;
use crate::error::{Error, ExitCode, Result};
use bytes::Bytes;
use indicatif::ProgressBar;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

/// Maximum number of bytes of neighboring samples in one request.
const MAX_REQUEST_BYTES: u64 = 8 << 20;
/// Number of concurrent requests of a thread.
const PREFETCH_REQUESTS: usize = 4;

/// Returns the index of sample `i` of `count` that are evenly spaced among `total`.
pub fn evenly_spaced(i: u64, count: u64, total: u64) -> u64 {
    (u128::from(i) * u128::from(total) / u128::from(count)) as u64
}

/// Reads `count` evenly spaced samples of the set.
///
/// # Errors
/// The error of the store, or of videos that cannot be read because their decoder is missing.
pub fn read_samples(set: &DataSet, count: u64, bar: &ProgressBar) -> Result<DatasetStats> {
    let requests = Mutex::new(RequestIter { set, count, next: 0 });
    let failed = AtomicBool::new(false);
    let next_request = || {
        if failed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        requests.lock().expect("no panic while locked").next_request()
    };
    let work = || {
        let mut stats = DatasetStats::default();
        let mut decoder = VisualDecoder::new(ImageLimits::default());
        let mut in_flight = VecDeque::new();
        loop {
            while in_flight.len() < PREFETCH_REQUESTS
                && let Some(request) = next_request()?
            {
                in_flight.push_back((fetch(&request), request));
            }
            let Some((receiver, request)) = in_flight.pop_front() else {
                return Ok(stats);
            };
            match receiver.recv().expect("every request gets a response") {
                Ok(bytes) => {
                    for row in request.rows.clone() {
                        read_sample(&request, row, &bytes, &mut decoder, &mut stats)?;
                    }
                }
                Err(error) if error.code == ExitCode::Corrupt => stats.add_damaged(error.message),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            bar.inc(request.rows.len() as u64);
        }
    };
    Ok(run_on_all_cores(work)?.into_iter().fold(DatasetStats::default(), DatasetStats::merge))
}

/// A run of neighboring samples in one shard.
struct Request {
    shard: Arc<Shard>,
    rows: Range<usize>,
    bytes: Range<u64>,
}

/// The requests for evenly spaced samples.
struct RequestIter<'a> {
    set: &'a DataSet,
    count: u64,
    /// Number of samples requested so far.
    next: u64,
}

impl RequestIter<'_> {
    fn next_request(&mut self) -> Result<Option<Request>> {
        if self.next >= self.count {
            return Ok(None);
        }
        let (shard_index, first) = self.locate_next();
        let shard = self.set.shard(shard_index)?;
        let end_of = |row| shard.index().sample_members(row).last().expect("a member").end();
        let start = shard.index().sample_members(first).next().expect("a member").offset;
        let mut rows = first..first + 1;
        self.next += 1;
        while self.next < self.count
            && self.locate_next() == (shard_index, rows.end)
            && end_of(rows.end) - start <= MAX_REQUEST_BYTES
        {
            rows.end += 1;
            self.next += 1;
        }
        let bytes = start..end_of(rows.end - 1);
        Ok(Some(Request { shard, rows, bytes }))
    }

    /// Returns shard and row of the next sample.
    fn locate_next(&self) -> (usize, usize) {
        self.set.locate(evenly_spaced(self.next, self.count, self.set.len()))
    }
}

fn fetch(request: &Request) -> Receiver<Result<Bytes, Error>> {
    let (sender, receiver) = channel();
    let shard = request.shard.clone();
    let bytes = request.bytes.clone();
    store::spawn(async move {
        // The receiver is gone after an error of another request.
        let _ = sender.send(shard.fetch(bytes).await);
    });
    receiver
}

/// Adds one sample, whose members are in `bytes`, to the statistics.
fn read_sample(
    request: &Request,
    row: usize,
    bytes: &[u8],
    decoder: &mut VisualDecoder,
    stats: &mut DatasetStats,
) -> Result<()> {
    let shard = &request.shard;
    stats.add_sample();
    let mut has_image = false;
    let mut has_audio = false;
    for member in shard.index().sample_members(row) {
        let extension = member.split_name().1.to_ascii_lowercase();
        stats.add_member(&extension, member.digest.is_some());
        let start = (member.offset - request.bytes.start) as usize;
        let end = (member.end() - request.bytes.start) as usize;
        let Some(member_bytes) = intact_bytes(shard, row, &member, &bytes[start..end]) else {
            stats.add_damaged(describe(shard, &member));
            continue;
        };
        if extension == "cls" {
            match shard.parse_label(row, &member_bytes) {
                Ok(label) => stats.add_label(label),
                Err(error) => stats.add_unreadable(error.message),
            }
        } else if IMAGE_EXTENSIONS.contains(&extension.as_str()) && !has_image {
            has_image = true;
            read_image(&describe(shard, &member), &member_bytes, decoder, stats)?;
        } else if AUDIO_EXTENSIONS.contains(&extension.as_str()) && !has_audio {
            has_audio = true;
            match audio::probe(&member_bytes, &audio::AudioLimits::default()) {
                Ok(header) => stats.add_audio(&header, member_bytes.len() as u64),
                Err(error) => stats.add_unreadable(format!("{}: {}", describe(shard, &member), error.message)),
            }
        }
    }
    Ok(())
}

/// Returns the bytes of a member if they match its digest, after a second read if needed: transfers can fail, too.
fn intact_bytes<'a>(shard: &Shard, row: usize, member: &MemberRef, bytes: &'a [u8]) -> Option<Cow<'a, [u8]>> {
    if shard.verify_digest(member, bytes).is_ok() {
        return Some(Cow::Borrowed(bytes));
    }
    let extension = member.split_name().1.to_ascii_lowercase();
    shard.read(row, &[&extension]).ok().map(Cow::from)
}

/// Adds an image or video to the statistics.
fn read_image(name: &str, bytes: &[u8], decoder: &mut VisualDecoder, stats: &mut DatasetStats) -> Result<()> {
    match decoder.open(bytes, 3) {
        Ok(image) => {
            stats.add_image(image.width(), image.height(), bytes.len() as u64);
            if let Some(info) = image.video_info() {
                stats.add_video(info);
            }
        }
        Err(error) if error.code == ExitCode::Corrupt => stats.add_unreadable(format!("{name}: {}", error.message)),
        Err(error) => return Err(error),
    }
    Ok(())
}

fn describe(shard: &Shard, member: &MemberRef) -> String {
    format!("{} in {}", member.name, shard.name())
}
