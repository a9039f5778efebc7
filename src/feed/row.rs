//! One row: a sample read, decoded and viewed, on a worker thread.

use super::Source;
use super::clock::{Clock, Stage};
use super::fetch::Fetched;
use crate::data::caption;
use crate::data::decode::Limits;
use crate::data::medium::Decoder;
use crate::data::shard::Shard;
use crate::fault::{Code, Fault, Result};
use crate::rng::{Draw, Purpose};
use bytes::BytesMut;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// How often a replacement may itself be undecodable.
const TRIES: usize = 16;

/// A row to be made, or several in a row that show the same sample.
pub struct Order {
    pub step: u64,
    /// The first of them.
    pub row: usize,
    pub epoch: u64,
    pub index: u64,
    /// Which of the sample's showings each is.
    pub repeats: Range<u32>,
    /// Their place in the step: the views are written there.
    pub out: BytesMut,
    pub raw: Raw,
}

/// Where a sample's bytes are.
pub enum Raw {
    /// On a disk of this machine.
    Disk,
    /// They were fetched, or could not be.
    Fetched(Result<Fetched>),
}

/// Rows that were made, or left out (none).
pub struct Done {
    pub step: u64,
    /// The first of them, and how many there are.
    pub row: usize,
    pub count: usize,
    pub out: BytesMut,
    /// The first of them; the others differ in `repeat` alone.
    pub made: Result<Option<Row>>,
    /// Samples that could not be decoded on the way, and why.
    pub bad: Vec<(u64, Fault)>,
}

/// What a row holds beside its pixels.
#[derive(Clone)]
pub struct Row {
    pub id: u64,
    pub epoch: u64,
    pub repeat: u32,
    pub label: Option<i64>,
    /// Rows of the view that show the sample.
    pub valid: u32,
    /// Ids of its caption, where captions are wanted.
    pub text: Option<Vec<i64>>,
}

/// What is shown of a sample.
struct Shown {
    epoch: u64,
    repeats: Range<u32>,
}

/// A sample's bytes, and where they came from.
struct Sample<'a> {
    shard: Arc<Shard>,
    row: usize,
    coded: Coded<'a>,
    label: Option<i64>,
    text: Option<Vec<i64>>,
}

/// A picture or sound as its file has it.
enum Coded<'a> {
    /// In the worker's own memory.
    Read(&'a [u8]),
    Fetched(Fetched),
}

impl Coded<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Coded::Read(bytes) => bytes,
            Coded::Fetched(fetched) => &fetched.bytes,
        }
    }
}

/// What a worker keeps from row to row, so that a row needs no new memory.
pub struct Desk {
    decoder: Decoder,
    files: Files,
}

/// Members that are read from a disk: as long as the longest so far.
#[derive(Default)]
struct Files {
    coded: Vec<u8>,
    label: Vec<u8>,
    caption: Vec<u8>,
}

impl Desk {
    pub fn new(limits: Limits) -> Desk {
        Desk { decoder: Decoder::new(limits), files: Files::default() }
    }
}

/// What a worker needs.
pub struct Reader {
    pub source: Source,
    pub labelled: bool,
    /// Whether an undecodable sample is replaced (training) or left out (evaluation).
    pub replace: bool,
    pub clock: Arc<Clock>,
}

impl Reader {
    /// Makes an order's rows. Only Code::Corrupt makes a sample bad; a disk that fails is no reason to train on other samples.
    pub fn row(&self, desk: &mut Desk, order: Order) -> Done {
        let Order { step, row, epoch, index, repeats, mut out, raw } = order;
        let (mut bad, count) = (Vec::new(), repeats.len());
        let shown = Shown { epoch, repeats };
        let made = self.with_replacement(desk, &shown, index, raw, &mut out, &mut bad);
        self.clock.rows_made(count as u64);
        Done { step, row, count, out, made, bad }
    }

    fn with_replacement(
        &self,
        desk: &mut Desk,
        shown: &Shown,
        index: u64,
        raw: Raw,
        out: &mut [u8],
        bad: &mut Vec<(u64, Fault)>,
    ) -> Result<Option<Row>> {
        let set = &self.source.set;
        let (mut candidate, mut raw) = (index, raw);
        let mut draw = None;
        for _ in 0..=TRIES {
            match self.guarded(desk, shown, candidate, raw, out) {
                Err(fault) if fault.code == Code::Corrupt => bad.push((candidate, fault)),
                made => return made.map(Some),
            }
            if !self.replace {
                return Ok(None);
            }
            let id = set.id(index)?;
            let draw = draw.get_or_insert_with(|| Draw::new(self.source.seed, id, shown.epoch, Purpose::Replace, 0));
            // One of the same set, which may differ from others in what its samples are.
            let around = set.around(index);
            candidate = around.start + draw.below(around.end - around.start);
            raw = Raw::Disk;
        }
        let message = format!("sample {} and {TRIES} drawn in its place cannot be decoded", set.key(index)?);
        Err(Fault::new(Code::Corrupt, message))
    }

    /// A panic in a decoder or a view ends the training with the sample's name, not the thread without a word.
    fn guarded(&self, desk: &mut Desk, shown: &Shown, index: u64, raw: Raw, out: &mut [u8]) -> Result<Row> {
        catch_unwind(AssertUnwindSafe(|| self.make(desk, shown, index, raw, out))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let set = &self.source.set;
            Err(Fault::failed(format!(
                "a worker panicked on sample {} (id {:016x}, epoch {}): {}; this is a defect, please report it",
                set.key(index)?,
                set.id(index)?,
                shown.epoch,
                text.unwrap_or("no message")
            )))
        })
    }

    fn make(&self, desk: &mut Desk, shown: &Shown, index: u64, raw: Raw, out: &mut [u8]) -> Result<Row> {
        let Shown { epoch, ref repeats } = *shown;
        let Source { set, medium, view, shape, .. } = &self.source;
        let Desk { decoder, files } = desk;
        let Sample { shard, row, coded, label, text } = self.clock.of(Stage::Fetch, || self.read(index, raw, files))?;
        let place = || format!("{}: {}", shard.name(), shard.key(row));
        if self.labelled && label.is_none() {
            return Err(Fault::new(Code::Corrupt, format!("{}: it has no .cls, other samples have", place())));
        }
        let id = set.set(index).0.id_of(shard.key(row));
        let opened = self.clock.of(Stage::Decode, || decoder.open(coded.bytes(), *medium, shape[0] as u32));
        let opened = opened.map_err(|fault| fault.at(place()))?;
        // A view says which part of the picture it shows, and so decodes inside: the decoder keeps its own time.
        let viewed = self.clock.of(Stage::View, || view(opened, id, epoch, repeats.clone(), out));
        self.clock.part_of(Stage::View, Stage::Decode, decoder.spent());
        let valid = viewed.map_err(|fault| fault.at(place()))?;
        Ok(Row { id, epoch, repeat: repeats.start, label, valid, text })
    }

    /// The bytes of a sample, as its index says that they are.
    fn read<'a>(&self, index: u64, raw: Raw, files: &'a mut Files) -> Result<Sample<'a>> {
        let extensions = self.source.medium.extensions();
        if let Raw::Fetched(fetched) = raw {
            let fetched = fetched?;
            let (shard, row) = (fetched.shard.clone(), fetched.row);
            let member = shard.wanted(row, extensions)?;
            let caption = fetched.caption.as_ref().zip(shard.member(row, &["txt"]));
            let all = std::iter::once((&fetched.bytes, member)).chain(caption);
            let damaged = all.filter(|(bytes, member)| shard.whole(member, bytes).is_err()).map(|(_, member)| member);
            let damaged: Vec<_> = damaged.collect();
            if damaged.is_empty() {
                let label = fetched.label.as_ref().map(|bytes| shard.class(row, bytes)).transpose()?;
                let text = fetched.caption.as_ref().map(|bytes| self.text(&shard, row, bytes)).transpose()?;
                return Ok(Sample { shard, row, coded: Coded::Fetched(fetched), label, text });
            }
            // Bits flip on the way, and in a cache: what the store itself says now is what counts.
            for member in damaged {
                tracing::warn!("{}: the bytes of {} came damaged; fetching them again", shard.name(), member.name);
                self.source.cache.iter().for_each(|cache| cache.forget(&shard, member.offset..member.end()));
            }
        }
        let (shard, row) = self.source.set.sample(index)?;
        let coded = shard.read_into(row, extensions, &mut files.coded)?;
        let label = match self.labelled && shard.has(row, "cls") {
            true => Some(shard.class(row, shard.read_into(row, &["cls"], &mut files.label)?)?),
            false => None,
        };
        let text = match self.source.captions.is_some() {
            true => {
                caption::member(&shard, row)?;
                Some(self.text(&shard, row, shard.read_into(row, &["txt"], &mut files.caption)?)?)
            }
            false => None,
        };
        Ok(Sample { shard, row, coded: Coded::Read(coded), label, text })
    }

    /// The ids of a caption.
    fn text(&self, shard: &Shard, row: usize, bytes: &[u8]) -> Result<Vec<i64>> {
        let captions = self.source.captions.as_ref().expect("captions are wanted");
        captions.caption(bytes).map_err(|fault| fault.at(format!("{}: {}", shard.name(), shard.key(row))))
    }
}
