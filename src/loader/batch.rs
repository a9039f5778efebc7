//! The batcher thread: assembles rows into steps. It plans as many steps ahead as memory allows and hands steps over in
//! order.

use super::cpu_time::{LoaderStage, StageCpuTime};
use super::fetch::Fetcher;
use super::row::{ByteSource, RowInfo, RowJob, RowResult};
use super::{LoadedRows, LoaderOptions, RankInfo, StepPlan};
use crate::bridge::from_blob::from_blob;
use crate::data::order::SampleRef;
use crate::error::{Error, ExitCode, Result};
use crate::part::batch::{RowSide, Side};
use bytes::BytesMut;
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Maximum number of corrupt samples that an error lists.
const MAX_LISTED_SAMPLES: usize = 20;
/// Number of corrupt samples that is always allowed.
const MIN_ALLOWED_CORRUPT: usize = 3;
/// Maximum number of steps in flight. More steps hide a slow store no better, and finished steps are lost when a job
/// stops.
const MAX_PREFETCH_STEPS: usize = 128;

/// A step in flight.
struct PendingStep {
    step: u64,
    /// [C, T, Y, X] of its rows.
    shape: [i64; 4],
    /// The rows without their pixels; none until a row is built, and for a skipped row.
    rows: Vec<Option<RowInfo>>,
    /// Memory of the rows, filled as results return; rows that were built together return one piece, at the first of
    /// them.
    pixels: Vec<BytesMut>,
    missing: usize,
}

/// The memory of a step's pixels, which returns to the pool when the last tensor over it is dropped.
struct PooledBuffer {
    bytes: BytesMut,
    pool: Sender<BytesMut>,
}

impl AsMut<[u8]> for PooledBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        // The receiver is gone once the loader is dropped.
        let _ = self.pool.send(std::mem::take(&mut self.bytes));
    }
}

/// Channels of the batcher thread.
pub struct BatcherChannels {
    /// Takes the jobs for the workers.
    pub fetcher: Fetcher,
    /// Rows from the workers.
    pub results: Receiver<RowResult>,
    /// Finished steps for the caller.
    pub output: Sender<Result<LoadedRows>>,
    /// One message for each step that the caller took.
    pub consumed: Receiver<()>,
}

/// The parts of a [`Batcher`].
pub struct BatcherOptions {
    pub options: LoaderOptions,
    pub plan: StepPlan,
    pub steps: Range<u64>,
    pub channels: BatcherChannels,
    /// For messages.
    pub(super) rank: RankInfo,
    pub cpu_time: Arc<StageCpuTime>,
}

/// The state of the batcher thread.
pub struct Batcher {
    options: LoaderOptions,
    plan: StepPlan,
    /// Steps that are not planned yet.
    steps: Range<u64>,
    channels: BatcherChannels,
    /// Steps in flight, oldest first.
    pending: VecDeque<PendingStep>,
    /// Number of steps handed over and not yet taken.
    waiting: usize,
    /// Buffers of earlier steps: reuse saves page faults and zeroing.
    pool_sender: Sender<BytesMut>,
    pool: Receiver<BytesMut>,
    /// Bytes of the largest step so far.
    max_step_bytes: usize,
    /// Corrupt samples by index, with the reason.
    corrupt: BTreeMap<u64, String>,
    max_corrupt: usize,
    rank: RankInfo,
    cpu_time: Arc<StageCpuTime>,
}

impl Batcher {
    /// Makes a batcher; [`Batcher::run`] starts it.
    pub fn new(parts: BatcherOptions) -> Batcher {
        let BatcherOptions { options, plan, steps, channels, rank, cpu_time } = parts;
        let allowed = (options.mixture.len() as f64 * options.max_corrupt_fraction) as usize;
        let (pool_sender, pool) = unbounded();
        Batcher {
            options,
            plan,
            steps,
            channels,
            pending: VecDeque::new(),
            waiting: 0,
            pool_sender,
            pool,
            max_step_bytes: 0,
            corrupt: BTreeMap::new(),
            max_corrupt: allowed.max(MIN_ALLOWED_CORRUPT),
            rank,
            cpu_time,
        }
    }

    /// Runs until the last step or an error is sent, or the loader is dropped.
    pub fn run(mut self) {
        if let Err(error) = self.run_loop() {
            // The receiver is gone only when the loader was dropped.
            let _ = self.channels.output.send(Err(error));
        }
    }

    fn run_loop(&mut self) -> Result<()> {
        loop {
            self.plan_steps();
            while self.pending.front().is_some_and(|step| step.missing == 0) {
                let step = self.pending.pop_front().expect("checked by the loop condition");
                let rows = self.cpu_time.measure(LoaderStage::Batch, || self.assemble(step))?;
                if self.channels.output.send(Ok(rows)).is_err() {
                    return Ok(());
                }
                self.waiting += 1;
            }
            if self.pending.is_empty() && self.steps.is_empty() {
                return Ok(());
            }
            select! {
                recv(self.channels.results) -> result => match result {
                    Ok(result) => self.insert(result)?,
                    Err(_) => return Err(Error::failed("the data loader's workers are gone")),
                },
                recv(self.channels.consumed) -> message => match message {
                    Ok(()) => self.waiting -= 1,
                    Err(_) => return Ok(()),
                },
            }
        }
    }

    /// Plans further steps while their bytes fit; one step is always allowed.
    fn plan_steps(&mut self) {
        while !self.steps.is_empty() {
            let in_flight = self.pending.len() + self.waiting;
            let bytes = (in_flight + 1) * self.max_step_bytes;
            let full = bytes > self.options.prefetch_bytes || in_flight >= MAX_PREFETCH_STEPS;
            if in_flight > 0 && full {
                return;
            }
            let step = self.steps.next().expect("checked by the loop condition");
            self.plan_step(step);
        }
    }

    /// Sends the jobs of one step. The step is one allocation, of which each job carries its part.
    fn plan_step(&mut self, step: u64) {
        let samples = (self.plan)(step);
        let shape = samples.first().map_or(self.options.shape, |first| self.options.row_shape(first.sample));
        let row_bytes = self.options.row_bytes(shape);
        let mut buffer = self.pool.try_recv().unwrap_or_default();
        buffer.resize(samples.len() * row_bytes, 0);
        self.max_step_bytes = self.max_step_bytes.max(buffer.len());
        self.pending.push_back(PendingStep {
            step,
            shape,
            rows: samples.iter().map(|_| None).collect(),
            pixels: samples.iter().map(|_| BytesMut::new()).collect(),
            missing: samples.len(),
        });
        let job = |group: RepeatGroup| {
            let SampleRef { epoch, sample, repeat } = group.sample;
            RowJob {
                step,
                first_row: group.first_row,
                epoch,
                index: sample,
                repeats: repeat..repeat + group.count,
                output: buffer.split_to(row_bytes * group.count as usize),
                source: ByteSource::Disk,
            }
        };
        self.channels.fetcher.fetch(group_repeats(&samples).into_iter().map(job).collect());
    }

    /// Puts the rows of a worker into their step.
    fn insert(&mut self, result: RowResult) -> Result<()> {
        for (index, error) in result.corrupt {
            if self.corrupt.contains_key(&index) {
                continue;
            }
            tracing::warn!("sample {} (rank {}): {error}", self.options.mixture.key(index)?, self.rank.rank);
            self.corrupt.insert(index, error.message);
        }
        self.check_corrupt()?;
        let outcome = result.outcome?;
        let first = self.pending.front().expect("a result belongs to a step in flight").step;
        let step = &mut self.pending[(result.step - first) as usize];
        step.missing -= result.count;
        step.pixels[result.first_row] = result.output;
        if let Some(info) = outcome {
            for offset in 1..result.count {
                let repeat = info.repeat + offset as u32;
                step.rows[result.first_row + offset] = Some(RowInfo { repeat, ..info.clone() });
            }
            step.rows[result.first_row] = Some(info);
        }
        Ok(())
    }

    /// Returns an error once more samples are corrupt than are allowed.
    fn check_corrupt(&self) -> Result<()> {
        if self.corrupt.len() <= self.max_corrupt {
            return Ok(());
        }
        let listed: Vec<&str> = self.corrupt.values().take(MAX_LISTED_SAMPLES).map(String::as_str).collect();
        Err(Error::new(
            ExitCode::Corrupt,
            format!(
                "rank {} of {} found {} undecodable samples among the {} of {}, {} are allowed; \
                 fetch or pack the data again. They are: {}{}",
                self.rank.rank,
                self.rank.world_size,
                self.corrupt.len(),
                self.options.mixture.len(),
                self.options.mixture.name(),
                self.max_corrupt,
                listed.join("; "),
                if self.corrupt.len() > MAX_LISTED_SAMPLES { "; …" } else { "" }
            ),
        ))
    }

    /// Joins the rows' memory, which is contiguous, into one tensor. The gaps of skipped rows are closed.
    fn assemble(&self, step: PendingStep) -> Result<LoadedRows> {
        let PendingStep { step, shape: [channels, frames, height, width], rows, pixels: pieces, .. } = step;
        let row_bytes = self.options.row_bytes([channels, frames, height, width]);
        let mut pixels = BytesMut::new();
        pieces.into_iter().for_each(|piece| pixels.unsplit(piece));
        let mut count = 0;
        for (row, _) in rows.iter().enumerate().filter(|(_, row)| row.is_some()) {
            if count != row {
                pixels.copy_within(row * row_bytes..(row + 1) * row_bytes, count * row_bytes);
            }
            count += 1;
        }
        pixels.truncate(count * row_bytes);
        let rows: Vec<RowInfo> = rows.into_iter().flatten().collect();
        // The tensor is made of bytes and then reinterpreted as elements, so its innermost side is in bytes.
        let kind = self.options.modality.kind();
        let byte_width = width * kind.elt_size_in_bytes() as i64;
        let buffer = PooledBuffer { bytes: pixels, pool: self.pool_sender.clone() };
        let pixels = from_blob(buffer, &[count as i64, channels, frames, height, byte_width])?;
        let context_length = self.options.tokenizer.as_ref().map(|tokenizer| tokenizer.context_length() as i64);
        let ids = rows.iter().map(|row| row.id).collect();
        let epochs = rows.iter().map(|row| row.epoch).collect();
        let repeats = rows.iter().map(|row| row.repeat).collect();
        let sides: Vec<RowSide> = rows.into_iter().map(|row| row.side).collect();
        Ok(LoadedRows {
            step,
            ids,
            epochs,
            repeats,
            side: Side::stack(&sides, context_length, self.options.labels.are_read())?,
            pixels: pixels.f_view_dtype(kind)?,
            wait_time: Duration::ZERO,
        })
    }
}

/// Consecutive rows that show consecutive repeats of one sample.
struct RepeatGroup {
    first_row: usize,
    /// Sample of the first row.
    sample: SampleRef,
    /// Number of rows.
    count: u32,
}

/// Groups consecutive repeats of one sample, so that it is decoded once.
fn group_repeats(samples: &[SampleRef]) -> Vec<RepeatGroup> {
    let mut groups: Vec<RepeatGroup> = Vec::with_capacity(samples.len());
    for (row, &sample) in samples.iter().enumerate() {
        match groups.last_mut() {
            Some(group) if sample == (SampleRef { repeat: group.sample.repeat + group.count, ..group.sample }) => {
                group.count += 1;
            }
            _ => groups.push(RepeatGroup { first_row: row, sample, count: 1 }),
        }
    }
    groups
}
