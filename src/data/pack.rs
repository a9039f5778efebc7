//! Packs images, videos or audio into shards with their indices, and writes `dataset.json` last.
//!
//! The same files give the same bytes, on every machine and with any number of threads: members are USTAR, mode 0444,
//! time 0, in the order of a digest of their keys, which mixes the classes over the shards. Threads read and transcode
//! samples ahead of the writer; a shard is published while the next one is written, so that at most two are in memory,
//! and none where the destination is a disk.
//!
//! A destination without `dataset.json` is an unfinished pack: a new pack keeps its complete shards.

mod sample_keys; // keys from paths
mod list; // CSV, TSV, JSON lines, Parquet
mod source; // the samples to pack
mod transcode; // one sample → its members
mod video; // options of video encoding
mod audio; // one audio file → its member
mod plan; // the samples of each shard
mod existing; // what the destination already holds

use super::caption;
use super::decode::ImageLimits;
use super::modality::Modality;
use super::set::{DataSetManifest, ShardRecord};
use super::shard_writer::{ShardWriter, write_atomically};
use super::store::Store;
use crate::error::{Error, ExitCode, Result};
use existing::ExistingShard;
use indicatif::{ProgressBar, ProgressStyle};
use plan::{PackPlan, PlannedShard, PlannedSplit};
use serde::{Deserialize, Serialize};
use source::{PackSource, SourceSample};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};
use transcode::{PackedSample, Transcoder};

/// Samples that a thread may be ahead of the writer.
const PREFETCH_SAMPLES: usize = 4;

/// Options of a pack.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// Name of the data set, part of shard names and sample ids; the output folder's name by default.
    pub name: Option<String>,
    /// A shard is closed at this many samples or before it would exceed `shard_bytes`.
    pub samples_per_shard: u64,
    /// Maximum bytes of a shard, counting files at their original size.
    pub shard_bytes: u64,
    /// Fraction of the samples that go to `test/`, the others to `train/`; 0 makes one data set without splits.
    pub test_fraction: f64,
    /// Maximum fraction of corrupt samples.
    pub max_corrupt_fraction: f64,
    /// Modality of the samples to find in the source.
    pub modality: Modality,
    /// Limits of images; audio has [`AudioLimits::default`](super::audio::AudioLimits::default).
    pub limits: ImageLimits,
    /// Resizes images and videos with a longer shorter side to this shorter side.
    pub resize: Option<u32>,
    /// Encodes all images in this format. By default resized images keep theirs, and the bytes of others do not change.
    pub encode: Option<ImageEncoding>,
    /// Quality of JPEG and of videos, 1 to 100; [`PackOptions::DEFAULT_JPEG_QUALITY`] by default, and
    /// [`PackOptions::DEFAULT_H264_QUALITY`] for H.264.
    pub quality: Option<u8>,
    /// Encoding of videos.
    pub video: VideoOptions,
    /// Resamples all audio to this rate (Hz) and stores it as 16-bit WAV of one channel; by default its bytes do not
    /// change.
    pub sample_rate: Option<u32>,
    /// Trains a WordPiece vocabulary of this many tokens on the captions, without those of the test split, and writes
    /// it to this file.
    pub tokenizer: Option<(usize, PathBuf)>,
    /// Threads that read and transcode; 0: one per core, and more where the source is a store.
    pub threads: usize,
}

/// A format for images: upright, 8 bits, without alpha. PNG and WebP are lossless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageEncoding {
    Jpeg,
    Png,
    Webp,
}

impl ImageEncoding {
    /// Returns the extension of members in this format.
    pub fn extension(self) -> &'static str {
        match self {
            ImageEncoding::Jpeg => "jpg",
            ImageEncoding::Png => "png",
            ImageEncoding::Webp => "webp",
        }
    }
}

/// Options of video encoding. Without any, only videos that `resize` shrinks are encoded again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct VideoOptions {
    /// Encodes all videos with this codec; H.264 by default.
    pub encode: Option<VideoCodec>,
    /// Maximum frames per second.
    pub fps: Option<f64>,
    /// H.264: maximum keyframe interval, in frames; [`PackOptions::DEFAULT_GOP`] by default. A smaller one makes
    /// seeking to a clip faster and the file larger.
    pub gop: Option<u32>,
}

/// A codec for videos: upright, without audio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VideoCodec {
    /// In MP4.
    H264,
    /// Each frame a JPEG, in Matroska: the largest, and the fastest to decode.
    Mjpeg,
}

impl Default for PackOptions {
    fn default() -> Self {
        PackOptions {
            name: None,
            samples_per_shard: 10_000,
            shard_bytes: 1 << 30,
            test_fraction: 0.0,
            max_corrupt_fraction: 0.01,
            modality: Modality::Image,
            limits: ImageLimits::default(),
            resize: None,
            encode: None,
            quality: None,
            video: VideoOptions::default(),
            sample_rate: None,
            tokenizer: None,
            threads: 0,
        }
    }
}

/// The result of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackReport {
    /// Each data set's path or URL, for `data.train`, and its manifest.
    pub data_sets: Vec<(String, DataSetManifest)>,
    /// Skipped samples, each with the reason.
    pub skipped: Vec<(String, String)>,
    /// Number of complete shards left by an earlier pack.
    pub existing_shards: usize,
    /// The destination already held this very pack.
    pub up_to_date: bool,
}

/// Packs `source` (a folder, or a list of path, label, caption) into the folder `url`; both may be paths or URLs of a
/// store.
///
/// # Errors
/// ExitCode::Usage for a source without samples or a destination with other files, ExitCode::Corrupt where too many
/// samples are corrupt, ExitCode::Disk, ExitCode::Store.
pub fn pack(source: &str, url: &str, options: &PackOptions) -> Result<PackReport> {
    options.check()?;
    let destination = Store::open(url)?;
    if !destination.can_list() {
        return Err(Error::usage(format!("{url}: nothing can be written through a web server; give its store's URL")));
    }
    let mut source = PackSource::open(source, options.modality)?;
    let plan = PackPlan::new(&mut source, &destination, options)?;
    if let Some((size, file)) = &options.tokenizer {
        train_tokenizer(&source.samples[plan.train_range()], *size, file)?;
    }
    let finished = existing::read_finished(&plan)?;
    let up_to_date = finished.is_some();
    let Written { manifests, skipped, existing_shards } = match finished {
        Some(manifests) => {
            let existing_shards = plan.splits.iter().map(|split| split.shards.len()).sum();
            Written { manifests, skipped: Vec::new(), existing_shards }
        }
        None => write(&source, &plan, options)?,
    };
    let location = |split: &PlannedSplit| split.store.display_name("").trim_end_matches('/').to_owned();
    let data_sets = plan.splits.iter().map(location).zip(manifests).collect();
    Ok(PackReport { data_sets, skipped, existing_shards, up_to_date })
}

/// Trains a vocabulary on the captions of samples.
fn train_tokenizer(samples: &[SourceSample], size: usize, file: &Path) -> Result<()> {
    let captions = samples.iter().filter_map(|sample| sample.caption.as_deref());
    let text = caption::train(captions, size)?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    let written = folder.map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(file, text + "\n"));
    written.map_err(|error| Error::usage(format!("{}: {error}; give a file that can be written", file.display())))
}

impl PackOptions {
    /// Default quality of JPEG.
    pub const DEFAULT_JPEG_QUALITY: u8 = 90;
    /// Default quality of H.264: a constant rate factor of 21.
    pub const DEFAULT_H264_QUALITY: u8 = 60;
    /// Default maximum keyframe interval.
    pub const DEFAULT_GOP: u32 = 12;

    fn check(&self) -> Result<()> {
        if self.samples_per_shard == 0 || self.shard_bytes == 0 {
            return Err(Error::usage(
                "a shard needs room for a sample: samples_per_shard and shard_bytes are 1 or more",
            ));
        }
        if !(0.0..1.0).contains(&self.test_fraction) {
            let fraction = self.test_fraction;
            return Err(Error::usage(format!("the test fraction is {fraction}; it is 0 or more and less than 1")));
        }
        match self.modality {
            Modality::Image => self.check_images()?,
            Modality::Audio => self.check_audio()?,
        }
        match &self.name {
            Some(name) if name.is_empty() || name.contains(['/', '{', '}', '\0']) => {
                Err(Error::usage(format!("{name:?} cannot name a data set: no slash, no brace")))
            }
            _ => Ok(()),
        }
    }

    fn check_audio(&self) -> Result<()> {
        let has_image_options = self.resize.is_some() || self.encode.is_some() || self.quality.is_some();
        if has_image_options || self.video != VideoOptions::default() {
            return Err(Error::usage("audio has no size, format or quality to change; give a sample rate, or nothing"));
        }
        match self.sample_rate {
            Some(rate) if !(1000..=384_000).contains(&rate) => {
                Err(Error::usage(format!("the sample rate is {rate}; it is in Hz, 1000 to 384000")))
            }
            _ => Ok(()),
        }
    }

    fn check_images(&self) -> Result<()> {
        if self.sample_rate.is_some() {
            return Err(Error::usage("a sample rate is for audio; pack audio, or leave it out"));
        }
        if self.resize == Some(0) {
            return Err(Error::usage("images cannot be resized to 0 pixels; the shorter side needs 1 or more"));
        }
        self.video.check()?;
        let encodes_video = self.video != VideoOptions::default();
        let encodes_jpeg = self.encode.map_or(self.resize.is_some(), |encode| encode == ImageEncoding::Jpeg);
        match self.quality {
            Some(quality) if !(1..=100).contains(&quality) => {
                Err(Error::usage(format!("the quality is {quality}; it is 1 to 100")))
            }
            Some(_) if !encodes_video && !encodes_jpeg => {
                Err(Error::usage("a quality is for JPEG and videos, and none is encoded; leave it out"))
            }
            _ => Ok(()),
        }
    }
}

/// The samples that were skipped so far.
struct SkippedSamples<'a> {
    named: Vec<(String, String)>,
    total: usize,
    options: &'a PackOptions,
}

impl SkippedSamples<'_> {
    /// Records a skipped sample, and returns an error once there are too many.
    fn push(&mut self, name: String, reason: String) -> Result<()> {
        tracing::warn!("{name} is skipped: {reason}");
        self.named.push((name, reason));
        if self.named.len() as f64 <= self.options.max_corrupt_fraction * self.total as f64 {
            return Ok(());
        }
        let examples = self.named.iter().rev().take(10);
        let examples: Vec<String> = examples.map(|(name, reason)| format!("{name}: {reason}")).collect();
        Err(Error::new(
            ExitCode::Corrupt,
            format!(
                "{} of {} {} are unreadable, at most {:.2} % may be; repair or remove them. {}",
                self.named.len(),
                self.total,
                self.options.modality.plural(),
                self.options.max_corrupt_fraction * 100.0,
                examples.join("; "),
            ),
        ))
    }
}

/// The result of [`write`].
struct Written {
    manifests: Vec<DataSetManifest>,
    skipped: Vec<(String, String)>,
    existing_shards: usize,
}

/// Writes all shards that do not exist yet, then the manifests.
fn write(source: &PackSource, plan: &PackPlan, options: &PackOptions) -> Result<Written> {
    let mut skipped = SkippedSamples { named: Vec::new(), total: source.samples.len(), options };
    // Checks the destinations of all splits before anything is written.
    let prepare = |split| existing::prepare_split(split, &source.samples, &plan.fingerprint);
    let existing: Vec<Vec<Option<ExistingShard>>> = plan.splits.iter().map(prepare).collect::<Result<_>>()?;
    let mut transcoder = Transcoder::new(options);
    let mut records: Vec<Vec<Option<ShardRecord>>> = Vec::new();
    for split in existing {
        let confirm = |shard: Option<ExistingShard>| match shard {
            Some(shard) => confirm_shard(source, &mut transcoder, shard, &mut skipped),
            None => Ok(None),
        };
        records.push(split.into_iter().map(confirm).collect::<Result<_>>()?);
    }
    let existing_shards = records.iter().flatten().flatten().count();
    let mut missing: Vec<(&PlannedSplit, &PlannedShard)> = Vec::new();
    for (split, records) in plan.splits.iter().zip(&records) {
        let shards = split.shards.iter().zip(records).filter(|(_, record)| record.is_none());
        missing.extend(shards.map(|(shard, _)| (split, shard)));
    }
    let mut written = write_shards(source, &missing, options, &mut skipped)?.into_iter();
    let mut manifests = Vec::new();
    for (split, records) in plan.splits.iter().zip(records) {
        let records = records.into_iter().map(|record| record.or_else(|| written.next().expect("a missing shard")));
        let shards: Vec<ShardRecord> = records.flatten().collect();
        let samples = shards.iter().map(|shard| shard.samples).sum();
        if samples == 0 {
            return Err(plan::empty_split_error(&split.store));
        }
        manifests.push(DataSetManifest {
            name: split.name.clone(),
            samples,
            classes: source.classes.clone(),
            shards,
            source: Some(plan.fingerprint.clone()),
        });
    }
    for (split, manifest) in plan.splits.iter().zip(&manifests) {
        let text = serde_json::to_string_pretty(manifest).expect("a manifest is JSON") + "\n";
        write_atomically(&split.store, DataSetManifest::FILE, text.as_bytes())?;
    }
    plan.splits.iter().try_for_each(existing::remove_marker)?;
    Ok(Written { manifests, skipped: skipped.named, existing_shards })
}

/// Returns the record of an existing shard if the samples missing from it are still unreadable.
fn confirm_shard(
    source: &PackSource,
    transcoder: &mut Transcoder,
    shard: ExistingShard,
    skipped: &mut SkippedSamples,
) -> Result<Option<ShardRecord>> {
    let mut reasons = Vec::new();
    for index in shard.missing {
        let sample = &source.samples[index];
        match transcoder.transcode(source, sample)? {
            PackedSample::Members(_) => return Ok(None),
            PackedSample::Skipped(reason) => reasons.push((source.name(sample), reason)),
        }
    }
    reasons.into_iter().try_for_each(|(name, reason)| skipped.push(name, reason))?;
    Ok(Some(shard.record))
}

/// Writes shards, and returns the record of each; none where all of its samples are unreadable.
fn write_shards(
    source: &PackSource,
    shards: &[(&PlannedSplit, &PlannedShard)],
    options: &PackOptions,
    skipped: &mut SkippedSamples,
) -> Result<Vec<Option<ShardRecord>>> {
    let order: Vec<usize> = shards.iter().flat_map(|(_, shard)| shard.samples.clone()).collect();
    let progress = progress_bar(order.len() as u64);
    let records = std::thread::scope(|scope| {
        let receivers = spawn_transcoders(scope, source, &order, options);
        let mut receivers = receivers.iter().cycle();
        let mut records = Vec::new();
        let mut closing: Option<ScopedJoinHandle<Result<ShardRecord>>> = None;
        for (split, shard) in shards {
            let mut writer = ShardWriter::create(&split.store, &shard.file, shard.bytes)?;
            for index in shard.samples.clone() {
                progress.inc(1);
                let sample = &source.samples[index];
                let packed = receivers.next().expect("a thread").recv();
                match packed.expect("threads end after their last sample")? {
                    PackedSample::Members(members) => writer.append_sample(&sample.key, &members)?,
                    PackedSample::Skipped(reason) => skipped.push(source.name(sample), reason)?,
                }
            }
            records.extend(closing.take().map(join).transpose()?.map(Some));
            if writer.samples() == 0 {
                writer.discard()?;
                records.push(None);
            } else {
                closing = Some(scope.spawn(move || writer.finish()));
            }
        }
        records.extend(closing.map(join).transpose()?.map(Some));
        Ok(records)
    });
    progress.finish_and_clear();
    records
}

/// Starts threads that transcode the samples of `order`: thread n of N takes every N-th from the n-th on. The writer
/// takes one sample from each channel in turn, so that the order needs no sorting and no thread runs far ahead.
fn spawn_transcoders<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    source: &'env PackSource,
    order: &'env [usize],
    options: &'env PackOptions,
) -> Vec<Receiver<Result<PackedSample>>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads > 0 { options.threads } else { source.concurrency(cores) };
    let spawn = |thread: usize| {
        let (sender, receiver) = sync_channel(PREFETCH_SAMPLES);
        scope.spawn(move || {
            let mut transcoder = Transcoder::new(options);
            for &index in order.iter().skip(thread).step_by(threads) {
                let packed = transcoder.transcode(source, &source.samples[index]);
                // The writer drops its receivers when it fails.
                if sender.send(packed).is_err() {
                    return;
                }
            }
        });
        receiver
    };
    (0..threads.min(order.len())).map(spawn).collect()
}

fn join(writer: ScopedJoinHandle<Result<ShardRecord>>) -> Result<ShardRecord> {
    writer.join().expect("no panic in a writer")
}

/// Makes a progress bar, which is drawn on a terminal only.
fn progress_bar(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("packing {bar:40} {pos}/{len}, {per_sec}, {eta} left");
    ProgressBar::new(length).with_style(style.expect("a valid template"))
}
