//! A mixture of data sets: several sets under one sample index, each with its weight. A single set is a mixture of one.

use super::index::Digest;
use super::set::DataSet;
use super::shard::Shard;
use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// One source of a mixture, as written in a config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixtureSource {
    /// A folder of shards, one shard, or a pattern such as `dir/train-{000000..000009}.tar`; a path or a URL.
    pub url: String,
    /// Fraction of the samples, relative to the weights of the other sources.
    pub weight: f64,
}

/// The samples of several data sets, indexed consecutively.
#[derive(Debug)]
pub struct Mixture {
    sets: Vec<DataSet>,
    weights: Vec<f64>,
    /// Index of the first sample of each set; the last entry is the total.
    starts: Vec<u64>,
}

impl Mixture {
    /// Opens every source.
    ///
    /// # Errors
    /// ExitCode::Usage for two sets of one name, because the id of a sample is made of its set's name and its key.
    pub fn open(sources: &[MixtureSource], timeout: Duration) -> Result<Mixture> {
        let sets = sources.iter().map(|source| DataSet::open_with_timeout(&source.url, timeout));
        let sets = sets.collect::<Result<Vec<_>>>()?;
        for (index, set) in sets.iter().enumerate() {
            if let Some(other) = sets[..index].iter().position(|other| other.name == set.name) {
                return Err(Error::usage(format!(
                    "{} and {} are both data sets called {}; give one of them another name in its dataset.json, or \
                     pack it with --name",
                    sources[other].url, sources[index].url, set.name
                )));
            }
        }
        Ok(Self::from_sets(sets, sources.iter().map(|source| source.weight).collect()))
    }

    /// Makes a mixture of one data set.
    pub fn from_set(set: DataSet) -> Mixture {
        Self::from_sets(vec![set], vec![1.0])
    }

    fn from_sets(sets: Vec<DataSet>, weights: Vec<f64>) -> Mixture {
        let mut starts = vec![0];
        for set in &sets {
            starts.push(starts.last().expect("it begins with 0") + set.len());
        }
        Mixture { sets, weights, starts }
    }

    /// Returns the number of samples; at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        *self.starts.last().expect("it begins with 0")
    }

    /// Returns the data sets.
    pub fn sets(&self) -> &[DataSet] {
        &self.sets
    }

    /// Returns the shard sizes and the weight of each set, from which a sample order is made.
    pub fn weighted_sizes(&self) -> Vec<(Vec<u64>, f64)> {
        self.sets.iter().map(DataSet::shard_sizes).zip(self.weights.iter().copied()).collect()
    }

    /// Returns the names of the sets, joined.
    pub fn name(&self) -> String {
        self.sets.iter().map(|set| set.name.as_str()).collect::<Vec<_>>().join(" + ")
    }

    /// Returns the index of the set that contains sample `index` of 0..len.
    pub fn set_index(&self, index: u64) -> usize {
        assert!(index < self.len(), "sample {index} of {}", self.len());
        self.starts.partition_point(|&start| start <= index) - 1
    }

    /// Returns the set that contains sample `index` of 0..len, and the sample's index in it.
    pub fn set_of(&self, index: u64) -> (&DataSet, u64) {
        let set = self.set_index(index);
        (&self.sets[set], index - self.starts[set])
    }

    /// Returns the range of samples of the set that contains sample `index`.
    pub fn set_range(&self, index: u64) -> Range<u64> {
        let set = self.set_index(index);
        self.starts[set]..self.starts[set + 1]
    }

    /// Returns the shard that contains sample `index`, and the sample's row in it.
    pub fn find_sample(&self, index: u64) -> Result<(Arc<Shard>, usize)> {
        let (set, index) = self.set_of(index);
        set.find_sample(index)
    }

    /// Returns the key of sample `index`.
    pub fn key(&self, index: u64) -> Result<String> {
        let (set, index) = self.set_of(index);
        set.key(index)
    }

    /// Returns the id of sample `index`; it depends only on the name of its data set and its key.
    pub fn id(&self, index: u64) -> Result<u64> {
        let (set, index) = self.set_of(index);
        set.id(index)
    }

    /// Returns whether every set has labels.
    pub fn has_labels(&self) -> Result<bool> {
        self.sets.iter().try_fold(true, |all, set| Ok(all && set.has_labels()?))
    }

    /// Returns whether any set is read over a network.
    pub fn is_remote(&self) -> bool {
        self.sets.iter().any(DataSet::is_remote)
    }

    /// Returns a digest over all sets, which ranks compare.
    pub fn digest(&self) -> Digest {
        let digests: Vec<u8> = self.sets.iter().flat_map(DataSet::digest).collect();
        super::index::digest(&digests)
    }
}
