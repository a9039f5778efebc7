//! Assigns samples to shards before the first byte is read, from the listed files and their sizes. A killed pack makes
//! the same plan again, and an unreadable sample moves no other.

use super::super::index;
use super::super::modality::Modality;
use super::super::shard_writer::{ShardWriter, TAR_END_BYTES};
use super::super::store::Store;
use super::source::{PackSource, SourceSample};
use super::{PackOptions, VideoOptions};
use crate::error::{Error, Result};
use std::ops::Range;

/// The plan of a pack.
pub struct PackPlan {
    /// Digest of the samples and options.
    pub fingerprint: String,
    /// The data sets: one, or `train` and `test`.
    pub splits: Vec<PlannedSplit>,
}

/// One data set of a plan.
pub struct PlannedSplit {
    pub store: Store,
    pub name: String,
    pub shards: Vec<PlannedShard>,
}

/// One shard of a plan.
pub struct PlannedShard {
    pub file: String,
    /// Indices into the source's samples, as the plan has sorted them.
    pub samples: Range<usize>,
    /// Bytes of the tar if all files are stored unchanged.
    pub bytes: u64,
}

impl PackPlan {
    /// Sorts the source's samples by split, `train` before `test`, and by a digest of their keys, which mixes the
    /// classes over the shards, and divides them into shards.
    pub fn new(source: &mut PackSource, destination: &Store, options: &PackOptions) -> Result<PackPlan> {
        let name = match &options.name {
            Some(name) => name.clone(),
            None => destination.folder_name().replace(['{', '}', '.'], "-"),
        };
        let fingerprint = fingerprint(source, options);
        let is_test = |sample: &SourceSample| is_test_key(&sample.key, options.test_fraction);
        source.samples.sort_by_cached_key(|sample| (is_test(sample), index::digest(sample.key.as_bytes())));
        let samples = &source.samples;
        let plan_split = |store: Store, name: String, range: Range<usize>| {
            if range.is_empty() {
                return Err(empty_split_error(&store));
            }
            let shards = plan_shards(samples, range, &name, options);
            Ok(PlannedSplit { store, name, shards })
        };
        let splits = if options.test_fraction > 0.0 {
            let boundary = samples.partition_point(|sample| !is_test(sample));
            vec![
                plan_split(destination.subfolder("train"), format!("{name}-train"), 0..boundary)?,
                plan_split(destination.subfolder("test"), format!("{name}-test"), boundary..samples.len())?,
            ]
        } else {
            vec![plan_split(destination.clone(), name, 0..samples.len())?]
        };
        Ok(PackPlan { fingerprint, splits })
    }

    /// Returns the samples for training: all but those of the test split.
    pub fn train_range(&self) -> Range<usize> {
        0..self.splits[0].shards.last().map_or(0, |shard| shard.samples.end)
    }
}

fn is_test_key(key: &str, test_fraction: f64) -> bool {
    test_fraction > 0.0 && (crate::rng::hash_id(&["test", key]) as f64 / u64::MAX as f64) < test_fraction
}

/// Returns the error for a data set without samples.
pub fn empty_split_error(store: &Store) -> Error {
    Error::usage(format!("{}: no sample would go there; pack more or change the test fraction", store.display_name("")))
}

fn plan_shards(samples: &[SourceSample], range: Range<usize>, name: &str, options: &PackOptions) -> Vec<PlannedShard> {
    let mut shards: Vec<PlannedShard> = Vec::new();
    for index in range {
        let bytes = tar_bytes(&samples[index]);
        let is_full = |shard: &PlannedShard| {
            shard.samples.len() as u64 >= options.samples_per_shard || shard.bytes + bytes > options.shard_bytes
        };
        match shards.last_mut().filter(|shard| !is_full(shard)) {
            Some(shard) => {
                shard.bytes += bytes;
                shard.samples.end = index + 1;
            }
            None => {
                let file = format!("{name}-{:06}.tar", shards.len());
                shards.push(PlannedShard { file, samples: index..index + 1, bytes: TAR_END_BYTES + bytes });
            }
        }
    }
    shards
}

/// Returns the bytes that a sample's members take in a tar if its file is stored unchanged.
fn tar_bytes(sample: &SourceSample) -> u64 {
    let label = sample.label.map(|label| label.to_string().len() as u64);
    let texts = [&sample.caption, &sample.metadata].map(|text| text.as_ref().map(|text| text.len() as u64));
    [sample.bytes, label].into_iter().chain(texts).flatten().map(ShardWriter::member_bytes).sum()
}

fn fingerprint(source: &PackSource, options: &PackOptions) -> String {
    let PackOptions { name, samples_per_shard, shard_bytes, test_fraction, max_corrupt_fraction, .. } = options;
    let PackOptions { limits, resize, encode, quality, .. } = options;
    let mut hasher = blake3::Hasher::new();
    if options.modality == Modality::Audio {
        hasher.update(format!("audio {:?}\0", options.sample_rate).as_bytes());
    }
    let settings = format!(
        "2 {name:?} {samples_per_shard} {shard_bytes} {test_fraction} {max_corrupt_fraction} {limits:?} {resize:?} \
         {encode:?} {quality:?} {:?}\0",
        source.classes
    );
    hasher.update(settings.as_bytes());
    if options.video != VideoOptions::default() {
        hasher.update(format!("{:?}\0", options.video).as_bytes());
    }
    for sample in &source.samples {
        let SourceSample { key, extension, label, caption, metadata, bytes, modified_ns, .. } = sample;
        let text = format!("{key} {extension:?} {label:?} {caption:?} {metadata:?} {bytes:?} {modified_ns}\0");
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}
