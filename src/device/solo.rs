//! One rank, or N as threads of one process.

use super::channel::{Lane, check, part_shape};
use super::wire::{Booth, Gate, Hub};
use super::world::{Channel, Pending, Reduce, World};
use crate::fault::{Code, Fault, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// How long ranks that are threads wait for each other when they open a channel.
const OPENING: Duration = Duration::from_secs(120);

/// A world of one rank: every collective is the identity.
pub struct Solo {
    device: Device,
}

impl Solo {
    pub fn new(device: Device) -> Self {
        Solo { device }
    }
}

impl World for Solo {
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
    fn channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        Ok(Box::new(Alone { name: name.to_string(), aborted: false }))
    }
    fn abort(&self, code: Code) -> ! {
        std::process::exit(code as i32)
    }
}

/// The channel of a rank that has nobody to talk to. It refuses what the others refuse.
struct Alone {
    name: String,
    aborted: bool,
}

impl Alone {
    fn ready(&self, result: Result<Tensor>) -> Pending {
        let result = if self.aborted { Err(Fault::failed("the channel was given up.")) } else { result };
        Pending::ready(result.map_err(|fault| fault.at(format!("channel {}", self.name))))
    }
}

impl Channel for Alone {
    fn all_reduce(&mut self, tensor: &Tensor, _how: Reduce) -> Pending {
        self.ready(check(tensor, true).map(|()| tensor.shallow_clone()))
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        self.ready(check(tensor, false).and_then(|()| Ok(tensor.detach().copy().f_unsqueeze(0)?)))
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        let result = part_shape(tensor, 1).and_then(|_| check(tensor, true));
        self.ready(result.map(|()| tensor.detach().copy()))
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        let result = check(tensor, false).and_then(|()| match root {
            0 => Ok(tensor.shallow_clone()),
            _ => Err(Fault::failed(format!("broadcast from rank {root}, but there are 1 ranks."))),
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

/// Runs `act` as `size` ranks, each a thread with its own world, and returns their results in rank order. When a rank
/// panics, the channels of the others end with a fault and the first panic is passed on.
pub fn threads<R: Send>(size: usize, act: impl Fn(Arc<dyn World>) -> R + Sync) -> Vec<R> {
    let hall = Arc::new(Hall { size, hubs: Mutex::default(), lost: Gate::default(), first: Mutex::new(None) });
    let results = std::thread::scope(|scope| {
        let start = |rank| {
            let (hall, act) = (hall.clone(), &act);
            scope.spawn(move || {
                let world = Arc::new(Threaded { rank, hall: hall.clone(), opened: AtomicUsize::new(0) });
                catch_unwind(AssertUnwindSafe(|| act(world))).map_err(|panic| hall.lose(panic)).ok()
            })
        };
        let ranks: Vec<_> = (0..size).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|panic| resume_unwind(panic))).collect::<Vec<_>>()
    });
    if let Some(panic) = hall.first.lock().unwrap_or_else(PoisonError::into_inner).take() {
        resume_unwind(panic);
    }
    results.into_iter().flatten().collect()
}

/// What the threads of one world share.
struct Hall {
    size: usize,
    /// One per channel, in the order of opening.
    hubs: Mutex<Vec<Arc<Hub>>>,
    /// Closes when a rank is lost.
    lost: Gate,
    first: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Hall {
    fn lose(&self, panic: Box<dyn Any + Send>) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        self.lost.close();
    }
}

struct Threaded {
    rank: usize,
    hall: Arc<Hall>,
    opened: AtomicUsize,
}

impl World for Threaded {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.hall.size
    }
    fn local_rank(&self) -> usize {
        self.rank
    }
    fn local_size(&self) -> usize {
        self.hall.size
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        let number = self.opened.fetch_add(1, Ordering::SeqCst);
        let hub = {
            let mut hubs = self.hall.hubs.lock().unwrap_or_else(PoisonError::into_inner);
            while hubs.len() <= number {
                hubs.push(Arc::new(Hub::new(self.hall.size)));
            }
            hubs[number].clone()
        };
        let gate = Gate::default();
        let booth = Booth { hub, rank: self.rank, size: self.hall.size, gates: [gate.clone(), self.hall.lost.clone()] };
        Ok(Box::new(Lane::open(name, Box::new(booth), gate, OPENING)?))
    }
    /// A thread cannot end the others' process without ending the caller's: it panics, which frees them.
    fn abort(&self, code: Code) -> ! {
        panic_any(Fault::new(code, format!("rank {} ended the world with code {}.", self.rank, code as u8)))
    }
}
