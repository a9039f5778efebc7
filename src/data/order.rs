//! The order of samples: pure, and ignorant of the world.
//!
//! Position p of a training belongs to epoch p / N; the N positions of an epoch are a permutation of the N samples,
//! another one in every epoch. Shards come in random order; each run of `open_shards` of them is a window, and the
//! samples of a window are mixed among each other, so that at most that many shards are read at a time (twice as many
//! where one window gives way to the next). Nothing depends on what was asked before: a training resumes at any
//! position, on any number of ranks, by asking for that position.

use crate::rng::{Draw, Purpose};
use std::ops::Range;
use std::sync::Mutex;

/// The order of one data set under one seed.
#[derive(Debug)]
pub struct Order {
    /// Samples in front of each shard, and at the end all of them.
    starts: Vec<u64>,
    seed: u64,
    open_shards: usize,
    /// What was last worked out; it changes the speed of an answer, never the answer.
    cache: Mutex<Option<(Epoch, Window)>>,
}

/// The shards of an epoch in their order.
#[derive(Debug)]
struct Epoch {
    number: u64,
    shards: Vec<u32>,
    /// Samples in front of each window, and at the end all of them.
    windows: Vec<u64>,
}

/// The samples of a window in their order.
#[derive(Debug)]
struct Window {
    number: usize,
    samples: Vec<u64>,
}

impl Order {
    /// The order of shards of these sizes. At least one sample, at least one open shard, at most 2³² samples in a
    /// window.
    pub fn new(sizes: &[u64], seed: u64, open_shards: usize) -> Order {
        let mut starts = vec![0];
        for size in sizes {
            starts.push(starts.last().expect("a start") + size);
        }
        assert!(starts.last() > Some(&0), "an order needs a sample");
        Order { starts, seed, open_shards: open_shards.max(1), cache: Mutex::new(None) }
    }

    /// N.
    pub fn samples(&self) -> u64 {
        *self.starts.last().expect("a start")
    }

    /// The epoch of a position, and the sample (numbered in the order of the data set) that stands there.
    pub fn at(&self, position: u64) -> (u64, u64) {
        let (epoch, within) = (position / self.samples(), position % self.samples());
        let mut cache = self.cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (shards, window) = match cache.take() {
            Some((shards, window)) if shards.number == epoch => (shards, Some(window)),
            _ => (self.epoch(epoch), None),
        };
        let number = shards.windows.partition_point(|&start| start <= within) - 1;
        let window = match window {
            Some(window) if window.number == number => window,
            _ => self.window(&shards, number),
        };
        let sample = window.samples[(within - shards.windows[number]) as usize];
        *cache = Some((shards, window));
        (epoch, sample)
    }

    fn epoch(&self, number: u64) -> Epoch {
        let count = self.starts.len() - 1;
        let shards = Draw::new(self.seed, 0, number, Purpose::Order, 0).order(count);
        let mut windows = vec![0];
        for window in shards.chunks(self.open_shards) {
            let size: u64 = window.iter().map(|&shard| self.range(shard).end - self.range(shard).start).sum();
            windows.push(windows.last().expect("a start") + size);
        }
        Epoch { number, shards, windows }
    }

    /// The shards of a window stand in the order of the epoch; number 0 of the streams orders shards, 1 + w the
    /// samples of window w.
    fn window(&self, epoch: &Epoch, number: usize) -> Window {
        let shards = epoch.shards.chunks(self.open_shards).nth(number).expect("a window of this epoch");
        let samples: Vec<u64> = shards.iter().flat_map(|&shard| self.range(shard)).collect();
        let mut draw = Draw::new(self.seed, 1 + number as u64, epoch.number, Purpose::Order, 0);
        let samples = draw.order(samples.len()).into_iter().map(|at| samples[at as usize]).collect();
        Window { number, samples }
    }

    fn range(&self, shard: u32) -> Range<u64> {
        self.starts[shard as usize]..self.starts[shard as usize + 1]
    }
}

/// The rows of a global batch of G that rank r of W takes: ⌊rG/W⌋ .. ⌊(r+1)G/W⌋; none where there are more ranks than
/// rows.
pub fn rows(global_batch: u64, rank: usize, world: usize) -> Range<u64> {
    assert!(rank < world, "rank {rank} of {world}");
    let bound = |rank: usize| (u128::from(global_batch) * rank as u128 / world as u128) as u64;
    bound(rank)..bound(rank + 1)
}
