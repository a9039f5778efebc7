//! The conveyor: fetch | decode | view | batch.
//!
//! Bytes of samples in a store are fetched ahead; worker threads make rows in any order; one thread lays them into steps
//! and hands those over in order. What is under way is bounded in bytes. What a row holds depends on its position alone,
//! never on threads, ranks or on where a training resumed: a sample that cannot be decoded is replaced by one drawn from
//! its own stream.

mod clock;
mod fetch;
mod row;
mod batch;

pub use clock::{Clock, Stage, process_seconds};

use crate::data::cache::Cache;
use crate::data::caption::Tokenizer;
use crate::data::decode::Limits;
use crate::data::medium::{Medium, Sample};
use crate::data::mix::Mix;
use crate::data::order::{self, Order, Pick};
use crate::fault::{Fault, Result};
use crate::op::shuffle::Origin;
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use fetch::Fetcher;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};
use tokio::sync::Semaphore;

/// A sample's views: (sample, id, epoch, repeats) → one [C, T, Y, X] for each repeat, as bytes into the last argument; how
/// many of the Y rows of each, from the top, show the sample.
pub type ViewFn = Arc<dyn Fn(Sample, u64, u64, Range<u32>, &mut [u8]) -> Result<u32> + Send + Sync>;

/// What this rank reads in a step, in the order of its rows.
pub type Plan = Box<dyn Fn(u64) -> Vec<Pick> + Send>;

/// What every feed needs.
#[derive(Clone)]
pub struct Source {
    pub set: Arc<Mix>,
    /// Where bytes that were fetched from a store are kept.
    pub cache: Option<Arc<Cache>>,
    /// What samples are decoded as; it decides the element of a row.
    pub medium: Medium,
    pub view: ViewFn,
    /// Makes the samples' captions into ids, where they are wanted.
    pub captions: Option<Arc<Tokenizer>>,
    /// [C, T, Y, X] of what the view returns.
    pub shape: [i64; 4],
    /// Which sets of a mixture hold still pictures where others hold clips; none where all rows have the same shape. A row
    /// of theirs is [C, 1, Y, X], and a step has rows of one shape.
    pub stills: Vec<bool>,
    pub limits: Limits,
    pub seed: u64,
    /// Worker threads; at least one.
    pub threads: usize,
    /// Bytes of pixels that may be under way, and as many that were fetched and wait for a decoder; one step always
    /// may, and one sample.
    pub prefetch_bytes: usize,
    /// Share of the data set's samples that may be undecodable before the feed gives up; three always may.
    pub max_bad_share: f64,
}

impl Source {
    /// [C, T, Y, X] of the row of sample `index`.
    pub fn shape_of(&self, index: u64) -> [i64; 4] {
        let [c, t, y, x] = self.shape;
        [c, if self.stills.get(self.set.number(index)) == Some(&true) { 1 } else { t }, y, x]
    }

    /// Bytes of a row of this shape.
    pub fn row_bytes(&self, shape: [i64; 4]) -> usize {
        shape.iter().product::<i64>() as usize * self.medium.kind().elt_size_in_bytes()
    }
}

/// This rank's rows of one step.
#[derive(Debug, PartialEq)]
pub struct Rows {
    pub step: u64,
    pub ids: Vec<u64>,
    pub epochs: Vec<u64>,
    /// Tell several views of one sample in an epoch apart.
    pub repeats: Vec<u32>,
    /// Classes; none where the data set has none.
    pub labels: Option<Vec<i64>>,
    /// Of each view, how many of its Y rows show the sample; the rest, of a short sound, is padding.
    pub valid: Vec<u32>,
    /// [rows, C, T, Y, X] on the CPU, of the medium's element. The memory is the feed's own, and serves another step once
    /// every tensor over it is gone.
    pub pixels: Tensor,
    /// Ids of the captions, int64 [rows, L] on the CPU, where the source has a tokenizer.
    pub text: Option<Tensor>,
    /// How long the caller waited for it.
    pub waited: Duration,
}

impl Rows {
    /// Where each row's randomness comes from.
    pub fn origins(&self) -> Vec<Origin> {
        let places = self.ids.iter().zip(&self.epochs).zip(&self.repeats);
        places.map(|((&id, &epoch), &repeat)| Origin { id, epoch, repeat }).collect()
    }

    /// Pixels of some of the rows, [rows, C, T, Y, X] on a device.
    pub fn to_device(&self, rows: Range<usize>, device: Device) -> Result<Tensor> {
        to_device(&self.pixels, rows, device)
    }
}

/// Some rows of pixels or captions on a device. Where they are there already nothing is copied. From a CPU to a GPU they
/// go through pinned memory, which libtorch keeps for the next time, and without waiting for the copy.
pub fn to_device(all: &Tensor, rows: Range<usize>, device: Device) -> Result<Tensor> {
    let part = all.f_narrow(0, rows.start as i64, (rows.end - rows.start) as i64)?;
    match part.device() == device {
        true => Ok(part),
        false => Ok(part.f_pin_memory(device)?.f_to_device_(device, all.kind(), true, false)?),
    }
}

/// Threads that prepare steps.
pub struct Feed {
    steps: Receiver<Result<Rows>>,
    /// Steps that the caller has not had yet.
    left: u64,
    taken: Option<Sender<()>>,
    stop: Arc<AtomicBool>,
    /// Closed when the feed stops, which ends what is being fetched.
    fetching: Arc<Semaphore>,
    /// Dropped when the feed stops, which wakes workers that wait for orders.
    quit: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    clock: Arc<Clock>,
}

impl Feed {
    /// Training: in step s, rank r of W reads its rows of the positions s·G .. (s+1)·G of `order`.
    pub fn train(
        source: Source,
        order: Order,
        global_batch: u64,
        rank: usize,
        world: usize,
        steps: Range<u64>,
    ) -> Result<Feed> {
        let rows = order::rows(global_batch, rank, world);
        let plan = move |step: u64| rows.clone().map(|row| order.pick(step * global_batch + row)).collect();
        Feed::start(source, Box::new(plan), (rank, world), steps, true)
    }

    /// Evaluation: this rank's share of all samples, each once and in the order of the data set, `batch` rows a
    /// step, the last step shorter. An undecodable sample is left out.
    pub fn sweep(source: Source, batch: u64, rank: usize, world: usize) -> Result<Feed> {
        let share = order::rows(source.set.len(), rank, world);
        let batch = batch.max(1);
        let steps = 0..(share.end - share.start).div_ceil(batch);
        let plan = move |step: u64| {
            let first = share.start + step * batch;
            (first..(first + batch).min(share.end)).map(|sample| Pick { epoch: 0, sample, repeat: 0 }).collect()
        };
        Feed::start(source, Box::new(plan), (rank, world), steps, false)
    }

    fn start(source: Source, plan: Plan, rank: (usize, usize), steps: Range<u64>, replace: bool) -> Result<Feed> {
        let stop = Arc::new(AtomicBool::new(false));
        let (give, orders) = unbounded::<row::Order>();
        let (done, rows) = unbounded::<row::Done>();
        let (out, finished) = unbounded();
        let (taken, returned) = unbounded();
        let labelled = source.set.labelled()?;
        let clock = Arc::new(Clock::default());
        let reader = Arc::new(row::Reader { source: source.clone(), labelled, replace, clock: clock.clone() });
        let left = steps.end.saturating_sub(steps.start);
        let give = Fetcher::new(&source, labelled, give);
        let (quit, leave) = bounded::<()>(0);
        let mut feed = Feed {
            steps: finished,
            left,
            taken: Some(taken),
            stop: stop.clone(),
            fetching: give.stop(),
            quit: Some(quit),
            threads: Vec::new(),
            clock: clock.clone(),
        };
        let threads = source.threads.max(1);
        let lines = batch::Lines { give, rows, out, taken: returned };
        let belt = batch::Belt::new(source, labelled, plan, steps, lines, rank, clock);
        feed.spawn("feed-batch".into(), move || belt.run())?;
        for number in 0..threads {
            let (reader, orders, done, stop) = (reader.clone(), orders.clone(), done.clone(), stop.clone());
            let leave = leave.clone();
            feed.spawn(format!("feed-{number}"), move || {
                let mut desk = row::Desk::new(reader.source.limits);
                loop {
                    let order = select! {
                        recv(orders) -> order => order,
                        recv(leave) -> _ => break,
                    };
                    let Ok(order) = order else { break };
                    if stop.load(Ordering::Relaxed) || done.send(reader.row(&mut desk, order)).is_err() {
                        break;
                    }
                }
            })?;
        }
        Ok(feed)
    }

    /// What the stages have cost so far.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name(name.clone()).spawn(body);
        self.threads.push(thread.map_err(|error| Fault::failed(format!("thread {name} does not start: {error}")))?);
        Ok(())
    }
}

impl Iterator for Feed {
    type Item = Result<Rows>;

    /// The next step's rows; none after the last step. A fault is Code::Corrupt past the share of bad samples,
    /// whatever reading a shard gave, or Code::Failed where a view panicked; it ends the feed, and asking on gives a
    /// fault again, so that a broken feed is never taken for a finished one.
    fn next(&mut self) -> Option<Result<Rows>> {
        let began = Instant::now();
        if self.left == 0 {
            return None;
        }
        let step = self.steps.recv().unwrap_or_else(|_| {
            let message = format!("the feed ended {} steps early; what it said before tells why", self.left);
            Err(Fault::failed(message))
        });
        self.left -= u64::from(step.is_ok());
        if let Some(taken) = &self.taken {
            // The other end is gone once the last step is out; nobody needs the word then.
            let _ = taken.send(());
        }
        Some(step.map(|rows| Rows { waited: began.elapsed(), ..rows }))
    }
}

impl Drop for Feed {
    /// Stops the threads; each ends after the sample in its hands.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.taken = None;
        self.quit = None;
        self.fetching.close();
        for thread in self.threads.drain(..) {
            // A thread's panic was a fault of `next` already.
            let _ = thread.join();
        }
    }
}
