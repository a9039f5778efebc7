//! Reads samples, neighbours in one request, and several requests at a time.

use super::side_by_side;
use super::tally::Tally;
use crate::data::decode::{Decoder, Limits};
use crate::data::set::DataSet;
use crate::data::shard::{IMAGE, SOUND, Shard};
use crate::data::sound;
use crate::data::store;
use crate::fault::{Code, Fault, Result};
use bytes::Bytes;
use indicatif::ProgressBar;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

/// Bytes of neighbours that are read at once.
const PIECE: u64 = 8 << 20;
/// Requests of a thread that are under way at a time.
const AHEAD: usize = 4;

/// The number of the sample that is looked at after `at` others, where `wanted` of `all` are, spread evenly.
pub fn spread(at: u64, wanted: u64, all: u64) -> u64 {
    (u128::from(at) * u128::from(all) / u128::from(wanted)) as u64
}

/// Looks at `wanted` samples of the set. Faults where its store fails.
pub fn look(set: &DataSet, wanted: u64, bar: &ProgressBar) -> Result<Tally> {
    let pieces = Mutex::new(Pieces { set, wanted, at: 0 });
    let failed = AtomicBool::new(false);
    let next = || match failed.load(Ordering::Relaxed) {
        true => Ok(None),
        false => pieces.lock().expect("no panic while held").next(),
    };
    let work = || {
        let mut tally = Tally::default();
        let mut decoder = Decoder::new(Limits::default());
        let mut under_way = std::collections::VecDeque::new();
        loop {
            while under_way.len() < AHEAD
                && let Some(piece) = next()?
            {
                under_way.push_back((fetch(&piece), piece));
            }
            let Some((bytes, piece)) = under_way.pop_front() else {
                return Ok(tally);
            };
            let bytes: Result<Bytes> = bytes.recv().expect("every request is answered");
            match bytes {
                Ok(bytes) => {
                    let mut rows = piece.rows.clone();
                    rows.try_for_each(|row| sample(&piece, row, &bytes, &mut decoder, &mut tally))?;
                }
                Err(fault) if fault.code == Code::Corrupt => tally.damaged(fault.message),
                Err(fault) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err(fault);
                }
            }
            bar.inc(piece.rows.len() as u64);
        }
    };
    Ok(side_by_side(work)?.into_iter().fold(Tally::default(), Tally::with))
}

/// Samples that lie side by side in one shard.
struct Piece {
    shard: Arc<Shard>,
    rows: Range<usize>,
    bytes: Range<u64>,
}

struct Pieces<'a> {
    set: &'a DataSet,
    wanted: u64,
    at: u64,
}

impl Pieces<'_> {
    fn next(&mut self) -> Result<Option<Piece>> {
        if self.at >= self.wanted {
            return Ok(None);
        }
        let number = |at| spread(at, self.wanted, self.set.len());
        let (place, first) = self.set.place(number(self.at));
        let shard = self.set.shard(place)?;
        let ends = |row| shard.index().sample(row).last().expect("a member").end();
        let begin = shard.index().sample(first).next().expect("a member").offset;
        let mut rows = first..first + 1;
        self.at += 1;
        while self.at < self.wanted
            && self.set.place(number(self.at)) == (place, rows.end)
            && ends(rows.end) - begin <= PIECE
        {
            rows.end += 1;
            self.at += 1;
        }
        let bytes = begin..ends(rows.end - 1);
        Ok(Some(Piece { shard, rows, bytes }))
    }
}

fn fetch(piece: &Piece) -> std::sync::mpsc::Receiver<Result<Bytes, Fault>> {
    let (sender, receiver) = channel();
    let (shard, bytes) = (piece.shard.clone(), piece.bytes.clone());
    store::spawn(async move {
        // Nobody listens after a fault elsewhere.
        let _ = sender.send(shard.fetch(bytes).await);
    });
    receiver
}

/// Counts one sample, whose members lie in `bytes`. Faults where videos cannot be looked at for want of their decoder.
fn sample(piece: &Piece, row: usize, bytes: &[u8], decoder: &mut Decoder, tally: &mut Tally) -> Result<()> {
    let shard = &piece.shard;
    tally.sample();
    let (mut pictured, mut heard) = (false, false);
    for member in shard.index().sample(row) {
        let name = || format!("{} in {}", member.name, shard.name());
        let (from, to) = (member.offset - piece.bytes.start, member.end() - piece.bytes.start);
        let mut member_bytes = Cow::Borrowed(&bytes[from as usize..to as usize]);
        let extension = member.split().1.to_ascii_lowercase();
        tally.member(&extension, member.digest.is_some());
        if shard.whole(&member, &member_bytes).is_err() {
            // It may have happened on the way here.
            match shard.read(row, &[&extension]) {
                Ok(again) => member_bytes = again.into(),
                Err(_) => {
                    tally.damaged(name());
                    continue;
                }
            }
        }
        if extension == "cls" {
            match shard.class(row, &member_bytes) {
                Ok(class) => tally.class(class),
                Err(fault) => tally.unreadable(fault.message),
            }
        } else if IMAGE.contains(&extension.as_str()) && !pictured {
            pictured = true;
            match decoder.open(&member_bytes, 3) {
                Ok(picture) => {
                    tally.picture((picture.width(), picture.height()), member_bytes.len() as u64);
                    picture.video().into_iter().for_each(|facts| tally.video(facts));
                }
                Err(fault) if fault.code == Code::Corrupt => {
                    tally.unreadable(format!("{}: {}", name(), fault.message));
                }
                Err(fault) => return Err(fault),
            }
        } else if SOUND.contains(&extension.as_str()) && !heard {
            heard = true;
            match sound::probe(&member_bytes, &sound::Limits::default()) {
                Ok(header) => tally.sound(&header, member_bytes.len() as u64),
                Err(fault) => tally.unreadable(format!("{}: {}", name(), fault.message)),
            }
        }
    }
    Ok(())
}
