//! Builds one row on a worker thread: reads, decodes and views a sample.

use super::LoaderOptions;
use super::cpu_time::{LoaderStage, StageCpuTime};
use crate::data::caption;
use crate::data::decode::ImageLimits;
use crate::data::modality::SampleDecoder;
use crate::data::shard::Shard;
use crate::error::{Error, ExitCode, Result};
use crate::part::batch::RowSide;
use crate::rng::{Philox, Purpose};
use bytes::{Bytes, BytesMut};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;

/// Maximum number of replacements drawn for one sample; a replacement may itself be undecodable.
const MAX_REPLACEMENTS: usize = 16;

/// A row to build, or several consecutive rows that show the same sample.
pub struct RowJob {
    pub step: u64,
    /// Index of the first row in the step.
    pub first_row: usize,
    pub epoch: u64,
    /// Index of the sample in the mixture.
    pub index: u64,
    /// Repeat of each row.
    pub repeats: Range<u32>,
    /// Memory of the rows in the step, for the views.
    pub output: BytesMut,
    pub source: ByteSource,
}

/// The place of a sample's bytes.
pub enum ByteSource {
    /// A local disk, or a store that is read now.
    Disk,
    /// Memory, or the error of the fetch.
    Fetched(Result<FetchedSample>),
}

/// The fetched bytes of a sample.
pub struct FetchedSample {
    pub shard: Arc<Shard>,
    /// Index of the sample in the shard.
    pub row: usize,
    /// The member that is decoded.
    pub bytes: Bytes,
    /// The `.cls` member, where labels are read.
    pub label: Option<Bytes>,
    /// The `.txt` member, where captions are read.
    pub caption: Option<Bytes>,
    /// Part of the memory budget, returned when the sample is decoded.
    pub(super) _permit: Arc<OwnedSemaphorePermit>,
}

/// The result of a [`RowJob`].
pub struct RowResult {
    pub step: u64,
    /// Index of the first row in the step.
    pub first_row: usize,
    /// Number of rows.
    pub count: usize,
    pub output: BytesMut,
    /// The first row, from which the others differ in `repeat` alone; none for skipped rows.
    pub outcome: Result<Option<RowInfo>>,
    /// Samples that could not be decoded, by index, with the error.
    pub corrupt: Vec<(u64, Error)>,
}

/// A row without its pixels.
#[derive(Clone)]
pub struct RowInfo {
    pub id: u64,
    pub epoch: u64,
    pub repeat: u32,
    pub side: RowSide,
}

/// The views to make of a sample.
struct RowRepeats {
    /// Index of the sample in the mixture; a replacement has another.
    index: u64,
    epoch: u64,
    repeats: Range<u32>,
}

/// The bytes of a sample with their origin.
struct SampleBytes<'a> {
    shard: Arc<Shard>,
    /// Index of the sample in the shard.
    row: usize,
    encoded: EncodedBytes<'a>,
    label: Option<i64>,
    /// Token ids of the caption, where captions are read.
    caption: Option<Vec<i64>>,
}

/// Encoded image, video or audio bytes.
enum EncodedBytes<'a> {
    /// In the worker's own buffer.
    Read(&'a [u8]),
    Fetched(FetchedSample),
}

impl EncodedBytes<'_> {
    fn as_slice(&self) -> &[u8] {
        match self {
            EncodedBytes::Read(bytes) => bytes,
            EncodedBytes::Fetched(fetched) => &fetched.bytes,
        }
    }
}

/// State that a worker reuses from row to row, so that a row allocates nothing.
pub struct WorkerScratch {
    decoder: SampleDecoder,
    files: FileBuffers,
}

/// Buffers for members that are read from a disk; each is as long as the longest member so far.
#[derive(Default)]
struct FileBuffers {
    encoded: Vec<u8>,
    label: Vec<u8>,
    caption: Vec<u8>,
}

impl WorkerScratch {
    /// Makes the state of one worker, with these limits for images.
    pub fn new(limits: ImageLimits) -> WorkerScratch {
        WorkerScratch { decoder: SampleDecoder::new(limits), files: FileBuffers::default() }
    }
}

/// Builds rows; shared by the workers.
pub struct RowBuilder {
    pub options: LoaderOptions,
    /// True if an undecodable sample is replaced (training), false if it is skipped (evaluation).
    pub replace_corrupt: bool,
    pub cpu_time: Arc<StageCpuTime>,
}

impl RowBuilder {
    /// Builds the rows of a job. Only ExitCode::Corrupt marks a sample as corrupt; after an I/O error training must not
    /// continue on other samples.
    pub fn build(&self, scratch: &mut WorkerScratch, job: RowJob) -> RowResult {
        let RowJob { step, first_row, epoch, index, repeats, mut output, source } = job;
        let count = repeats.len();
        let repeats = RowRepeats { index, epoch, repeats };
        let mut corrupt = Vec::new();
        let outcome = self.build_or_replace(scratch, &repeats, source, &mut output, &mut corrupt);
        self.cpu_time.add_rows(count as u64);
        RowResult { step, first_row, count, output, outcome, corrupt }
    }

    fn build_or_replace(
        &self,
        scratch: &mut WorkerScratch,
        repeats: &RowRepeats,
        mut source: ByteSource,
        output: &mut [u8],
        corrupt: &mut Vec<(u64, Error)>,
    ) -> Result<Option<RowInfo>> {
        let mixture = &self.options.mixture;
        let index = repeats.index;
        let mut candidate = index;
        let mut rng = None;
        for _ in 0..=MAX_REPLACEMENTS {
            match self.build_guarded(scratch, repeats, candidate, source, output) {
                Err(error) if error.code == ExitCode::Corrupt => corrupt.push((candidate, error)),
                built => return built.map(Some),
            }
            if !self.replace_corrupt {
                return Ok(None);
            }
            let id = mixture.id(index)?;
            let rng = rng.get_or_insert_with(|| Philox::new(self.options.seed, id, repeats.epoch, Purpose::Replace, 0));
            // The replacement is of the same data set, because sets may differ in modality.
            let range = mixture.set_range(index);
            candidate = range.start + rng.uniform_int(range.end - range.start);
            source = ByteSource::Disk;
        }
        let key = mixture.key(index)?;
        let message = format!("sample {key} and {MAX_REPLACEMENTS} drawn in its place cannot be decoded");
        Err(Error::new(ExitCode::Corrupt, message))
    }

    /// Builds a row and turns a panic of a decoder or a view into an error that names the sample.
    fn build_guarded(
        &self,
        scratch: &mut WorkerScratch,
        repeats: &RowRepeats,
        index: u64,
        source: ByteSource,
        output: &mut [u8],
    ) -> Result<RowInfo> {
        let build = AssertUnwindSafe(|| self.build_row(scratch, repeats, index, source, output));
        catch_unwind(build).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let mixture = &self.options.mixture;
            Err(Error::failed(format!(
                "a worker panicked on sample {} (id {:016x}, epoch {}): {}; this is a bug, please report it",
                mixture.key(index)?,
                mixture.id(index)?,
                repeats.epoch,
                text.unwrap_or("no message")
            )))
        })
    }

    fn build_row(
        &self,
        scratch: &mut WorkerScratch,
        repeats: &RowRepeats,
        index: u64,
        source: ByteSource,
        output: &mut [u8],
    ) -> Result<RowInfo> {
        let RowRepeats { epoch, ref repeats, .. } = *repeats;
        let LoaderOptions { mixture, modality, view, shape, .. } = &self.options;
        let WorkerScratch { decoder, files } = scratch;
        let sample = self.cpu_time.measure(LoaderStage::Fetch, || self.read(index, source, files))?;
        let SampleBytes { shard, row, encoded, label, caption } = sample;
        let location = || format!("{}: {}", shard.name(), shard.key(row));
        self.options.labels.check(label).map_err(|error| error.with_context(location()))?;
        let id = mixture.set_of(index).0.id_of_key(shard.key(row));
        let channels = shape[0] as u32;
        let opened =
            self.cpu_time.measure(LoaderStage::Decode, || decoder.open(encoded.as_slice(), *modality, channels));
        let opened = opened.map_err(|error| error.with_context(location()))?;
        // A view decodes only the region that it shows, so decoding happens inside it and is measured by the decoder.
        let viewed = self.cpu_time.measure(LoaderStage::View, || view(opened, id, epoch, repeats.clone(), output));
        self.cpu_time.reassign(LoaderStage::View, LoaderStage::Decode, decoder.take_cpu_nanoseconds());
        let valid = viewed.map_err(|error| error.with_context(location()))?;
        Ok(RowInfo { id, epoch, repeat: repeats.start, side: RowSide { caption, label, valid } })
    }

    /// Returns the bytes of a sample, checked against the digests of the shard's index.
    fn read<'a>(&self, index: u64, source: ByteSource, files: &'a mut FileBuffers) -> Result<SampleBytes<'a>> {
        if let ByteSource::Fetched(fetched) = source
            && let Some(sample) = self.check_fetched(fetched?)?
        {
            return Ok(sample);
        }
        let (shard, row) = self.options.mixture.find_sample(index)?;
        let encoded = shard.read_into(row, self.options.modality.extensions(), &mut files.encoded)?;
        let label = if self.options.labels.are_read() && shard.has_member(row, "cls") {
            Some(shard.parse_label(row, shard.read_into(row, &["cls"], &mut files.label)?)?)
        } else {
            None
        };
        let caption = if self.options.tokenizer.is_some() {
            caption::caption_member(&shard, row)?;
            Some(self.encode_caption(&shard, row, shard.read_into(row, &["txt"], &mut files.caption)?)?)
        } else {
            None
        };
        Ok(SampleBytes { shard, row, encoded: EncodedBytes::Read(encoded), label, caption })
    }

    /// Checks the digests of fetched members; none where one is damaged. Bits flip in transfers and caches, so that
    /// damaged members are dropped from the cache and are read from the store again.
    fn check_fetched<'a>(&self, fetched: FetchedSample) -> Result<Option<SampleBytes<'a>>> {
        let shard = fetched.shard.clone();
        let row = fetched.row;
        let content = shard.require_member(row, self.options.modality.extensions())?;
        let caption_member = fetched.caption.as_ref().zip(shard.member(row, &["txt"]));
        let members = std::iter::once((&fetched.bytes, content)).chain(caption_member);
        let damaged = members.filter(|(bytes, member)| shard.verify_digest(member, bytes).is_err());
        let damaged: Vec<_> = damaged.map(|(_, member)| member).collect();
        if damaged.is_empty() {
            let label = fetched.label.as_ref().map(|bytes| shard.parse_label(row, bytes)).transpose()?;
            let caption = fetched.caption.as_ref().map(|bytes| self.encode_caption(&shard, row, bytes)).transpose()?;
            return Ok(Some(SampleBytes { shard, row, encoded: EncodedBytes::Fetched(fetched), label, caption }));
        }
        for member in damaged {
            tracing::warn!("{}: the bytes of {} arrived damaged; fetching them again", shard.name(), member.name);
            if let Some(cache) = &self.options.cache {
                cache.invalidate(&shard, member.offset..member.end());
            }
        }
        Ok(None)
    }

    /// Returns the token ids of a caption.
    fn encode_caption(&self, shard: &Shard, row: usize, bytes: &[u8]) -> Result<Vec<i64>> {
        let tokenizer = self.options.tokenizer.as_ref().expect("captions are read");
        let ids = tokenizer.encode_caption(bytes);
        ids.map_err(|error| error.with_context(format!("{}: {}", shard.name(), shard.key(row))))
    }
}
