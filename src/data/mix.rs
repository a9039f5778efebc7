//! Several data sets behind one numbering of samples, each with its weight; one set is a mixture of one.

use super::index::Digest;
use super::set::DataSet;
use super::shard::Shard;
use crate::fault::{Fault, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// One source of a mixture, as a config names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A folder of shards, one shard, or a pattern such as `dir/train-{000000..000009}.tar`; a path or a URL.
    pub url: String,
    /// Its part of the samples, in proportion to the weights of the others.
    pub weight: f64,
}

/// All samples of some data sets, numbered through.
#[derive(Debug)]
pub struct Mix {
    sets: Vec<DataSet>,
    weights: Vec<f64>,
    /// The number of samples in front of each set, and at the end all of them.
    starts: Vec<u64>,
}

impl Mix {
    /// Opens every source. Two sets of one name are refused, since a sample is known by its set's name and its key.
    pub fn open(sources: &[Source], limit: Duration) -> Result<Mix> {
        let sets = sources.iter().map(|source| DataSet::open_patiently(&source.url, limit));
        let sets = sets.collect::<Result<Vec<_>>>()?;
        for (at, set) in sets.iter().enumerate() {
            if let Some(other) = sets[..at].iter().position(|other| other.name == set.name) {
                return Err(Fault::usage(format!(
                    "{} and {} are both data sets called {}; give one of them another name in its dataset.json, or pack \
                     it with --name",
                    sources[other].url, sources[at].url, set.name
                )));
            }
        }
        Ok(Self::of(sets, sources.iter().map(|source| source.weight).collect()))
    }

    /// One data set alone.
    pub fn one(set: DataSet) -> Mix {
        Self::of(vec![set], vec![1.0])
    }

    fn of(sets: Vec<DataSet>, weights: Vec<f64>) -> Mix {
        let mut starts = vec![0];
        for set in &sets {
            starts.push(starts.last().expect("a start") + set.len());
        }
        Mix { sets, weights, starts }
    }

    /// How many samples there are; at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        *self.starts.last().expect("a start")
    }

    pub fn sets(&self) -> &[DataSet] {
        &self.sets
    }

    /// Sizes of the shards of each set, and its weight: what an order is made of.
    pub fn sizes(&self) -> Vec<(Vec<u64>, f64)> {
        self.sets.iter().map(DataSet::sizes).zip(self.weights.iter().copied()).collect()
    }

    /// The names of the sets.
    pub fn name(&self) -> String {
        self.sets.iter().map(|set| set.name.as_str()).collect::<Vec<_>>().join(" + ")
    }

    /// Which set sample `index` of 0..len is in.
    pub fn number(&self, index: u64) -> usize {
        assert!(index < self.len(), "sample {index} of {}", self.len());
        self.starts.partition_point(|&start| start <= index) - 1
    }

    /// The set of sample `index` of 0..len, and its number there.
    pub fn set(&self, index: u64) -> (&DataSet, u64) {
        let set = self.number(index);
        (&self.sets[set], index - self.starts[set])
    }

    /// The samples of the set that sample `index` is in.
    pub fn around(&self, index: u64) -> Range<u64> {
        let set = self.number(index);
        self.starts[set]..self.starts[set + 1]
    }

    /// Where sample `index` lies: its shard, and its row there.
    pub fn sample(&self, index: u64) -> Result<(Arc<Shard>, usize)> {
        let (set, index) = self.set(index);
        set.sample(index)
    }

    /// The key of sample `index`.
    pub fn key(&self, index: u64) -> Result<String> {
        let (set, index) = self.set(index);
        set.key(index)
    }

    /// The id of sample `index`: it depends on its data set's name and its key, on nothing else.
    pub fn id(&self, index: u64) -> Result<u64> {
        let (set, index) = self.set(index);
        set.id(index)
    }

    /// Whether samples carry a class: whether the first of every set does.
    pub fn labelled(&self) -> Result<bool> {
        self.sets.iter().try_fold(true, |all, set| Ok(all && set.labelled()?))
    }

    /// Whether any bytes travel over a network.
    pub fn remote(&self) -> bool {
        self.sets.iter().any(DataSet::remote)
    }

    /// One digest over all sets, for ranks to compare.
    pub fn digest(&self) -> Digest {
        let digests: Vec<u8> = self.sets.iter().flat_map(DataSet::digest).collect();
        super::index::digest(&digests)
    }
}
