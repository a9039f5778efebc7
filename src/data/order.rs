//! The order of samples: a pure function that knows nothing of ranks.
//!
//! Position p of a training belongs to epoch p / N. The N positions of an epoch are a permutation of the N samples,
//! another one in every epoch. Shards come in random order; every `open_shards` consecutive shards form a window, and
//! the samples of a window are shuffled together, so that at most that many shards are read at a time (twice as many
//! where one window gives way to the next). Each source of a mixture has its own order and counts its own epochs; in
//! every block of 4,096 positions each source has the share of its weight, to within one, at random places. Sources of
//! different kinds, whose samples cannot share a batch, alternate by step: a whole step is of one kind, and in every
//! block of 4,096 steps each kind has the share of the weights of its sources. Nothing depends on earlier calls: a
//! training resumes at any position, on any number of ranks.

use crate::rng::{Philox, Purpose};
use std::ops::Range;
use std::sync::Mutex;

/// Number of positions, or steps, that are assigned at a time.
const BLOCK: u64 = 4096;

/// Random stream that assigns steps to kinds; those of a kind's own mixture are below it.
const KIND_STREAM: u32 = 4095;

/// The owner of each place of a block, and the number of the owner's earlier places in the block.
type AssignmentBlock = Vec<(u32, u32)>;

/// A sample at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleRef {
    /// Epoch of the sample's source.
    pub epoch: u64,
    /// Index of the sample over all sources.
    pub sample: u64,
    /// Index among the repeats of the sample in this epoch.
    pub repeat: u32,
}

/// Sources of one kind, whose samples may share a batch.
#[derive(Debug)]
struct SourceGroup {
    kind: usize,
    sources: Vec<usize>,
    /// Assigns positions, or runs of `repeats` positions, to the sources.
    shares: Shares,
    /// Number of consecutive positions with the same sample.
    repeats: u64,
}

/// Assigns steps to kinds.
#[derive(Debug)]
struct Alternation {
    shares: Shares,
    /// Number of positions of a step.
    step: u64,
}

/// The sample order of a data set or a mixture, for one seed.
#[derive(Debug)]
pub struct SampleOrder {
    sources: Vec<SourceOrder>,
    /// Index of the first sample of each source; the last entry is the total.
    starts: Vec<u64>,
    kinds: Vec<SourceGroup>,
    /// None where there is one kind.
    alternation: Option<Alternation>,
}

impl SampleOrder {
    /// Makes the order of one source with shards of these sizes. There must be at least one sample, and at most 2³²
    /// samples in a window.
    pub fn new(sizes: &[u64], seed: u64, open_shards: usize) -> SampleOrder {
        Self::with_sources(&[(sizes.to_vec(), 1.0)], seed, open_shards)
    }

    /// Makes the order of several sources: their shard sizes and weights, each weight at least 1/4096 of the sum.
    pub fn with_sources(sources: &[(Vec<u64>, f64)], seed: u64, open_shards: usize) -> SampleOrder {
        Self::alternating(sources, &vec![0; sources.len()], 1, seed, open_shards)
    }

    /// Makes the order of several sources of different kinds: `kinds` gives a small number for each source, and each
    /// run of `step` positions is of one kind.
    pub fn alternating(
        sources: &[(Vec<u64>, f64)],
        kinds: &[usize],
        step: u64,
        seed: u64,
        open_shards: usize,
    ) -> SampleOrder {
        let mut starts = vec![0];
        let mut orders = Vec::new();
        for (index, (sizes, _)) in sources.iter().enumerate() {
            let order = SourceOrder::new(sizes, seed, index as u32, open_shards);
            starts.push(starts.last().expect("it begins with 0") + order.sample_count());
            orders.push(order);
        }
        let mut groups = Vec::new();
        let mut group_weights = Vec::new();
        for kind in 0..=kinds.iter().copied().max().expect("at least one source") {
            let members: Vec<usize> = (0..sources.len()).filter(|&source| kinds[source] == kind).collect();
            let weights: Vec<f64> = members.iter().map(|&source| sources[source].1).collect();
            if !members.is_empty() {
                group_weights.push(weights.iter().sum());
                let shares = Shares::new(&weights, seed, kind as u32);
                groups.push(SourceGroup { kind, sources: members, shares, repeats: 1 });
            }
        }
        let alternation =
            (groups.len() > 1).then(|| Alternation { shares: Shares::new(&group_weights, seed, KIND_STREAM), step });
        SampleOrder { sources: orders, starts, kinds: groups, alternation }
    }

    /// Repeats each sample of a kind at `repeats` consecutive positions, so that it is decoded once for all of them.
    pub fn with_repeats(mut self, kind: usize, repeats: u32) -> SampleOrder {
        for group in self.kinds.iter_mut().filter(|group| group.kind == kind) {
            group.repeats = u64::from(repeats.max(1));
        }
        self
    }

    /// Returns N, the number of samples of all sources.
    pub fn sample_count(&self) -> u64 {
        *self.starts.last().expect("it begins with 0")
    }

    /// Returns the epoch and the sample at a position.
    pub fn epoch_and_sample(&self, position: u64) -> (u64, u64) {
        let SampleRef { epoch, sample, .. } = self.sample_at(position);
        (epoch, sample)
    }

    /// Returns the sample at a position.
    pub fn sample_at(&self, position: u64) -> SampleRef {
        let (kind, position) = match &self.alternation {
            None => (0, position),
            Some(Alternation { shares, step }) => {
                let (kind, earlier) = shares.owner(position / step);
                (kind, earlier * step + position % step)
            }
        };
        let SourceGroup { sources, shares, repeats, .. } = &self.kinds[kind];
        let (member, source_position) = shares.owner(position / repeats);
        let source = sources[member];
        let (epoch, sample) = self.sources[source].sample_at(source_position);
        SampleRef { epoch, sample: self.starts[source] + sample, repeat: (position % repeats) as u32 }
    }
}

/// Assigns places to owners in proportion to their weights.
#[derive(Debug)]
struct Shares {
    /// Cumulative fraction of each owner; the last is 1.
    cumulative: Vec<f64>,
    seed: u64,
    /// Distinguishes the random streams of several values.
    stream: u32,
    /// Block of the last call with its index: a cache.
    block: Mutex<Option<(u64, AssignmentBlock)>>,
}

impl Shares {
    fn new(weights: &[f64], seed: u64, stream: u32) -> Shares {
        let sum: f64 = weights.iter().sum();
        let mut cumulative: Vec<f64> = Vec::new();
        for weight in weights {
            assert!(*weight >= sum / BLOCK as f64, "a weight of {weight} among {sum}");
            cumulative.push(cumulative.last().copied().unwrap_or(0.0) + weight / sum);
        }
        *cumulative.last_mut().expect("at least one weight") = 1.0;
        Shares { cumulative, seed, stream, block: Mutex::new(None) }
    }

    /// Returns the owner of a place, and the number of the owner's earlier places.
    fn owner(&self, place: u64) -> (usize, u64) {
        if self.cumulative.len() == 1 {
            return (0, place);
        }
        let block = place / BLOCK;
        let offset = (place % BLOCK) as usize;
        let mut cache = self.block.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if cache.as_ref().is_none_or(|(cached, _)| *cached != block) {
            *cache = Some((block, self.assign(block)));
        }
        let (owner, earlier) = cache.as_ref().expect("filled above").1[offset];
        (owner as usize, self.count_before(owner as usize, block) + u64::from(earlier))
    }

    /// Returns the number of places of `owner` in all blocks before `block`.
    fn count_before(&self, owner: usize, block: u64) -> u64 {
        let cumulative_count = |fraction: f64| (fraction * (block * BLOCK) as f64).floor() as u64;
        let end = cumulative_count(self.cumulative[owner]);
        let start = if owner == 0 { 0 } else { cumulative_count(self.cumulative[owner - 1]) };
        end - start
    }

    fn assign(&self, block: u64) -> AssignmentBlock {
        let mut slots = Vec::with_capacity(BLOCK as usize);
        for owner in 0..self.cumulative.len() {
            let count = self.count_before(owner, block + 1) - self.count_before(owner, block);
            slots.extend(std::iter::repeat_n(owner as u32, count as usize));
        }
        let permutation = Philox::new(self.seed, block, 0, Purpose::Mixture, self.stream).permutation(slots.len());
        let mut counts = vec![0; self.cumulative.len()];
        let assigned = permutation.into_iter().map(|slot| {
            let owner = slots[slot as usize];
            counts[owner as usize] += 1;
            (owner, counts[owner as usize] - 1)
        });
        assigned.collect()
    }
}

/// The sample order of one source.
#[derive(Debug)]
struct SourceOrder {
    /// Index of the first sample of each shard; the last entry is the total.
    starts: Vec<u64>,
    seed: u64,
    /// Index of the source: distinguishes the random streams of several sources.
    source: u32,
    open_shards: usize,
    /// Epoch and window of the last call: a cache.
    cache: Mutex<Option<(Epoch, ShardWindow)>>,
}

/// The shards of an epoch in their order.
#[derive(Debug)]
struct Epoch {
    index: u64,
    shards: Vec<u32>,
    /// Position of the first sample of each window; the last entry is the total.
    window_starts: Vec<u64>,
}

/// The samples of a window in their order.
#[derive(Debug)]
struct ShardWindow {
    index: usize,
    samples: Vec<u64>,
}

impl SourceOrder {
    fn new(sizes: &[u64], seed: u64, source: u32, open_shards: usize) -> SourceOrder {
        let mut starts = vec![0];
        for size in sizes {
            starts.push(starts.last().expect("it begins with 0") + size);
        }
        assert!(starts.last() > Some(&0), "an order needs at least one sample");
        SourceOrder { starts, seed, source, open_shards: open_shards.max(1), cache: Mutex::new(None) }
    }

    fn sample_count(&self) -> u64 {
        *self.starts.last().expect("it begins with 0")
    }

    /// Returns the epoch of a position, and the index of the sample in the source.
    fn sample_at(&self, position: u64) -> (u64, u64) {
        let epoch_index = position / self.sample_count();
        let offset = position % self.sample_count();
        let mut cache = self.cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (epoch, window) = match cache.take() {
            Some((epoch, window)) if epoch.index == epoch_index => (epoch, Some(window)),
            _ => (self.epoch(epoch_index), None),
        };
        let window_index = epoch.window_starts.partition_point(|&start| start <= offset) - 1;
        let window = match window {
            Some(window) if window.index == window_index => window,
            _ => self.window(&epoch, window_index),
        };
        let sample = window.samples[(offset - epoch.window_starts[window_index]) as usize];
        *cache = Some((epoch, window));
        (epoch_index, sample)
    }

    fn epoch(&self, index: u64) -> Epoch {
        let count = self.starts.len() - 1;
        let shards = Philox::new(self.seed, 0, index, Purpose::Order, self.source).permutation(count);
        let mut window_starts = vec![0];
        for window in shards.chunks(self.open_shards) {
            let size: u64 = window.iter().map(|&shard| self.range(shard).end - self.range(shard).start).sum();
            window_starts.push(window_starts.last().expect("it begins with 0") + size);
        }
        Epoch { index, shards, window_starts }
    }

    /// Shuffles the samples of a window. Random stream 0 permutes shards, stream 1 + w the samples of window w.
    fn window(&self, epoch: &Epoch, index: usize) -> ShardWindow {
        let shards = epoch.shards.chunks(self.open_shards).nth(index).expect("a window of this epoch");
        let samples: Vec<u64> = shards.iter().flat_map(|&shard| self.range(shard)).collect();
        let mut rng = Philox::new(self.seed, 1 + index as u64, epoch.index, Purpose::Order, self.source);
        let permutation = rng.permutation(samples.len());
        let samples = permutation.into_iter().map(|from| samples[from as usize]).collect();
        ShardWindow { index, samples }
    }

    fn range(&self, shard: u32) -> Range<u64> {
        self.starts[shard as usize]..self.starts[shard as usize + 1]
    }
}

/// Returns the rows of a global batch of G that rank r of W reads: ⌊rG/W⌋ .. ⌊(r+1)G/W⌋; empty where there are more
/// ranks than rows.
pub fn rank_rows(global_batch: u64, rank: usize, world_size: usize) -> Range<u64> {
    assert!(rank < world_size, "rank {rank} of {world_size}");
    let start = |rank: usize| (u128::from(global_batch) * rank as u128 / world_size as u128) as u64;
    start(rank)..start(rank + 1)
}

/// Returns the samples that a rank reads, like [`rank_rows`], but with boundaries only at multiples of `block`, so that
/// the samples that share a block do not depend on the number of ranks.
pub fn rank_block_rows(samples: u64, block: u64, rank: usize, world_size: usize) -> Range<u64> {
    let blocks = rank_rows(samples.div_ceil(block), rank, world_size);
    (blocks.start * block).min(samples)..(blocks.end * block).min(samples)
}

/// Returns the maximum number of blocks that a rank reads.
pub fn max_rank_blocks(samples: u64, block: u64, world_size: usize) -> u64 {
    samples.div_ceil(block).div_ceil(world_size as u64)
}
