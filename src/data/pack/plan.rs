//! Which picture goes into which shard, settled before the first byte is read: from what was listed, with its sizes.
//! A pack that was killed comes to the same plan, and a picture that turns out unreadable moves no other.

use super::super::index;
use super::super::medium::Medium;
use super::super::store::Store;
use super::super::write::{END, Writer};
use super::source::{Picture, Source};
use super::{Options, Videos};
use crate::fault::{Fault, Result};
use std::ops::Range;

/// All that will be written.
pub struct Plan {
    /// One digest over what goes in and how.
    pub made_from: String,
    /// The data sets: one, or `train` and `test`.
    pub parts: Vec<Part>,
}

/// One data set to be.
pub struct Part {
    pub store: Store,
    pub name: String,
    pub shards: Vec<Shard>,
}

/// One shard to be.
pub struct Shard {
    pub file: String,
    /// Which of the pictures, as the plan has sorted them.
    pub pictures: Range<usize>,
    /// The tar's length where pictures go in as they are.
    pub bytes: u64,
}

impl Plan {
    /// Sorts the source's pictures by a digest of their keys, which mixes the classes over the shards, `train` before
    /// `test`, and shares them out.
    pub fn new(source: &mut Source, out: &Store, options: &Options) -> Result<Plan> {
        let name = match &options.name {
            Some(name) => name.clone(),
            None => out.folder_name().replace(['{', '}', '.'], "-"),
        };
        let made_from = fingerprint(source, options);
        let split = options.test_share > 0.0;
        let chance = |key: &str| crate::rng::id(&["test", key]) as f64 / u64::MAX as f64;
        let tested = |picture: &Picture| split && chance(&picture.key) < options.test_share;
        source.pictures.sort_by_cached_key(|picture| (tested(picture), index::digest(picture.key.as_bytes())));
        let all = source.pictures.len();
        let boundary = source.pictures.partition_point(|picture| !tested(picture));
        let part = |store: Store, name: String, range: Range<usize>| {
            if range.is_empty() {
                return Err(nothing(&store));
            }
            let shards = shards(&source.pictures, range, &name, options);
            Ok(Part { store, name, shards })
        };
        let parts = match split {
            true => vec![
                part(out.at("train"), format!("{name}-train"), 0..boundary)?,
                part(out.at("test"), format!("{name}-test"), boundary..all)?,
            ],
            false => vec![part(out.clone(), name, 0..all)?],
        };
        Ok(Plan { made_from, parts })
    }

    /// The pictures that models learn from: all but those of the test part.
    pub fn learned_from(&self) -> Range<usize> {
        0..self.parts[0].shards.last().map_or(0, |shard| shard.pictures.end)
    }
}

/// A data set that would hold no sample.
pub fn nothing(store: &Store) -> Fault {
    Fault::usage(format!(
        "{}: no sample would go there; pack more or change the share of the test part",
        store.name("")
    ))
}

fn shards(pictures: &[Picture], range: Range<usize>, name: &str, options: &Options) -> Vec<Shard> {
    let mut shards: Vec<Shard> = Vec::new();
    for at in range {
        let bytes = cost(&pictures[at]);
        let full = |shard: &Shard| {
            shard.pictures.len() as u64 >= options.samples_per_shard || shard.bytes + bytes > options.shard_bytes
        };
        match shards.last_mut().filter(|shard| !full(shard)) {
            Some(shard) => {
                shard.bytes += bytes;
                shard.pictures.end = at + 1;
            }
            None => {
                let file = format!("{name}-{:06}.tar", shards.len());
                shards.push(Shard { file, pictures: at..at + 1, bytes: END + bytes });
            }
        }
    }
    shards
}

/// What a picture and its other members take in a tar, where it goes in as it is.
fn cost(picture: &Picture) -> u64 {
    let label = picture.label.map(|label| label.to_string().len() as u64);
    let texts = [&picture.caption, &picture.more].map(|text| text.as_ref().map(|text| text.len() as u64));
    [picture.bytes, label].into_iter().chain(texts).flatten().map(Writer::cost).sum()
}

fn fingerprint(source: &Source, options: &Options) -> String {
    let Options { name, samples_per_shard, shard_bytes, test_share, max_bad_share, limits, .. } = options;
    let Options { resize, encode, quality, .. } = options;
    let mut hasher = blake3::Hasher::new();
    if options.medium == Medium::Sound {
        hasher.update(format!("sound {:?}\0", options.rate).as_bytes());
    }
    let how = format!(
        "2 {name:?} {samples_per_shard} {shard_bytes} {test_share} {max_bad_share} {limits:?} {resize:?} {encode:?} \
         {quality:?} {:?}\0",
        source.classes
    );
    hasher.update(how.as_bytes());
    if options.video != Videos::default() {
        hasher.update(format!("{:?}\0", options.video).as_bytes());
    }
    for picture in &source.pictures {
        let Picture { key, extension, label, caption, more, bytes, changed, .. } = picture;
        let what = format!("{key} {extension:?} {label:?} {caption:?} {more:?} {bytes:?} {changed}\0");
        hasher.update(what.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}
