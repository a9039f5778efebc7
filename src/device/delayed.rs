//! A world whose reductions take their time: what shows, on one machine, that computing and reducing overlap.

use super::pulse::Ring;
use super::world::{Channel, Pending, Reduce, World};
use crate::fault::{Code, Fault, Result};
use crossbeam_channel::{Sender, bounded, unbounded};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// One collective as it happened: a reduction (all_reduce, reduce_scatter) or an all_gather.
#[derive(Clone, Debug)]
pub struct Event {
    pub channel: String,
    /// Whether it is an all_gather.
    pub gathers: bool,
    /// Counts those of the channel from 0.
    pub number: usize,
    pub elements: usize,
    pub started: Instant,
    /// When all ranks' numbers were here, and the delay began.
    pub came: Instant,
    pub finished: Instant,
}

/// Another world whose every reduction and gathering takes `delay` longer, one after the other as on a slow network, and is written
/// down.
pub struct Delayed {
    inner: Arc<dyn World>,
    delay: Duration,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Delayed {
    pub fn new(inner: Arc<dyn World>, delay: Duration) -> Self {
        Delayed { inner, delay, events: Arc::default() }
    }
    /// The collectives that have finished so far, in the order in which they did.
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl World for Delayed {
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
    fn channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        Ok(Box::new(Slow::start(self.inner.channel(name)?, name, self.delay, self.events.clone())?))
    }
    fn ring(&self) -> Result<Option<Box<dyn Ring>>> {
        self.inner.ring()
    }
    fn leave(&self, deadline: Duration) -> Result<()> {
        self.inner.leave(deadline)
    }
    fn abort(&self, code: Code) -> ! {
        self.inner.abort(code)
    }
    fn look(&self, on: bool) {
        self.inner.look(on);
    }
    fn launched(&self, deadline: Duration) -> Result<()> {
        self.inner.launched(deadline)
    }
}

/// A collective of the inner channel on its way through the slow worker.
struct Parcel {
    inner: Pending,
    /// What is known of it so far, where it is noted.
    noted: Option<Noted>,
    reply: Sender<Result<Tensor>>,
}

#[derive(Clone, Copy)]
struct Noted {
    gathers: bool,
    number: usize,
    elements: usize,
    started: Instant,
}

struct Slow {
    inner: Box<dyn Channel>,
    name: String,
    parcels: Sender<Parcel>,
    collectives: usize,
}

impl Slow {
    fn start(
        inner: Box<dyn Channel>,
        name: &str,
        delay: Duration,
        events: Arc<Mutex<Vec<Event>>>,
    ) -> Result<Self, Fault> {
        let (parcels, arrivals) = unbounded::<Parcel>();
        let channel = name.to_string();
        let worker = move || {
            for Parcel { inner, noted, reply } in arrivals {
                let result = inner.wait(Duration::MAX);
                if let Some(Noted { gathers, number, elements, started }) = noted {
                    let came = Instant::now();
                    std::thread::sleep(delay);
                    let (channel, finished) = (channel.clone(), Instant::now());
                    let event = Event { channel, gathers, number, elements, started, came, finished };
                    events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
                }
                // The caller may have stopped waiting; that is its right.
                let _ = reply.send(result);
            }
        };
        let thread = std::thread::Builder::new().name(format!("slow {name}")).spawn(worker);
        thread.map_err(|error| Fault::failed(format!("channel {name}: no thread for it: {error}.")))?;
        Ok(Slow { inner, name: name.to_string(), parcels, collectives: 0 })
    }
    /// What is noted of a collective that starts now.
    fn note(&mut self, tensor: &Tensor, gathers: bool) -> Option<Noted> {
        self.collectives += 1;
        let (number, elements, started) = (self.collectives - 1, tensor.numel(), Instant::now());
        Some(Noted { gathers, number, elements, started })
    }
    fn pass(&mut self, inner: Pending, noted: Option<Noted>) -> Pending {
        let (reply, result) = bounded(1);
        // The worker lives as long as `parcels`; were it gone, the closed reply channel would say so in `wait`.
        let _ = self.parcels.send(Parcel { inner, noted, reply });
        Pending::from_worker(format!("channel {} (delayed): a collective", self.name), result)
    }
}

impl Channel for Slow {
    fn all_reduce(&mut self, tensor: &Tensor, how: Reduce) -> Pending {
        let noted = self.note(tensor, false);
        let inner = self.inner.all_reduce(tensor, how);
        self.pass(inner, noted)
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        let noted = self.note(tensor, true);
        let inner = self.inner.all_gather(tensor);
        self.pass(inner, noted)
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        let noted = self.note(tensor, false);
        let inner = self.inner.reduce_scatter(tensor);
        self.pass(inner, noted)
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        let inner = self.inner.broadcast(tensor, root);
        self.pass(inner, None)
    }
    fn barrier(&mut self) -> Pending {
        let inner = self.inner.barrier();
        self.pass(inner, None)
    }
    fn abort(&mut self) {
        self.inner.abort();
    }
}
