//! The order of samples: pure, and ignorant of the world.
//!
//! Position p of a training belongs to epoch p / N; the N positions of an epoch are a permutation of the N samples,
//! another one in every epoch. Shards come in random order; each run of `open_shards` of them is a window, and the
//! samples of a window are mixed among each other, so that at most that many shards are read at a time (twice as many
//! where one window gives way to the next). Of several sources each has its own order and counts its own epochs; of
//! every 4,096 positions each source has its share by weight, to within one, in random places. Nothing depends on what
//! was asked before: a training resumes at any position, on any number of ranks, by asking for that position.

use crate::rng::{Draw, Purpose};
use std::ops::Range;
use std::sync::Mutex;

/// Positions that are shared out among the sources at a time.
const BLOCK: u64 = 4096;

/// Of each position of a block its source, and how many of that source's positions lie before it in the block.
type Block = Vec<(u32, u32)>;

/// The order of one data set, or of a mixture, under one seed.
#[derive(Debug)]
pub struct Order {
    sources: Vec<Source>,
    /// Samples in front of each source, and at the end all of them.
    starts: Vec<u64>,
    seed: u64,
    /// The part of each source and of those before it; the last is 1.
    shares: Vec<f64>,
    /// The block last worked out, and its number. It changes the speed of an answer, never the answer.
    block: Mutex<Option<(u64, Block)>>,
}

impl Order {
    /// The order of shards of these sizes. At least one sample, at least one open shard, at most 2³² samples in a
    /// window.
    pub fn new(sizes: &[u64], seed: u64, open_shards: usize) -> Order {
        Self::mixed(&[(sizes.to_vec(), 1.0)], seed, open_shards)
    }

    /// The order of several sources: the sizes of their shards, and their weights, each at least 1/4096 of the sum.
    pub fn mixed(sources: &[(Vec<u64>, f64)], seed: u64, open_shards: usize) -> Order {
        let whole: f64 = sources.iter().map(|(_, weight)| weight).sum();
        let (mut shares, mut starts) = (Vec::new(), vec![0]);
        let mut orders = Vec::new();
        for (number, (sizes, weight)) in sources.iter().enumerate() {
            assert!(*weight >= whole / BLOCK as f64, "a source of weight {weight} among {whole}");
            let order = Source::new(sizes, seed, number as u32, open_shards);
            shares.push(shares.last().copied().unwrap_or(0.0) + weight / whole);
            starts.push(starts.last().expect("a start") + order.samples());
            orders.push(order);
        }
        *shares.last_mut().expect("a source") = 1.0;
        Order { sources: orders, starts, seed, shares, block: Mutex::new(None) }
    }

    /// N, over all sources.
    pub fn samples(&self) -> u64 {
        *self.starts.last().expect("a start")
    }

    /// The epoch that a position's source is in, and the sample (numbered through the sources) that stands there.
    pub fn at(&self, position: u64) -> (u64, u64) {
        let (source, within) = if self.sources.len() == 1 { (0, position) } else { self.shared(position) };
        let (epoch, sample) = self.sources[source].at(within);
        (epoch, self.starts[source] + sample)
    }

    /// The source of a position, and how many of that source's positions lie before it.
    fn shared(&self, position: u64) -> (usize, u64) {
        let (number, at) = (position / BLOCK, (position % BLOCK) as usize);
        let mut cache = self.block.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if cache.as_ref().is_none_or(|(cached, _)| *cached != number) {
            *cache = Some((number, self.share_out(number)));
        }
        let (source, before) = cache.as_ref().expect("a block").1[at];
        (source as usize, self.before(source as usize, number) + u64::from(before))
    }

    /// Positions of a source in the blocks before `block`.
    fn before(&self, source: usize, block: u64) -> u64 {
        let until = |share: f64| (share * (block * BLOCK) as f64).floor() as u64;
        until(self.shares[source]) - if source == 0 { 0 } else { until(self.shares[source - 1]) }
    }

    fn share_out(&self, block: u64) -> Block {
        let mut slots = Vec::with_capacity(BLOCK as usize);
        for source in 0..self.sources.len() {
            let count = self.before(source, block + 1) - self.before(source, block);
            slots.extend(std::iter::repeat_n(source as u32, count as usize));
        }
        let order = Draw::new(self.seed, block, 0, Purpose::Mixture, 0).order(slots.len());
        let mut before = vec![0; self.sources.len()];
        let taken = order.into_iter().map(|slot| {
            let source = slots[slot as usize];
            before[source as usize] += 1;
            (source, before[source as usize] - 1)
        });
        taken.collect()
    }
}

/// The order of one source.
#[derive(Debug)]
struct Source {
    /// Samples in front of each shard, and at the end all of them.
    starts: Vec<u64>,
    seed: u64,
    /// Tells the streams of several sources apart.
    number: u32,
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

impl Source {
    fn new(sizes: &[u64], seed: u64, number: u32, open_shards: usize) -> Source {
        let mut starts = vec![0];
        for size in sizes {
            starts.push(starts.last().expect("a start") + size);
        }
        assert!(starts.last() > Some(&0), "an order needs a sample");
        Source { starts, seed, number, open_shards: open_shards.max(1), cache: Mutex::new(None) }
    }

    fn samples(&self) -> u64 {
        *self.starts.last().expect("a start")
    }

    /// The epoch of a position, and the sample (numbered in the order of the source) that stands there.
    fn at(&self, position: u64) -> (u64, u64) {
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
        let shards = Draw::new(self.seed, 0, number, Purpose::Order, self.number).order(count);
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
        let mut draw = Draw::new(self.seed, 1 + number as u64, epoch.number, Purpose::Order, self.number);
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
