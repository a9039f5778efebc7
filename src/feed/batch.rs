//! Rows laid into steps, on one thread: it plans as many steps ahead as memory allows, and hands steps over in order.

use super::clock::{Clock, Stage};
use super::fetch::Fetcher;
use super::row::{Done, Order, Raw, Row};
use super::{Plan, Rows, Source};
use crate::bridge::lend::lend;
use crate::data::order::Pick;
use crate::fault::{Code, Fault, Result};
use bytes::BytesMut;
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// How many bad samples a fault names.
const NAMED: usize = 20;
/// The most steps under way: more of them hide no store any better, and what lies ready is lost when a job stops.
const STEPS: usize = 128;

/// A step under way.
struct Step {
    step: u64,
    /// [C, T, Y, X] of its rows.
    shape: [i64; 4],
    /// What each row will hold; none until it is made, and for a row that is left out.
    rows: Vec<Option<Row>>,
    /// The rows' places, as they come back; of rows that were made together, the first one's is all of theirs.
    pixels: Vec<BytesMut>,
    missing: usize,
}

/// The memory of a step's pixels, which comes back when the last tensor over it is gone.
struct Lent {
    bytes: BytesMut,
    back: Sender<BytesMut>,
}

impl AsMut<[u8]> for Lent {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Nobody takes it back once the feed is gone.
        let _ = self.back.send(std::mem::take(&mut self.bytes));
    }
}

/// What the thread speaks through.
pub struct Lines {
    /// Rows to be made, on their way to the workers.
    pub give: Fetcher,
    /// Rows, from the workers.
    pub rows: Receiver<Done>,
    /// Whole steps, to the caller.
    pub out: Sender<Result<Rows>>,
    /// A word for each step that the caller took.
    pub taken: Receiver<()>,
}

/// The thread's state.
pub struct Belt {
    source: Source,
    labelled: bool,
    plan: Plan,
    steps: Range<u64>,
    lines: Lines,
    /// Steps under way, the oldest in front.
    open: VecDeque<Step>,
    /// Steps handed over and not yet taken.
    waiting: usize,
    /// Memory of steps that are over: its pages are here, and it need not be cleared.
    spare: (Sender<BytesMut>, Receiver<BytesMut>),
    /// Bytes of the largest step so far.
    each: usize,
    /// Bad samples by index, and how many there may be.
    bad: BTreeMap<u64, String>,
    allowed: usize,
    /// This rank, and of how many; for messages.
    rank: (usize, usize),
    clock: Arc<Clock>,
}

impl Belt {
    pub fn new(
        source: Source,
        labelled: bool,
        plan: Plan,
        steps: Range<u64>,
        lines: Lines,
        rank: (usize, usize),
        clock: Arc<Clock>,
    ) -> Belt {
        let allowed = ((source.set.len() as f64 * source.max_bad_share) as usize).max(3);
        let (open, bad, spare) = (VecDeque::new(), BTreeMap::new(), unbounded());
        Belt { source, labelled, plan, steps, lines, open, waiting: 0, spare, each: 0, bad, allowed, rank, clock }
    }

    /// Until the last step is out, a fault is out, or nobody wants more.
    pub fn run(mut self) {
        if let Err(fault) = self.carry() {
            // Nobody is left to hear it only when the feed was dropped.
            let _ = self.lines.out.send(Err(fault));
        }
    }

    fn carry(&mut self) -> Result<()> {
        loop {
            self.fill();
            while self.open.front().is_some_and(|step| step.missing == 0) {
                let step = self.open.pop_front().expect("a step in front");
                let rows = self.clock.of(Stage::Batch, || self.finished(step))?;
                if self.lines.out.send(Ok(rows)).is_err() {
                    return Ok(());
                }
                self.waiting += 1;
            }
            if self.open.is_empty() && self.steps.is_empty() {
                return Ok(());
            }
            select! {
                recv(self.lines.rows) -> done => match done {
                    Ok(done) => self.place(done)?,
                    Err(_) => return Err(Fault::failed("the feed's workers are gone")),
                },
                recv(self.lines.taken) -> word => match word {
                    Ok(()) => self.waiting -= 1,
                    Err(_) => return Ok(()),
                },
            }
        }
    }

    /// Orders rows of further steps while their bytes fit; one step always does.
    fn fill(&mut self) {
        while !self.steps.is_empty() {
            let under_way = self.open.len() + self.waiting;
            let held = (under_way + 1) * self.each;
            let full = held > self.source.prefetch_bytes || under_way >= STEPS;
            if under_way > 0 && full {
                return;
            }
            let step = self.steps.next().expect("a step is left");
            let samples = (self.plan)(step);
            // One run of memory for the step; each worker holds its row's part of it.
            let shape = samples.first().map_or(self.source.shape, |pick| self.source.shape_of(pick.sample));
            let each = self.source.row_bytes(shape);
            let mut room = self.spare.1.try_recv().unwrap_or_default();
            room.resize(samples.len() * each, 0);
            self.each = self.each.max(room.len());
            let pixels = samples.iter().map(|_| BytesMut::new()).collect();
            self.open.push_back(Step {
                step,
                shape,
                rows: samples.iter().map(|_| None).collect(),
                pixels,
                missing: samples.len(),
            });
            let order = |(row, Pick { epoch, sample, repeat }, count): (usize, Pick, u32)| Order {
                step,
                row,
                epoch,
                index: sample,
                repeats: repeat..repeat + count,
                out: room.split_to(each * count as usize),
                raw: Raw::Disk,
            };
            self.lines.give.fetch(together(&samples).into_iter().map(order).collect());
        }
    }

    fn place(&mut self, done: Done) -> Result<()> {
        for (index, fault) in done.bad {
            if self.bad.contains_key(&index) {
                continue;
            }
            tracing::warn!("sample {} (rank {}): {fault}", self.source.set.key(index)?, self.rank.0);
            self.bad.insert(index, fault.message);
        }
        self.refuse_many()?;
        let made = done.made?;
        let first = self.open.front().expect("a step under way").step;
        let step = &mut self.open[(done.step - first) as usize];
        step.missing -= done.count;
        step.pixels[done.row] = done.out;
        if let Some(made) = made {
            for at in 1..done.count {
                step.rows[done.row + at] = Some(Row { repeat: made.repeat + at as u32, ..made.clone() });
            }
            step.rows[done.row] = Some(made);
        }
        Ok(())
    }

    fn refuse_many(&self) -> Result<()> {
        if self.bad.len() <= self.allowed {
            return Ok(());
        }
        let named: Vec<&str> = self.bad.values().take(NAMED).map(String::as_str).collect();
        let (total, name) = (self.source.set.len(), self.source.set.name());
        Err(Fault::new(
            Code::Corrupt,
            format!(
                "rank {} of {} found {} undecodable samples among the {total} of {name}, {} are allowed; \
                 fetch or pack the data again. They are: {}{}",
                self.rank.0,
                self.rank.1,
                self.bad.len(),
                self.allowed,
                named.join("; "),
                if self.bad.len() > NAMED { "; …" } else { "" }
            ),
        ))
    }

    /// The rows' places side by side again, which they are in memory; the gaps that left-out rows leave are closed,
    /// and labels dropped where the set has none.
    fn finished(&self, step: Step) -> Result<Rows> {
        let Step { step, shape: [c, t, y, x], rows, pixels: places, .. } = step;
        let bytes = self.source.row_bytes([c, t, y, x]);
        let mut pixels = BytesMut::new();
        places.into_iter().for_each(|place| pixels.unsplit(place));
        let mut kept = 0;
        for (row, _) in rows.iter().enumerate().filter(|(_, row)| row.is_some()) {
            if kept != row {
                pixels.copy_within(row * bytes..(row + 1) * bytes, kept * bytes);
            }
            kept += 1;
        }
        pixels.truncate(kept * bytes);
        let rows: Vec<Row> = rows.into_iter().flatten().collect();
        // Bytes first, then their element: the innermost side is as many times longer.
        let kind = self.source.medium.kind();
        let shape = [kept as i64, c, t, y, x * kind.elt_size_in_bytes() as i64];
        let pixels = lend(Lent { bytes: pixels, back: self.spare.0.clone() }, &shape)?;
        let length = self.source.captions.as_ref().map(|captions| captions.length() as i64);
        let ids = |length| -> Result<tch::Tensor> {
            let ids: Vec<i64> = rows.iter().flat_map(|row| row.text.iter().flatten()).copied().collect();
            Ok(tch::Tensor::from_slice(&ids).f_view([rows.len() as i64, length])?)
        };
        let labels = || {
            let mut labels = Vec::with_capacity(rows.len());
            labels.extend(rows.iter().filter_map(|row| row.label));
            labels
        };
        Ok(Rows {
            step,
            text: length.map(ids).transpose()?,
            ids: rows.iter().map(|row| row.id).collect(),
            epochs: rows.iter().map(|row| row.epoch).collect(),
            repeats: rows.iter().map(|row| row.repeat).collect(),
            labels: self.labelled.then(labels),
            valid: rows.iter().map(|row| row.valid).collect(),
            pixels: pixels.f_view_dtype(kind)?,
            waited: Duration::ZERO,
        })
    }
}

/// Rows in a row that show the same sample one time after the other: the first, what it shows, and how many there are.
fn together(picks: &[Pick]) -> Vec<(usize, Pick, u32)> {
    let mut runs: Vec<(usize, Pick, u32)> = Vec::with_capacity(picks.len());
    for (row, pick) in picks.iter().enumerate() {
        match runs.last_mut() {
            Some((_, first, count)) if *pick == (Pick { repeat: first.repeat + *count, ..*first }) => *count += 1,
            _ => runs.push((row, *pick, 1)),
        }
    }
    runs
}
