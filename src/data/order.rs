//! The order of samples: pure, and ignorant of the world.
//!
//! Position p of a training belongs to epoch p / N; the N positions of an epoch are a permutation of the N samples,
//! another one in every epoch. Shards come in random order; each run of `open_shards` of them is a window, and the
//! samples of a window are mixed among each other, so that at most that many shards are read at a time (twice as many
//! where one window gives way to the next). Of several sources each has its own order and counts its own epochs; of
//! every 4,096 positions each source has its share by weight, to within one, in random places. Sources of samples that
//! do not go into one batch take turns instead: a whole step is of one kind, and of every 4,096 steps each kind has its
//! share by the weights of its sources. Nothing depends on what was asked before: a training resumes at any position, on
//! any number of ranks, by asking for that position.

use crate::rng::{Draw, Purpose};
use std::ops::Range;
use std::sync::Mutex;

/// Positions, or steps, that are shared out at a time.
const BLOCK: u64 = 4096;

/// Of each place of a block who has it, and how many of the block's places before it are theirs.
type Block = Vec<(u32, u32)>;

/// What stands at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// The epoch that its source is in.
    pub epoch: u64,
    /// Numbered through the sources.
    pub sample: u64,
    /// Which of the sample's showings in this epoch it is.
    pub repeat: u32,
}

/// Sources of one kind, whose samples share a batch.
#[derive(Debug)]
struct Taker {
    kind: usize,
    sources: Vec<usize>,
    /// How they share positions, or runs of them.
    shares: Shares,
    /// Positions in a row that show the same sample.
    repeats: u64,
}

/// The order of one data set, or of a mixture, under one seed.
#[derive(Debug)]
pub struct Order {
    sources: Vec<Source>,
    /// Samples in front of each source, and at the end all of them.
    starts: Vec<u64>,
    kinds: Vec<Taker>,
    /// How the kinds share steps, and the positions of a step; none where there is one kind.
    turns: Option<(Shares, u64)>,
}

impl Order {
    /// The order of shards of these sizes. At least one sample, at least one open shard, at most 2³² samples in a
    /// window.
    pub fn new(sizes: &[u64], seed: u64, open_shards: usize) -> Order {
        Self::mixed(&[(sizes.to_vec(), 1.0)], seed, open_shards)
    }

    /// The order of several sources: the sizes of their shards, and their weights, each at least 1/4096 of the sum.
    pub fn mixed(sources: &[(Vec<u64>, f64)], seed: u64, open_shards: usize) -> Order {
        Self::by_turns(sources, &vec![0; sources.len()], 1, seed, open_shards)
    }

    /// As `mixed`, where each source's samples are of a kind, a small number: each run of `step` positions is of one kind.
    pub fn by_turns(sources: &[(Vec<u64>, f64)], kind: &[usize], step: u64, seed: u64, open_shards: usize) -> Order {
        let mut starts = vec![0];
        let mut orders = Vec::new();
        for (number, (sizes, _)) in sources.iter().enumerate() {
            let order = Source::new(sizes, seed, number as u32, open_shards);
            starts.push(starts.last().expect("a start") + order.samples());
            orders.push(order);
        }
        let (mut kinds, mut weights) = (Vec::new(), Vec::new());
        for which in 0..=kind.iter().copied().max().expect("a source") {
            let own: Vec<usize> = (0..sources.len()).filter(|&source| kind[source] == which).collect();
            let shares: Vec<f64> = own.iter().map(|&source| sources[source].1).collect();
            if !own.is_empty() {
                weights.push(shares.iter().sum());
                let shares = Shares::new(&shares, seed, which as u32);
                kinds.push(Taker { kind: which, sources: own, shares, repeats: 1 });
            }
        }
        let turns = (kinds.len() > 1).then(|| (Shares::new(&weights, seed, TURNS), step));
        Order { sources: orders, starts, kinds, turns }
    }

    /// Each sample of this kind stands at so many positions in a row: a reader opens it once for all of them.
    pub fn repeating(mut self, kind: usize, repeats: u32) -> Order {
        let takers = self.kinds.iter_mut().filter(|taker| taker.kind == kind);
        takers.for_each(|taker| taker.repeats = u64::from(repeats.max(1)));
        self
    }

    /// N, over all sources.
    pub fn samples(&self) -> u64 {
        *self.starts.last().expect("a start")
    }

    /// The epoch that a position's source is in, and the sample (numbered through the sources) that stands there.
    pub fn at(&self, position: u64) -> (u64, u64) {
        let Pick { epoch, sample, .. } = self.pick(position);
        (epoch, sample)
    }

    /// What stands at a position.
    pub fn pick(&self, position: u64) -> Pick {
        let (kind, position) = match &self.turns {
            None => (0, position),
            Some((turns, step)) => {
                let (kind, before) = turns.at(position / step);
                (kind, before * step + position % step)
            }
        };
        let Taker { sources, shares, repeats, .. } = &self.kinds[kind];
        let (source, within) = shares.at(position / repeats);
        let source = sources[source];
        let (epoch, sample) = self.sources[source].at(within);
        Pick { epoch, sample: self.starts[source] + sample, repeat: (position % repeats) as u32 }
    }
}

/// The stream of who takes which step, apart from those of a kind's own mixture.
const TURNS: u32 = 4095;

/// Places shared out by weight.
#[derive(Debug)]
struct Shares {
    /// The part of each and of those before it; the last is 1.
    until: Vec<f64>,
    seed: u64,
    /// Tells the streams of several of these apart.
    stream: u32,
    /// The block last worked out, and its number. It changes the speed of an answer, never the answer.
    block: Mutex<Option<(u64, Block)>>,
}

impl Shares {
    fn new(weights: &[f64], seed: u64, stream: u32) -> Shares {
        let whole: f64 = weights.iter().sum();
        let mut until: Vec<f64> = Vec::new();
        for weight in weights {
            assert!(*weight >= whole / BLOCK as f64, "a share of weight {weight} among {whole}");
            until.push(until.last().copied().unwrap_or(0.0) + weight / whole);
        }
        *until.last_mut().expect("a share") = 1.0;
        Shares { until, seed, stream, block: Mutex::new(None) }
    }

    /// Who has a place, and how many places before it are theirs.
    fn at(&self, place: u64) -> (usize, u64) {
        if self.until.len() == 1 {
            return (0, place);
        }
        let (number, at) = (place / BLOCK, (place % BLOCK) as usize);
        let mut cache = self.block.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if cache.as_ref().is_none_or(|(cached, _)| *cached != number) {
            *cache = Some((number, self.share_out(number)));
        }
        let (who, before) = cache.as_ref().expect("a block").1[at];
        (who as usize, self.before(who as usize, number) + u64::from(before))
    }

    /// Somebody's places in the blocks before `block`.
    fn before(&self, who: usize, block: u64) -> u64 {
        let until = |share: f64| (share * (block * BLOCK) as f64).floor() as u64;
        until(self.until[who]) - if who == 0 { 0 } else { until(self.until[who - 1]) }
    }

    fn share_out(&self, block: u64) -> Block {
        let mut slots = Vec::with_capacity(BLOCK as usize);
        for who in 0..self.until.len() {
            let count = self.before(who, block + 1) - self.before(who, block);
            slots.extend(std::iter::repeat_n(who as u32, count as usize));
        }
        let order = Draw::new(self.seed, block, 0, Purpose::Mixture, self.stream).order(slots.len());
        let mut before = vec![0; self.until.len()];
        let taken = order.into_iter().map(|slot| {
            let who = slots[slot as usize];
            before[who as usize] += 1;
            (who, before[who as usize] - 1)
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
