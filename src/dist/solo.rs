//! Worlds within one process: one rank, or N ranks as threads.

use super::channel::{TransportChannel, check_kind, shard_shape};
use super::transport::{CancelFlag, Rendezvous, ThreadTransport};
use super::world::{Channel, Pending, ReduceOp, World};
use crate::error::{Error, ExitCode, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Maximum time for all threads to open a channel.
const OPEN_TIMEOUT: Duration = Duration::from_secs(120);

/// A world of one rank. Every collective is the identity.
pub struct SoloWorld {
    device: Device,
}

impl SoloWorld {
    /// Creates a world on a device.
    pub fn new(device: Device) -> Self {
        SoloWorld { device }
    }
}

impl World for SoloWorld {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn local_rank(&self) -> usize {
        0
    }
    fn local_size(&self) -> usize {
        1
    }
    fn device(&self) -> Device {
        self.device
    }
    fn open_channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        Ok(Box::new(SoloChannel { name: name.to_string(), aborted: false }))
    }
    fn abort(&self, code: ExitCode) -> ! {
        std::process::exit(code as i32)
    }
}

/// The channel of a single rank. It refuses what the other channels refuse.
struct SoloChannel {
    name: String,
    aborted: bool,
}

impl SoloChannel {
    fn ready(&self, result: Result<Tensor>) -> Pending {
        let result = if self.aborted { Err(Error::failed("the channel was aborted.")) } else { result };
        Pending::ready(result.map_err(|error| error.with_context(format!("channel {}", self.name))))
    }
}

impl Channel for SoloChannel {
    fn all_reduce(&mut self, tensor: &Tensor, _op: ReduceOp) -> Pending {
        self.ready(check_kind(tensor, true).map(|()| tensor.shallow_clone()))
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        self.ready(check_kind(tensor, false).and_then(|()| Ok(tensor.detach().copy().f_unsqueeze(0)?)))
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        let checked = shard_shape(tensor, 1).and_then(|_| check_kind(tensor, true));
        self.ready(checked.map(|()| tensor.detach().copy()))
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        let result = check_kind(tensor, false).and_then(|()| match root {
            0 => Ok(tensor.shallow_clone()),
            _ => Err(Error::failed(format!("broadcast from rank {root}, but there is only rank 0."))),
        });
        self.ready(result)
    }
    fn barrier(&mut self) -> Pending {
        self.ready(Ok(Tensor::zeros([0], (Kind::Uint8, Device::Cpu))))
    }
    fn abort(&mut self) {
        self.aborted = true;
    }
}

/// Runs `body` as `size` ranks, each a thread with its own world, and returns their results in rank order.
///
/// # Panics
/// If a rank panics: the channels of the others then return errors, and the first panic is resumed here.
pub fn run_on_threads<R: Send>(size: usize, body: impl Fn(Arc<dyn World>) -> R + Sync) -> Vec<R> {
    let state = Arc::new(ThreadWorldState {
        size,
        rendezvous: Mutex::default(),
        panicked: CancelFlag::default(),
        first_panic: Mutex::new(None),
    });
    let results: Vec<Option<R>> = std::thread::scope(|scope| {
        let start = |rank| {
            let state = &state;
            let body = &body;
            scope.spawn(move || {
                let world = Arc::new(ThreadWorld { rank, state: state.clone(), opened: AtomicUsize::new(0) });
                catch_unwind(AssertUnwindSafe(|| body(world))).map_err(|panic| state.record_panic(panic)).ok()
            })
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    if let Some(panic) = state.first_panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
        resume_unwind(panic);
    }
    results.into_iter().flatten().collect()
}

/// State that the threads of one world share.
struct ThreadWorldState {
    size: usize,
    /// One per channel, in the order of opening.
    rendezvous: Mutex<Vec<Arc<Rendezvous>>>,
    /// Set when a rank panics.
    panicked: CancelFlag,
    first_panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl ThreadWorldState {
    fn record_panic(&self, panic: Box<dyn Any + Send>) {
        self.first_panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        self.panicked.set();
    }

    /// Returns the meeting point of the channel that each rank opens as its `index`-th.
    fn rendezvous_at(&self, index: usize) -> Arc<Rendezvous> {
        let mut rendezvous = self.rendezvous.lock().unwrap_or_else(PoisonError::into_inner);
        while rendezvous.len() <= index {
            rendezvous.push(Arc::new(Rendezvous::new(self.size)));
        }
        rendezvous[index].clone()
    }
}

struct ThreadWorld {
    rank: usize,
    state: Arc<ThreadWorldState>,
    /// Number of channels that this rank has opened.
    opened: AtomicUsize,
}

impl World for ThreadWorld {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.state.size
    }
    fn local_rank(&self) -> usize {
        self.rank
    }
    fn local_size(&self) -> usize {
        self.state.size
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn open_channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        let index = self.opened.fetch_add(1, Ordering::SeqCst);
        let cancel = CancelFlag::default();
        let transport = ThreadTransport {
            rendezvous: self.state.rendezvous_at(index),
            rank: self.rank,
            size: self.state.size,
            cancel_flags: [cancel.clone(), self.state.panicked.clone()],
        };
        Ok(Box::new(TransportChannel::open(name, Box::new(transport), cancel, OPEN_TIMEOUT)?))
    }
    /// Panics, which also ends the other ranks: a thread cannot end the process without ending the caller.
    fn abort(&self, code: ExitCode) -> ! {
        panic_any(Error::new(code, format!("rank {} ended the world with code {}.", self.rank, code as u8)))
    }
}
