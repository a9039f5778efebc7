//! Fetches the bytes of samples in a store ahead of the decoders: many requests in flight, adjacent members joined into
//! one request, the bytes in flight bounded. Samples on a local disk go straight to the decoders, which read them.

use super::LoaderOptions;
use super::row::{ByteSource, FetchedSample, RowJob};
use crate::data::cache::Cache;
use crate::data::caption;
use crate::data::mixture::Mixture;
use crate::data::modality::Modality;
use crate::data::shard::Shard;
use crate::data::store;
use crate::error::{Error, Result};
use bytes::Bytes;
use crossbeam_channel::Sender;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use futures::future::{join_all, select};
use futures::stream::{FuturesOrdered, StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum number of requests in flight. At a latency of 100 ms, 64 requests are 640 samples a second.
const MAX_REQUESTS: usize = 64;
/// Number of steps whose shard indices are read concurrently.
const PREFETCH_STEPS: usize = 16;
/// Maximum bytes between two members that are fetched in one request, the gap included.
const MAX_GAP: u64 = 64 << 10;
/// Maximum bytes of a request that joins members.
const MAX_REQUEST_BYTES: u64 = 8 << 20;
/// Bytes of one unit of the memory budget.
const BUDGET_UNIT: u64 = 1 << 10;

/// Fetches the samples of one data loader.
pub struct Fetcher {
    mixture: Arc<Mixture>,
    /// The jobs of each step whose samples are in a store.
    steps: UnboundedSender<Vec<RowJob>>,
    output: Sender<RowJob>,
    /// Closed when the loader stops, which cancels every task.
    stop: Arc<Semaphore>,
}

impl Fetcher {
    /// Starts the fetch tasks. Bytes that are fetched and not yet decoded are bounded by `options.prefetch_bytes`.
    pub fn new(options: &LoaderOptions, output: Sender<RowJob>) -> Fetcher {
        let units = (options.prefetch_bytes as u64 / BUDGET_UNIT).clamp(1, u64::from(u32::MAX >> 4)) as u32;
        let (steps, receiver) = unbounded();
        let context = FetchContext {
            mixture: options.mixture.clone(),
            cache: options.cache.clone(),
            modality: options.modality,
            has_labels: options.labels.are_read(),
            has_captions: options.tokenizer.is_some(),
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            budget: Arc::new(Semaphore::new(units as usize)),
            units,
            output: output.clone(),
            stop: Arc::new(Semaphore::new(0)),
        };
        let stop = context.stop.clone();
        context.clone().spawn(context.run(receiver));
        Fetcher { mixture: options.mixture.clone(), steps, output, stop }
    }

    /// Returns the semaphore that cancels every task when it is closed.
    pub fn stop_signal(&self) -> Arc<Semaphore> {
        self.stop.clone()
    }

    /// Passes the jobs of a step on to the decoders, after their samples' bytes were fetched where they are in a store.
    pub fn fetch(&self, step: Vec<RowJob>) {
        let mut remote = Vec::new();
        for job in step {
            if self.mixture.set_of(job.index).0.is_remote() {
                remote.push(job);
            } else {
                // The workers are gone only when the loader stops, which the batcher notices itself.
                let _ = self.output.send(job);
            }
        }
        if !remote.is_empty() {
            let _ = self.steps.unbounded_send(remote);
        }
    }
}

/// State that the tasks of a fetcher share.
#[derive(Clone)]
struct FetchContext {
    mixture: Arc<Mixture>,
    cache: Option<Arc<Cache>>,
    modality: Modality,
    has_labels: bool,
    has_captions: bool,
    requests: Arc<Semaphore>,
    budget: Arc<Semaphore>,
    /// Size of the budget in units.
    units: u32,
    output: Sender<RowJob>,
    stop: Arc<Semaphore>,
}

impl FetchContext {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        store::spawn(async move {
            select(pin!(stop.acquire()), pin!(task)).await;
        });
    }

    /// Fetches step after step: the indices of several steps are read concurrently, but the bytes of a step are
    /// requested before those of the next one. Otherwise the first step of a training would arrive after hundreds of
    /// later ones.
    async fn run(self, steps: UnboundedReceiver<Vec<RowJob>>) {
        let mut groups = pin!(steps.map(|step| self.group_step(step)).buffered(PREFETCH_STEPS));
        while let Some(groups) = groups.next().await {
            for group in groups {
                let units = group.bytes().div_ceil(BUDGET_UNIT).clamp(1, u64::from(self.units)) as u32;
                // The budget is closed only when the program ends.
                let Ok(permit) = self.budget.clone().acquire_many_owned(units).await else { return };
                self.spawn(self.clone().fetch_group(group, permit));
            }
        }
    }

    /// Groups the jobs of a step into samples that are fetched together.
    async fn group_step(&self, step: Vec<RowJob>) -> Vec<FetchGroup> {
        let mut shards: BTreeMap<(usize, usize), Vec<RowJob>> = BTreeMap::new();
        for job in step {
            let set_index = self.mixture.set_index(job.index);
            let (set, index) = self.mixture.set_of(job.index);
            let (shard, _) = set.locate(index);
            shards.entry((set_index, shard)).or_default().push(job);
        }
        let groups = shards.into_iter().map(|((set, shard), jobs)| self.group_shard(set, shard, jobs));
        join_all(groups).await.into_iter().flatten().collect()
    }

    /// Groups jobs of one shard, after its index was read if it is not in memory. A group leaves most of the budget to
    /// other shards.
    async fn group_shard(&self, set: usize, shard: usize, jobs: Vec<RowJob>) -> Vec<FetchGroup> {
        let shard = match self.open_shard(set, shard).await {
            Ok(shard) => shard,
            Err(error) => {
                self.fail(jobs, &error);
                return Vec::new();
            }
        };
        let mut items = Vec::new();
        for job in jobs {
            let (set, index) = self.mixture.set_of(job.index);
            let (_, row) = set.locate(index);
            match self.locate_members(&shard, row) {
                Ok((content, side)) => items.push(FetchItem { job, row, content, side }),
                Err(error) => self.fail(vec![job], &error),
            }
        }
        items.sort_by_key(|item| item.content.start);
        let max_group_bytes = u64::from(self.units) * BUDGET_UNIT / 8;
        let mut groups = Vec::new();
        let mut group: Vec<FetchItem> = Vec::new();
        let mut bytes = 0;
        for item in items {
            if !group.is_empty() && bytes + item.bytes() > max_group_bytes {
                groups.push(FetchGroup::new(shard.clone(), std::mem::take(&mut group)));
                bytes = 0;
            }
            bytes += item.bytes();
            group.push(item);
        }
        if !group.is_empty() {
            groups.push(FetchGroup::new(shard, group));
        }
        groups
    }

    /// Returns a shard; its index is read on a blocking thread if it is not in memory.
    async fn open_shard(&self, set: usize, shard: usize) -> Result<Arc<Shard>> {
        if let Some(shard) = self.mixture.sets()[set].cached_shard(shard) {
            return Ok(shard);
        }
        let mixture = self.mixture.clone();
        let opened = tokio::task::spawn_blocking(move || mixture.sets()[set].shard(shard)).await;
        opened.unwrap_or_else(|error| Err(Error::failed(format!("a shard's index: {error}"))))
    }

    /// Returns the byte ranges of the members of a sample that are read.
    fn locate_members(&self, shard: &Shard, row: usize) -> Result<(Range<u64>, SideRanges)> {
        let content = shard.require_member(row, self.modality.extensions())?;
        let label = if self.has_labels { shard.member(row, &["cls"]) } else { None };
        let caption = if self.has_captions { Some(caption::caption_member(shard, row)?) } else { None };
        let side = SideRanges {
            label: label.map(|member| member.offset..member.end()),
            caption: caption.map(|member| member.offset..member.end()),
        };
        Ok((content.offset..content.end(), side))
    }

    /// Fetches the samples of a group and sends their jobs to the decoders.
    async fn fetch_group(self, group: FetchGroup, permit: OwnedSemaphorePermit) {
        let FetchGroup { shard, items, ranges } = group;
        let permit = Arc::new(permit);
        // `FuturesOrdered` polls only futures that were woken; `try_join_all` polls all of a short list every time.
        let in_flight: FuturesOrdered<_> = ranges.iter().map(|range| self.fetch_range(&shard, range.clone())).collect();
        let fetched: Vec<Bytes> = match in_flight.try_collect().await {
            Ok(fetched) => fetched,
            Err(error) => return self.fail(items.into_iter().map(|item| item.job).collect(), &error),
        };
        let slice = |member: &Range<u64>| {
            let index = ranges.partition_point(|range| range.start <= member.start) - 1;
            let start = member.start - ranges[index].start;
            fetched[index].slice(start as usize..(start + member.end - member.start) as usize)
        };
        for FetchItem { mut job, row, content, side } in items {
            job.source = ByteSource::Fetched(Ok(FetchedSample {
                shard: shard.clone(),
                row,
                bytes: slice(&content),
                label: side.label.as_ref().map(slice),
                caption: side.caption.as_ref().map(slice),
                _permit: permit.clone(),
            }));
            let _ = self.output.send(job);
        }
    }

    async fn fetch_range(&self, shard: &Shard, range: Range<u64>) -> Result<Bytes> {
        let _permit = self.requests.acquire().await.map_err(|_| Error::failed("the data loader stopped"))?;
        match &self.cache {
            Some(cache) => cache.get_range(shard, range).await,
            None => shard.fetch(range).await,
        }
    }

    /// Sends jobs on with the error that kept their bytes from being fetched.
    fn fail(&self, jobs: Vec<RowJob>, error: &Error) {
        for mut job in jobs {
            job.source = ByteSource::Fetched(Err(error.clone()));
            let _ = self.output.send(job);
        }
    }
}

/// Byte ranges of a sample's label and caption, where they are read and exist.
struct SideRanges {
    label: Option<Range<u64>>,
    caption: Option<Range<u64>>,
}

impl SideRanges {
    fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.label.iter().chain(&self.caption)
    }
}

/// Samples of one shard, and the byte ranges that contain them.
struct FetchGroup {
    shard: Arc<Shard>,
    items: Vec<FetchItem>,
    ranges: Vec<Range<u64>>,
}

impl FetchGroup {
    fn new(shard: Arc<Shard>, items: Vec<FetchItem>) -> FetchGroup {
        let members = items.iter().flat_map(|item| std::iter::once(&item.content).chain(item.side.iter()));
        let ranges = coalesce(members.cloned().collect());
        FetchGroup { shard, items, ranges }
    }

    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }
}

/// A sample to fetch.
struct FetchItem {
    job: RowJob,
    /// Index of the sample in the shard.
    row: usize,
    /// Byte range of the member that is decoded.
    content: Range<u64>,
    side: SideRanges,
}

impl FetchItem {
    fn bytes(&self) -> u64 {
        let members = std::iter::once(&self.content).chain(self.side.iter());
        members.map(|range| range.end - range.start).sum()
    }
}

/// Sorts byte ranges and joins those with small gaps between them.
fn coalesce(mut members: Vec<Range<u64>>) -> Vec<Range<u64>> {
    members.sort_by_key(|member| member.start);
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for member in members {
        match ranges.last_mut() {
            Some(range)
                if member.start <= range.end + MAX_GAP
                    && member.end.max(range.end) - range.start <= MAX_REQUEST_BYTES =>
            {
                range.end = range.end.max(member.end);
            }
            _ => ranges.push(member),
        }
    }
    ranges
}
