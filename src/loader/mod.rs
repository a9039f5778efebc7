//! The data loader: fetch | decode | view | batch.
//!
//! The bytes of samples in a store are fetched ahead. Worker threads build rows in any order; one thread assembles them
//! into steps and hands the steps over in order. The bytes in flight are bounded. The content of a row depends on its
//! position alone, never on threads, ranks or the step at which a training resumed: a sample that cannot be decoded is
//! replaced by one drawn from its own random stream.

mod cpu_time;
mod fetch;
mod row;
mod batch;

pub use cpu_time::{LoaderStage, StageCpuTime, process_cpu_seconds};

use crate::data::cache::Cache;
use crate::data::caption::Tokenizer;
use crate::data::decode::ImageLimits;
use crate::data::mixture::Mixture;
use crate::data::modality::{Modality, Sample};
use crate::data::order::{self, SampleOrder, SampleRef};
use crate::error::{Error, ExitCode, Result};
use crate::op::shuffle::SampleKey;
use crate::part::batch::{Side, to_device};
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use fetch::Fetcher;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};
use tokio::sync::Semaphore;

/// Makes the views of a sample: (sample, id, epoch, repeats, output) writes one [C, T, Y, X] per repeat into the output
/// and returns how many of the Y rows of each, from the top, show the sample.
pub type ViewFn = Arc<dyn Fn(Sample, u64, u64, Range<u32>, &mut [u8]) -> Result<u32> + Send + Sync>;

/// Maps a step to the samples that this rank reads in it, in the order of its rows.
pub type StepPlan = Box<dyn Fn(u64) -> Vec<SampleRef> + Send>;

/// The options of a [`DataLoader`].
#[derive(Clone)]
pub struct LoaderOptions {
    /// Data sets to read from.
    pub mixture: Arc<Mixture>,
    /// On-disk cache for bytes that were fetched from a store.
    pub cache: Option<Arc<Cache>>,
    /// Modality of the samples; it decides the element type of a row.
    pub modality: Modality,
    /// Augmentation of a decoded sample.
    pub view: ViewFn,
    /// Tokenizer for the samples' captions; none where captions are not read.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// [C, T, Y, X] of what the view writes.
    pub shape: [i64; 4],
    /// For each data set of the mixture, true if it contains images while others contain videos; empty where all rows
    /// have the same shape. Rows of such a set are [C, 1, Y, X]; all rows of a step have one shape.
    pub single_frame_sets: Vec<bool>,
    /// Limits of images.
    pub limits: ImageLimits,
    pub labels: Labels,
    /// Seed of replacements for samples that cannot be decoded.
    pub seed: u64,
    /// Number of worker threads; at least one is started.
    pub threads: usize,
    /// Maximum bytes of pixels in flight, and also of fetched bytes that wait for a decoder. One step and one sample
    /// are always allowed.
    pub prefetch_bytes: usize,
    /// Fraction of the data set's samples that may be undecodable before the loader fails; three are always allowed.
    pub max_corrupt_fraction: f64,
}

/// How the loader treats labels (`.cls` members).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    /// They are not read.
    Ignored,
    /// Every sample has one.
    Required,
    /// A sample may have none; the others' lie in 0..classes.
    Optional { classes: i64 },
}

impl Labels {
    /// Returns whether labels are read.
    pub fn are_read(self) -> bool {
        self != Labels::Ignored
    }

    /// Checks one sample's label.
    ///
    /// # Errors
    /// ExitCode::Corrupt where one is missing, ExitCode::Usage where the model has fewer classes.
    pub fn check(self, label: Option<i64>) -> Result<()> {
        match (self, label) {
            (Labels::Required, None) => {
                Err(Error::new(ExitCode::Corrupt, "it has no .cls member, but other samples have one"))
            }
            (Labels::Optional { classes }, Some(label)) if !(0..classes).contains(&label) => {
                let last = classes - 1;
                Err(Error::usage(format!(
                    "its label is {label}, and the method's classes are 0 to {last}; give it more, or correct the .cls"
                )))
            }
            _ => Ok(()),
        }
    }
}

impl LoaderOptions {
    /// Returns [C, T, Y, X] of the row of sample `index`.
    pub fn row_shape(&self, index: u64) -> [i64; 4] {
        let [channels, frames, height, width] = self.shape;
        let single_frame = self.single_frame_sets.get(self.mixture.set_index(index)) == Some(&true);
        [channels, if single_frame { 1 } else { frames }, height, width]
    }

    /// Returns the bytes of a row of this shape.
    pub fn row_bytes(&self, shape: [i64; 4]) -> usize {
        shape.iter().product::<i64>() as usize * self.modality.kind().elt_size_in_bytes()
    }
}

/// This rank's rows of one step.
#[derive(Debug, PartialEq)]
pub struct LoadedRows {
    /// Index of the step.
    pub step: u64,
    /// Sample ids.
    pub ids: Vec<u64>,
    /// Epoch of each row.
    pub epochs: Vec<u64>,
    /// Index of the view among the views of the same sample in the same epoch.
    pub repeats: Vec<u32>,
    /// Captions, labels and valid lengths, on the CPU.
    pub side: Side,
    /// [rows, C, T, Y, X] on the CPU, of the modality's element type. The memory belongs to the loader, which reuses it
    /// once every tensor over it is dropped.
    pub pixels: Tensor,
    /// Time that the caller waited for these rows.
    pub wait_time: Duration,
}

impl LoadedRows {
    /// Returns the random key of each row.
    pub fn keys(&self) -> Vec<SampleKey> {
        let rows = self.ids.iter().zip(&self.epochs).zip(&self.repeats);
        rows.map(|((&id, &epoch), &repeat)| SampleKey { id, epoch, repeat }).collect()
    }

    /// Copies the pixels of a range of rows, [rows, C, T, Y, X], to a device.
    pub fn to_device(&self, rows: Range<usize>, device: Device) -> Result<Tensor> {
        to_device(&self.pixels, rows, device)
    }
}

/// This rank, and the number of ranks.
#[derive(Clone, Copy)]
struct RankInfo {
    rank: usize,
    world_size: usize,
}

/// A part of a training whose steps are blocks of an update.
pub struct UpdateBlocks {
    /// Number of samples of an update over all ranks.
    pub global_batch: u64,
    /// Maximum number of rows of a step.
    pub block: u64,
    pub updates: Range<u64>,
}

/// An iterator over the steps of one rank, prepared by threads of its own.
pub struct DataLoader {
    steps: Receiver<Result<LoadedRows>>,
    /// Number of steps that the caller has not received yet.
    remaining: u64,
    consumed: Option<Sender<()>>,
    stop: Arc<AtomicBool>,
    /// Closed when the loader stops, which cancels the fetches in flight.
    fetching: Arc<Semaphore>,
    /// Dropped when the loader stops, which wakes workers that wait for jobs.
    quit: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    cpu_time: Arc<StageCpuTime>,
}

impl DataLoader {
    /// Loads for training: in step s, rank r of W reads its rows of the positions s·G .. (s+1)·G of `order`.
    pub fn for_training(
        options: LoaderOptions,
        order: SampleOrder,
        global_batch: u64,
        rank: usize,
        world_size: usize,
        steps: Range<u64>,
    ) -> Result<DataLoader> {
        let rows = order::rank_rows(global_batch, rank, world_size);
        let plan = move |step: u64| rows.clone().map(|row| order.sample_at(step * global_batch + row)).collect();
        DataLoader::start(options, Box::new(plan), RankInfo { rank, world_size }, steps, true)
    }

    /// Loads for training in blocks: update u takes the positions u·G .. (u+1)·G of `order`, one block per step. Blocks
    /// start at u·G plus a multiple of `block` on any number of ranks. Each rank takes [`order::max_rank_blocks`] steps
    /// per update, of which the last may be empty.
    pub fn for_training_in_blocks(
        options: LoaderOptions,
        order: SampleOrder,
        blocks: UpdateBlocks,
        rank: usize,
        world_size: usize,
    ) -> Result<DataLoader> {
        let UpdateBlocks { global_batch, block, updates } = blocks;
        let local = order::rank_block_rows(global_batch, block, rank, world_size);
        let steps_per_update = order::max_rank_blocks(global_batch, block, world_size);
        let steps = updates.start * steps_per_update..updates.end * steps_per_update;
        let plan = move |step: u64| {
            let first = local.start + step % steps_per_update * block;
            let rows = first..(first + block).min(local.end);
            rows.map(|row| order.sample_at(step / steps_per_update * global_batch + row)).collect()
        };
        DataLoader::start(options, Box::new(plan), RankInfo { rank, world_size }, steps, true)
    }

    /// Loads for evaluation: this rank's part of all samples, each once and in the order of the data set, `batch` rows
    /// a step; the last step may be shorter. Steps start at multiples of `batch` on any number of ranks. An undecodable
    /// sample is skipped.
    pub fn sequential(options: LoaderOptions, batch: u64, rank: usize, world_size: usize) -> Result<DataLoader> {
        let batch = batch.max(1);
        let local = order::rank_block_rows(options.mixture.len(), batch, rank, world_size);
        let steps = 0..(local.end - local.start).div_ceil(batch);
        let plan = move |step: u64| {
            let first = local.start + step * batch;
            let samples = first..(first + batch).min(local.end);
            samples.map(|sample| SampleRef { epoch: 0, sample, repeat: 0 }).collect()
        };
        DataLoader::start(options, Box::new(plan), RankInfo { rank, world_size }, steps, false)
    }

    fn start(
        options: LoaderOptions,
        plan: StepPlan,
        rank: RankInfo,
        steps: Range<u64>,
        replace_corrupt: bool,
    ) -> Result<DataLoader> {
        let stop = Arc::new(AtomicBool::new(false));
        let (job_sender, jobs) = unbounded::<row::RowJob>();
        let (result_sender, results) = unbounded::<row::RowResult>();
        let (output, finished) = unbounded();
        let (consumed_sender, consumed) = unbounded();
        let (quit_sender, quit) = bounded::<()>(0);
        let cpu_time = Arc::new(StageCpuTime::default());
        let threads = options.threads.max(1);
        let builder =
            Arc::new(row::RowBuilder { options: options.clone(), replace_corrupt, cpu_time: cpu_time.clone() });
        let fetcher = Fetcher::new(&options, job_sender);
        let mut loader = DataLoader {
            steps: finished,
            remaining: steps.end.saturating_sub(steps.start),
            consumed: Some(consumed_sender),
            stop: stop.clone(),
            fetching: fetcher.stop_signal(),
            quit: Some(quit_sender),
            threads: Vec::new(),
            cpu_time: cpu_time.clone(),
        };
        let batcher = batch::Batcher::new(batch::BatcherOptions {
            options,
            plan,
            steps,
            channels: batch::BatcherChannels { fetcher, results, output, consumed },
            rank,
            cpu_time,
        });
        loader.spawn("loader-batch".into(), move || batcher.run())?;
        for index in 0..threads {
            let worker = Worker {
                builder: builder.clone(),
                jobs: jobs.clone(),
                results: result_sender.clone(),
                quit: quit.clone(),
                stop: stop.clone(),
            };
            loader.spawn(format!("loader-{index}"), move || worker.run())?;
        }
        Ok(loader)
    }

    /// Returns the CPU time of each stage so far.
    pub fn cpu_time(&self) -> &StageCpuTime {
        &self.cpu_time
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name(name.clone()).spawn(body);
        self.threads.push(thread.map_err(|error| Error::failed(format!("thread {name} does not start: {error}")))?);
        Ok(())
    }
}

impl Iterator for DataLoader {
    type Item = Result<LoadedRows>;

    /// Returns the rows of the next step; none after the last step.
    ///
    /// # Errors
    /// ExitCode::Corrupt past the fraction of corrupt samples, the error of reading a shard, or ExitCode::Failed where
    /// a view panicked. An error ends the loader; further calls return an error again, so that a broken loader is never
    /// taken for a finished one.
    fn next(&mut self) -> Option<Result<LoadedRows>> {
        let start = Instant::now();
        if self.remaining == 0 {
            return None;
        }
        let step = self.steps.recv().unwrap_or_else(|_| {
            let message =
                format!("the data loader ended {} steps early; an earlier message gives the cause", self.remaining);
            Err(Error::failed(message))
        });
        self.remaining -= u64::from(step.is_ok());
        if let Some(consumed) = &self.consumed {
            // The receiver is gone once the last step is out.
            let _ = consumed.send(());
        }
        Some(step.map(|rows| LoadedRows { wait_time: start.elapsed(), ..rows }))
    }
}

impl Drop for DataLoader {
    /// Stops the threads; each ends after its current sample.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.consumed = None;
        self.quit = None;
        self.fetching.close();
        for thread in self.threads.drain(..) {
            // `next` has reported a thread's panic already.
            let _ = thread.join();
        }
    }
}

/// A worker thread: turns jobs into rows.
struct Worker {
    builder: Arc<row::RowBuilder>,
    jobs: Receiver<row::RowJob>,
    results: Sender<row::RowResult>,
    /// Disconnected when the loader stops.
    quit: Receiver<()>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn run(self) {
        let mut scratch = row::WorkerScratch::new(self.builder.options.limits);
        loop {
            let job = select! {
                recv(self.jobs) -> job => job,
                recv(self.quit) -> _ => break,
            };
            let Ok(job) = job else { break };
            if self.stop.load(Ordering::Relaxed) || self.results.send(self.builder.build(&mut scratch, job)).is_err() {
                break;
            }
        }
    }
}
