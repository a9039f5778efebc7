//! The bytes of samples that lie in a store, asked for ahead of the decoders: many requests in flight, neighbours in
//! one request, a bound on the bytes that are here or on their way. Samples on this machine's disks pass straight on to
//! the decoders, which read them.

use super::Source;
use super::row::{Order, Raw};
use crate::data::cache::Cache;
use crate::data::caption;
use crate::data::medium::Medium;
use crate::data::mix::Mix;
use crate::data::shard::Shard;
use crate::data::store;
use crate::fault::{Fault, Result};
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

/// Requests in flight. At 100 ms an answer, 64 of them are 640 samples a second.
const REQUESTS: usize = 64;
/// Steps whose shards have their indexes read at a time.
const AHEAD: usize = 16;
/// Bytes between two members that are fetched along with them rather than in two requests.
const GAP: u64 = 64 << 10;
/// The most bytes of one request.
const RUN: u64 = 8 << 20;
/// The budget counts in units of so many bytes.
const UNIT: u64 = 1 << 10;

/// A sample's bytes, fetched.
pub struct Fetched {
    pub shard: Arc<Shard>,
    pub row: usize,
    /// The member that is decoded.
    pub bytes: Bytes,
    /// The `.cls` member, where labels are wanted.
    pub label: Option<Bytes>,
    /// The `.txt` member, where captions are wanted.
    pub caption: Option<Bytes>,
    /// Its part of the budget, given back when the sample is decoded.
    _held: Arc<OwnedSemaphorePermit>,
}

/// Fetches for one feed.
pub struct Fetcher {
    set: Arc<Mix>,
    /// Of each step, the orders whose samples lie in a store.
    steps: UnboundedSender<Vec<Order>>,
    out: Sender<Order>,
    /// Closed when the feed stops: whatever is under way ends then.
    stop: Arc<Semaphore>,
}

impl Fetcher {
    /// What is fetched and not yet decoded is bounded by the source's bytes.
    pub fn new(source: &Source, labelled: bool, out: Sender<Order>) -> Fetcher {
        let units = (source.prefetch_bytes as u64 / UNIT).clamp(1, u64::from(u32::MAX >> 4)) as u32;
        let (steps, asked) = unbounded();
        let errand = Errand {
            set: source.set.clone(),
            cache: source.cache.clone(),
            medium: source.medium,
            labelled,
            captioned: source.captions.is_some(),
            requests: Arc::new(Semaphore::new(REQUESTS)),
            budget: Arc::new(Semaphore::new(units as usize)),
            units,
            out: out.clone(),
            stop: Arc::new(Semaphore::new(0)),
        };
        let stop = errand.stop.clone();
        errand.clone().spawn(errand.run(asked));
        Fetcher { set: source.set.clone(), steps, out, stop }
    }

    /// What ends everything under way when it is closed.
    pub fn stop(&self) -> Arc<Semaphore> {
        self.stop.clone()
    }

    /// Sends each order of a step on to the decoders, its sample's bytes fetched where they lie in a store.
    pub fn fetch(&self, step: Vec<Order>) {
        let mut far = Vec::new();
        for order in step {
            if self.set.set(order.index).0.remote() {
                far.push(order);
            } else {
                // Workers only go when the feed stops, which the belt sees.
                let _ = self.out.send(order);
            }
        }
        if !far.is_empty() {
            let _ = self.steps.unbounded_send(far);
        }
    }
}

/// What the tasks of a fetcher share.
#[derive(Clone)]
struct Errand {
    set: Arc<Mix>,
    cache: Option<Arc<Cache>>,
    medium: Medium,
    labelled: bool,
    captioned: bool,
    requests: Arc<Semaphore>,
    budget: Arc<Semaphore>,
    /// Units in all.
    units: u32,
    out: Sender<Order>,
    stop: Arc<Semaphore>,
}

impl Errand {
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        store::spawn(async move {
            select(pin!(stop.acquire()), pin!(work)).await;
        });
    }

    /// Fetches step after step: a few have their indexes read side by side, and what a step needs is asked for before
    /// what the next one needs. Without this order the first step of a training, which is waited for, comes after
    /// hundreds that are not.
    async fn run(self, steps: UnboundedReceiver<Vec<Order>>) {
        let mut groups = pin!(steps.map(|step| self.groups(step)).buffered(AHEAD));
        while let Some(groups) = groups.next().await {
            for group in groups {
                let units = group.bytes().div_ceil(UNIT).clamp(1, u64::from(self.units)) as u32;
                // Closed only when the program ends.
                let Ok(held) = self.budget.clone().acquire_many_owned(units).await else { return };
                self.spawn(self.clone().group(group, held));
            }
        }
    }

    /// Samples of a step that are fetched together.
    async fn groups(&self, step: Vec<Order>) -> Vec<Group> {
        let mut shards: BTreeMap<(usize, usize), Vec<Order>> = BTreeMap::new();
        for order in step {
            let (set, index) = self.set.set(order.index);
            let number = self.set.sets().iter().position(|other| std::ptr::eq(other, set)).expect("one of the sets");
            shards.entry((number, set.place(index).0)).or_default().push(order);
        }
        let groups = shards.into_iter().map(|((set, shard), orders)| self.shard(set, shard, orders));
        join_all(groups).await.into_iter().flatten().collect()
    }

    /// Samples of one shard, its index read if it was not yet.
    async fn shard(&self, set: usize, shard: usize, orders: Vec<Order>) -> Vec<Group> {
        let opened = match self.set.sets()[set].open_shard(shard) {
            Some(shard) => Ok(shard),
            None => {
                let sets = self.set.clone();
                let opened = tokio::task::spawn_blocking(move || sets.sets()[set].shard(shard)).await;
                opened.unwrap_or_else(|error| Err(Fault::failed(format!("a shard's index: {error}"))))
            }
        };
        let shard = match opened {
            Ok(shard) => shard,
            Err(fault) => {
                self.fail(orders, &fault);
                return Vec::new();
            }
        };
        let mut wanted = Vec::new();
        for order in orders {
            let (set, index) = self.set.set(order.index);
            let row = set.place(index).1;
            match self.members(&shard, row) {
                Ok((image, beside)) => wanted.push(Wanted { order, row, image, beside }),
                Err(fault) => self.fail(vec![order], &fault),
            }
        }
        wanted.sort_by_key(|wanted| wanted.image.start);
        // As much at a time as leaves room for other shards.
        let most = u64::from(self.units) * UNIT / 8;
        let mut groups = Vec::new();
        let mut group: Vec<Wanted> = Vec::new();
        let mut bytes = 0;
        for sample in wanted {
            if !group.is_empty() && bytes + sample.bytes() > most {
                groups.push(Group::new(shard.clone(), std::mem::take(&mut group)));
                bytes = 0;
            }
            bytes += sample.bytes();
            group.push(sample);
        }
        if !group.is_empty() {
            groups.push(Group::new(shard, group));
        }
        groups
    }

    /// Where the members of a sample lie that a decoder wants.
    fn members(&self, shard: &Shard, row: usize) -> Result<(Range<u64>, Beside)> {
        let image = shard.wanted(row, self.medium.extensions())?;
        let label = if self.labelled { shard.member(row, &["cls"]) } else { None };
        let caption = if self.captioned { Some(caption::member(shard, row)?) } else { None };
        let beside = [label, caption].map(|member| member.map(|member| member.offset..member.end()));
        Ok((image.offset..image.end(), beside))
    }

    /// Fetches samples of one shard, neighbours together.
    async fn group(self, group: Group, held: OwnedSemaphorePermit) {
        let Group { shard, wanted, runs } = group;
        let held = Arc::new(held);
        // Ordered by name alone: of these futures only those are looked at that have something to say, where
        // `try_join_all` looks at all of a short list whenever one moves.
        let under_way: FuturesOrdered<_> = runs.iter().map(|run| self.bytes(&shard, run.clone())).collect();
        let fetched: Vec<Bytes> = match under_way.try_collect().await {
            Ok(fetched) => fetched,
            Err(fault) => return self.fail(wanted.into_iter().map(|wanted| wanted.order).collect(), &fault),
        };
        let cut = |member: &Range<u64>| {
            let at = runs.partition_point(|run| run.start <= member.start) - 1;
            let from = member.start - runs[at].start;
            fetched[at].slice(from as usize..(from + member.end - member.start) as usize)
        };
        for Wanted { mut order, row, image, beside } in wanted {
            let (bytes, [label, caption]) = (cut(&image), beside.map(|member| member.as_ref().map(cut)));
            let (shard, _held) = (shard.clone(), held.clone());
            order.raw = Raw::Fetched(Ok(Fetched { shard, row, bytes, label, caption, _held }));
            let _ = self.out.send(order);
        }
    }

    async fn bytes(&self, shard: &Shard, run: Range<u64>) -> Result<Bytes> {
        let _turn = self.requests.acquire().await.map_err(|_| Fault::failed("the feed stopped"))?;
        match &self.cache {
            Some(cache) => cache.range(shard, run).await,
            None => shard.fetch(run).await,
        }
    }

    fn fail(&self, orders: Vec<Order>, fault: &Fault) {
        for mut order in orders {
            order.raw = Raw::Fetched(Err(fault.clone()));
            let _ = self.out.send(order);
        }
    }
}

/// Where a sample's label and its caption lie, as far as they are wanted and there.
type Beside = [Option<Range<u64>>; 2];

/// Samples of one shard, and the runs of bytes that hold them.
struct Group {
    shard: Arc<Shard>,
    wanted: Vec<Wanted>,
    runs: Vec<Range<u64>>,
}

impl Group {
    fn new(shard: Arc<Shard>, wanted: Vec<Wanted>) -> Group {
        let members =
            wanted.iter().flat_map(|wanted| std::iter::once(&wanted.image).chain(wanted.beside.iter().flatten()));
        let runs = runs(members.cloned().collect());
        Group { shard, wanted, runs }
    }

    fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }
}

/// A sample to be fetched.
struct Wanted {
    order: Order,
    row: usize,
    image: Range<u64>,
    beside: Beside,
}

impl Wanted {
    fn bytes(&self) -> u64 {
        let length = |range: &Range<u64>| range.end - range.start;
        length(&self.image) + self.beside.iter().flatten().map(length).sum::<u64>()
    }
}

/// Members in the order of the shard, those with small gaps between them joined.
fn runs(mut members: Vec<Range<u64>>) -> Vec<Range<u64>> {
    members.sort_by_key(|member| member.start);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for member in members {
        match runs.last_mut() {
            Some(run) if member.start <= run.end + GAP && member.end.max(run.end) - run.start <= RUN => {
                run.end = run.end.max(member.end);
            }
            _ => runs.push(member),
        }
    }
    runs
}
