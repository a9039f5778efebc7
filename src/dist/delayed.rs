//! A world with slow collectives, to show on one machine that computation and communication overlap.

use super::world::{Channel, HeartbeatLink, Pending, ReduceOp, World};
use crate::error::{Error, ExitCode, Result};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// Times of one collective: a reduction (all_reduce, reduce_scatter) or an all_gather.
#[derive(Clone, Debug)]
pub struct CollectiveEvent {
    pub channel: String,
    pub is_all_gather: bool,
    /// Index of the collective within its channel, from 0.
    pub index: usize,
    pub elements: usize,
    pub started: Instant,
    /// When the inner collective finished and the delay began.
    pub arrived: Instant,
    pub finished: Instant,
}

/// A world whose reductions and gathers take `delay` longer than those of the inner world, one after the other as on a
/// slow network, and are recorded.
pub struct DelayedWorld {
    inner: Arc<dyn World>,
    delay: Duration,
    events: Events,
}

type Events = Arc<Mutex<Vec<CollectiveEvent>>>;

impl DelayedWorld {
    /// Wraps a world.
    pub fn new(inner: Arc<dyn World>, delay: Duration) -> Self {
        DelayedWorld { inner, delay, events: Events::default() }
    }
    /// Returns the finished collectives in the order in which they finished.
    pub fn events(&self) -> Vec<CollectiveEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl World for DelayedWorld {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn local_rank(&self) -> usize {
        self.inner.local_rank()
    }
    fn local_size(&self) -> usize {
        self.inner.local_size()
    }
    fn device(&self) -> Device {
        self.inner.device()
    }
    fn open_channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        Ok(Box::new(DelayedChannel::new(self.inner.open_channel(name)?, name, self.delay, self.events.clone())?))
    }
    fn heartbeat_link(&self) -> Result<Option<Box<dyn HeartbeatLink>>> {
        self.inner.heartbeat_link()
    }
    fn leave(&self, deadline: Duration) -> Result<()> {
        self.inner.leave(deadline)
    }
    fn abort(&self, code: ExitCode) -> ! {
        self.inner.abort(code)
    }
    fn set_watchdog(&self, enabled: bool) {
        self.inner.set_watchdog(enabled);
    }
    fn graph_launched(&self, deadline: Duration) -> Result<()> {
        self.inner.graph_launched(deadline)
    }
}

/// A collective of the inner channel on its way through the worker thread.
struct DelayedJob {
    inner: Pending,
    /// The collective to delay and record; `None` for one that is only passed on.
    start: Option<CollectiveStart>,
    reply: Sender<Result<Tensor>>,
}

/// The properties of a collective that are known when it starts.
#[derive(Clone, Copy)]
struct CollectiveStart {
    is_all_gather: bool,
    index: usize,
    elements: usize,
    started: Instant,
}

struct DelayedChannel {
    inner: Box<dyn Channel>,
    name: String,
    jobs: Sender<DelayedJob>,
    collectives: usize,
}

impl DelayedChannel {
    fn new(inner: Box<dyn Channel>, name: &str, delay: Duration, events: Events) -> Result<Self> {
        let (jobs, queue) = unbounded();
        let channel = name.to_string();
        std::thread::Builder::new()
            .name(format!("delayed {name}"))
            .spawn(move || run_jobs(queue, &channel, delay, &events))
            .map_err(|error| Error::failed(format!("channel {name}: cannot start its thread: {error}.")))?;
        Ok(DelayedChannel { inner, name: name.to_string(), jobs, collectives: 0 })
    }
    /// Describes a collective that starts now.
    fn start(&mut self, tensor: &Tensor, is_all_gather: bool) -> Option<CollectiveStart> {
        let index = self.collectives;
        self.collectives += 1;
        Some(CollectiveStart { is_all_gather, index, elements: tensor.numel(), started: Instant::now() })
    }
    fn submit(&mut self, inner: Pending, start: Option<CollectiveStart>) -> Pending {
        let (reply, result) = bounded(1);
        // The worker lives as long as `jobs`; a dead one closes the reply channel, which `wait` reports.
        let _ = self.jobs.send(DelayedJob { inner, start, reply });
        Pending::from_receiver(format!("channel {} (delayed): a collective", self.name), result)
    }
}

fn run_jobs(queue: Receiver<DelayedJob>, channel: &str, delay: Duration, events: &Events) {
    for DelayedJob { inner, start, reply } in queue {
        let result = inner.wait(Duration::MAX);
        if let Some(CollectiveStart { is_all_gather, index, elements, started }) = start {
            let arrived = Instant::now();
            std::thread::sleep(delay);
            events.lock().unwrap_or_else(PoisonError::into_inner).push(CollectiveEvent {
                channel: channel.to_string(),
                is_all_gather,
                index,
                elements,
                started,
                arrived,
                finished: Instant::now(),
            });
        }
        // The caller may have stopped waiting.
        let _ = reply.send(result);
    }
}

impl Channel for DelayedChannel {
    fn all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Pending {
        let start = self.start(tensor, false);
        let inner = self.inner.all_reduce(tensor, op);
        self.submit(inner, start)
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        let start = self.start(tensor, true);
        let inner = self.inner.all_gather(tensor);
        self.submit(inner, start)
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        let start = self.start(tensor, false);
        let inner = self.inner.reduce_scatter(tensor);
        self.submit(inner, start)
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        let inner = self.inner.broadcast(tensor, root);
        self.submit(inner, None)
    }
    fn barrier(&mut self) -> Pending {
        let inner = self.inner.barrier();
        self.submit(inner, None)
    }
    fn abort(&mut self) {
        self.inner.abort();
    }
}
