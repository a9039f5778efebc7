//! One row: a sample read, decoded and viewed, on a worker thread.

use super::Source;
use crate::data::decode::Decoder;
use crate::data::shard::IMAGE;
use crate::fault::{Code, Fault, Result};
use crate::rng::{Draw, Purpose};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How often a replacement may itself be undecodable.
const TRIES: usize = 16;

/// A row to be made.
pub struct Order {
    pub step: u64,
    pub row: usize,
    pub epoch: u64,
    pub index: u64,
}

/// A row that was made, or left out (none).
pub struct Done {
    pub step: u64,
    pub row: usize,
    pub made: Result<Option<Row>>,
    /// Samples that could not be decoded on the way, and why.
    pub bad: Vec<(u64, Fault)>,
}

/// The contents of a row.
pub struct Row {
    pub id: u64,
    pub epoch: u64,
    pub label: Option<i64>,
    pub pixels: Vec<u8>,
}

/// What a worker needs.
pub struct Reader {
    pub source: Source,
    pub labelled: bool,
    /// Whether an undecodable sample is replaced (training) or left out (evaluation).
    pub replace: bool,
}

impl Reader {
    /// Makes a row. Only Code::Corrupt makes a sample bad; a disk that fails is no reason to train on other samples.
    pub fn row(&self, decoder: &mut Decoder, order: Order) -> Done {
        let Order { step, row, epoch, index } = order;
        let mut bad = Vec::new();
        let made = self.with_replacement(decoder, epoch, index, &mut bad);
        Done { step, row, made, bad }
    }

    fn with_replacement(
        &self,
        decoder: &mut Decoder,
        epoch: u64,
        index: u64,
        bad: &mut Vec<(u64, Fault)>,
    ) -> Result<Option<Row>> {
        let set = &self.source.set;
        let mut draw = Draw::new(self.source.seed, set.id(index), epoch, Purpose::Replace, 0);
        let mut candidate = index;
        for _ in 0..=TRIES {
            match self.guarded(decoder, epoch, candidate) {
                Err(fault) if fault.code == Code::Corrupt => bad.push((candidate, fault)),
                made => return made.map(Some),
            }
            if !self.replace {
                return Ok(None);
            }
            candidate = draw.below(set.len());
        }
        let message = format!("sample {} and {TRIES} drawn in its place cannot be decoded", set.key(index));
        Err(Fault::new(Code::Corrupt, message))
    }

    /// A panic in a decoder or a view ends the training with the sample's name, not the thread without a word.
    fn guarded(&self, decoder: &mut Decoder, epoch: u64, index: u64) -> Result<Row> {
        catch_unwind(AssertUnwindSafe(|| self.read(decoder, epoch, index))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let set = &self.source.set;
            Err(Fault::failed(format!(
                "a worker panicked on sample {} (id {:016x}, epoch {epoch}): {}; this is a defect, please report it",
                set.key(index),
                set.id(index),
                text.unwrap_or("no message")
            )))
        })
    }

    fn read(&self, decoder: &mut Decoder, epoch: u64, index: u64) -> Result<Row> {
        let Source { set, view, shape, .. } = &self.source;
        let (shard, row) = set.sample(index);
        let place = || format!("{}: {}", shard.path().display(), shard.key(row));
        let bytes = shard.read(row, IMAGE)?;
        let picture = decoder.open(&bytes, shape[0] as u32).map_err(|fault| fault.at(place()))?;
        let label = if self.labelled { shard.label(row)? } else { None };
        if self.labelled && label.is_none() {
            return Err(Fault::new(Code::Corrupt, format!("{}: it has no .cls, other samples have", place())));
        }
        let id = set.id(index);
        let mut pixels = vec![0; self.source.row_bytes()];
        view(picture, id, epoch, &mut pixels).map_err(|fault| fault.at(place()))?;
        Ok(Row { id, epoch, label, pixels })
    }
}
