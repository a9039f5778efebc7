//! Ranks with a GPU each: tensors on it are reduced by NCCL on a stream of their own, everything else travels as before.
//!
//! A channel's communicator is made when the first tensor of a GPU comes its way. A collective is queued behind what the
//! caller's stream has been given so far, and [`Pending::wait`] queues the caller's stream behind it: the calling thread
//! waits for nothing. Lost ranks and errors are the [`watchdog`]'s matter. Unlike on other wires, sums are taken in NCCL's
//! order (the same on every rank and, with NCCL_ALGO pinned, in every run), bf16 is summed as NCCL does, and ranks that
//! call different collectives are not told so before the deadline.
//!
//! A collective that is queued behind a stream whose work is being captured becomes part of that graph, its stream forked
//! from the captured one and joined again where it is waited for. What is captured never finishes, so nobody watches it:
//! launches are watched instead, as wholes.

mod comm;
pub mod library;
mod watchdog;

use super::pulse::Ring;
use super::world::{Channel, Pending, Reduce, World};
use crate::bridge::cuda::{self, Event, Priority, Stream};
use crate::fault::{Code, Fault, Result};
use comm::{Comm, Held};
use library::{Handle, ID_BYTES, Id, Library};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use watchdog::{Watchdog, Watched};

/// How long ranks wait for each other when a communicator is made.
const OPENING: Duration = Duration::from_secs(600);

/// Another world whose ranks have a GPU each.
pub struct Nccl {
    inner: Arc<dyn World>,
    device: usize,
    watchdog: Watchdog,
    /// Of all channels.
    comms: Comms,
}

type Comms = Arc<Mutex<Vec<Weak<Comm>>>>;

impl Nccl {
    /// Gives every rank of a host its own GPU, by local rank. A fault where there are more ranks than GPUs, or where NCCL
    /// cannot be used.
    pub fn over(inner: Arc<dyn World>) -> Result<Nccl> {
        let (rank, ranks, devices) = (inner.local_rank(), inner.local_size(), tch::Cuda::device_count() as usize);
        if ranks > devices {
            return Err(Fault::usage(format!(
                "{ranks} ranks on a host with {devices} GPUs; wanted one each: start at most {devices} on a host, or set \
                 CUDA_VISIBLE_DEVICES to nothing to compute on CPUs"
            )));
        }
        Nccl::on(inner, rank)
    }

    /// Gives this rank a GPU by number. Ranks of a host want one each: NCCL refuses two on one, unless each is told that
    /// its host is another (NCCL_HOSTID), which serves tests and nothing else.
    pub fn on(inner: Arc<dyn World>, device: usize) -> Result<Nccl> {
        let version = Library::get()?.named()?;
        tracing::debug!("rank {} computes on GPU {device}", inner.rank());
        if inner.rank() == 0 {
            tracing::info!("{} ranks on GPUs, NCCL {version}", inner.size());
        }
        cuda::use_device(device)?;
        Ok(Nccl { watchdog: Watchdog::start(inner.clone())?, inner, device, comms: Comms::default() })
    }
}

impl World for Nccl {
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
        Device::Cuda(self.device)
    }
    fn channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        Ok(Box::new(Both {
            name: name.to_owned(),
            host: self.inner.channel(name)?,
            line: None,
            rank: self.rank(),
            size: self.size(),
            device: self.device,
            watchdog: self.watchdog.clone(),
            comms: self.comms.clone(),
        }))
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
        self.watchdog.look(on);
    }
    fn launched(&self, deadline: Duration) -> Result<()> {
        let comms = self.comms.lock().unwrap_or_else(PoisonError::into_inner);
        let comms: Vec<_> = comms.iter().filter_map(Weak::upgrade).filter(|comm| comm.captured()).collect();
        if comms.is_empty() {
            return Ok(());
        }
        let mut done = Event::new()?;
        done.record(&Stream::current(self.device)?)?;
        let what = "a step with its reductions, launched as a graph".into();
        self.watchdog.watch(Watched { what, done, comms, since: Instant::now(), deadline });
        Ok(())
    }
}

/// A communicator and its stream.
struct Line {
    comm: Arc<Comm>,
    stream: Stream,
}

/// A channel for tensors of either kind.
struct Both {
    name: String,
    host: Box<dyn Channel>,
    line: Option<Line>,
    rank: usize,
    size: usize,
    device: usize,
    watchdog: Watchdog,
    comms: Comms,
}

/// ncclDataType_t.
fn code(kind: Kind) -> Result<c_int> {
    match kind {
        Kind::Uint8 => Ok(1),
        Kind::Int64 => Ok(4),
        Kind::Half => Ok(6),
        Kind::Float => Ok(7),
        Kind::Double => Ok(8),
        Kind::BFloat16 => Ok(9),
        other => Err(Fault::failed(format!("NCCL carries no {other:?}"))),
    }
}

/// ncclRedOp_t.
const SUM: c_int = 0;

impl Both {
    /// The communicator, made at the first call; collective.
    fn line(&mut self) -> Result<&Line> {
        if self.line.is_none() {
            let library = Library::get()?;
            let id = if self.rank == 0 { library.unique_id()?.0 } else { [0; ID_BYTES] };
            let id = self.host.broadcast(&Tensor::from_slice(&id), 0).wait(OPENING)?;
            let id: [u8; ID_BYTES] = crate::bridge::bytes(&id).try_into().expect("as many bytes as were sent");
            let comm = Arc::new(Comm::open(Id(id), self.rank, self.size)?);
            self.comms.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&comm));
            self.line = Some(Line { comm, stream: Stream::new(self.device, Priority::High)? });
        }
        Ok(self.line.as_ref().expect("made above"))
    }

    /// Queues a collective that reads `from` and writes `to`, both contiguous, behind what the current stream has been
    /// given.
    fn queue(
        &mut self,
        what: &'static str,
        pair: (&Tensor, &Tensor),
        call: impl Fn(&Library, *const c_void, *mut c_void, c_int, Handle, *mut c_void) -> c_int,
    ) -> Result<Pending> {
        self.queue_all(what, &[pair], |library, _, from, to, kind, comm, stream| {
            call(library, from, to, kind, comm, stream)
        })
    }

    /// The same for several pairs in one group, which NCCL starts together; `call` is given the pair's number. The result
    /// is what the last one writes to.
    fn queue_all(
        &mut self,
        what: &'static str,
        pairs: &[(&Tensor, &Tensor)],
        call: impl Fn(&Library, usize, *const c_void, *mut c_void, c_int, Handle, *mut c_void) -> c_int,
    ) -> Result<Pending> {
        let kinds = pairs.iter().map(|(from, _)| code(from.kind())).collect::<Result<Vec<_>>>()?;
        let (device, name, watchdog) = (self.device, format!("channel {}: {what}", self.name), self.watchdog.clone());
        let &Line { ref comm, stream } = self.line()?;
        if comm.gone() {
            return Err(Fault::failed("the channel was given up"));
        }
        let current = Stream::current(device)?;
        let capturing = current.is_capturing()?;
        if capturing {
            comm.capture();
        }
        let mut before = Event::new()?;
        before.record(&current)?;
        stream.wait(&before)?;
        let tensors = pairs.iter().flat_map(|(from, to)| [from.shallow_clone(), to.shallow_clone()]).collect();
        let mut held = Held { tensors, stream, joined: false };
        let library = Library::get()?;
        comm.with(|handle| {
            library.group(|| {
                pairs.iter().zip(&kinds).enumerate().try_for_each(|(i, ((from, to), &kind))| {
                    let (source, target) = (from.data_ptr().cast_const(), to.data_ptr());
                    library.checked(call(library, i, source, target, kind, handle, stream.raw()), what)
                })
            })
        })?;
        let [mut done, mut seen] = [Event::new()?, Event::new()?];
        done.record(&stream)?;
        if !capturing {
            seen.record(&stream)?;
        }
        let (comms, since) = (vec![comm.clone()], Instant::now());
        Ok(Pending::new(move |deadline| {
            Stream::current(device)?.wait(&done)?;
            held.joined = true;
            if !capturing {
                watchdog.watch(Watched { what: name, done: seen, comms, since, deadline });
            }
            Ok(held.tensors.last().map_or_else(Tensor::new, Tensor::shallow_clone))
        }))
    }

    fn told(&self, pending: Result<Pending>) -> Pending {
        pending.unwrap_or_else(|fault| Pending::ready(Err(fault.at(format!("channel {}", self.name)))))
    }

    fn sum(&mut self, tensor: &Tensor) -> Result<Pending> {
        let (flat, n) = (tensor.detach().contiguous(), tensor.numel());
        // SAFETY: `queue` gives the addresses of live contiguous tensors of `n` elements of this kind.
        let pending =
            self.queue("all_reduce (sum)", (&flat, &flat), |library, from, to, kind, comm, stream| unsafe {
                (library.all_reduce)(from, to, n, kind, SUM, comm, stream)
            })?;
        Ok(in_place(pending, tensor, |sum| sum))
    }

    fn gather(&mut self, tensor: &Tensor) -> Result<Pending> {
        let n = tensor.numel();
        let shape: Vec<i64> = std::iter::once(self.size as i64).chain(tensor.size()).collect();
        let all = Tensor::f_empty(shape, (tensor.kind(), tensor.device()))?;
        // SAFETY: as in `sum`; `all` has room for every rank's.
        self.queue("all_gather", (tensor, &all), |library, from, to, kind, comm, stream| unsafe {
            (library.all_gather)(from, to, n, kind, comm, stream)
        })
    }

    fn scatter(&mut self, tensor: &Tensor) -> Result<Pending> {
        let shape = super::channel::part_shape(tensor, self.size)?;
        let part = Tensor::f_empty(shape, (tensor.kind(), tensor.device()))?;
        let n = part.numel();
        // SAFETY: as in `sum`; `tensor` holds `n` elements for each rank.
        self.queue("reduce_scatter", (tensor, &part), |library, from, to, kind, comm, stream| unsafe {
            (library.reduce_scatter)(from, to, n, kind, SUM, comm, stream)
        })
    }

    fn spread(&mut self, tensors: &[&Tensor], root: usize) -> Result<Pending> {
        if root >= self.size {
            return Err(Fault::failed(format!("broadcast from rank {root}, but there are {} ranks.", self.size)));
        }
        let pairs: Vec<_> = tensors.iter().map(|tensor| (*tensor, *tensor)).collect();
        // SAFETY: as in `sum`, each pair with its own number of elements.
        self.queue_all("broadcast", &pairs, |library, i, from, to, kind, comm, stream| unsafe {
            (library.broadcast)(from, to, tensors[i].numel(), kind, root as c_int, comm, stream)
        })
    }
}

/// Puts what comes of a collective into `tensor`, where it is not there already.
fn in_place(pending: Pending, tensor: &Tensor, made: impl FnOnce(Tensor) -> Tensor + Send + 'static) -> Pending {
    let mut target = tensor.detach();
    Pending::new(move |deadline| {
        let result = made(pending.wait(deadline)?);
        if result.data_ptr() != target.data_ptr() {
            target.f_copy_(&result)?;
        }
        Ok(target)
    })
}

impl Channel for Both {
    fn all_reduce(&mut self, tensor: &Tensor, how: Reduce) -> Pending {
        match (tensor.device(), how) {
            (Device::Cpu, _) => self.host.all_reduce(tensor, how),
            (_, Reduce::Sum) => {
                let pending = self.sum(tensor);
                self.told(pending)
            }
            // NCCL's own maximum passes over a NaN.
            (_, Reduce::Max) => {
                let gathered = self.gather(&tensor.detach().contiguous());
                in_place(self.told(gathered), tensor, |all| all.amax([0i64].as_slice(), false))
            }
        }
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        if tensor.device() == Device::Cpu {
            return self.host.all_gather(tensor);
        }
        let pending = self.gather(&tensor.detach().contiguous());
        self.told(pending)
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        if tensor.device() == Device::Cpu {
            return self.host.reduce_scatter(tensor);
        }
        let pending = self.scatter(&tensor.detach().contiguous());
        self.told(pending)
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        if tensor.device() == Device::Cpu {
            return self.host.broadcast(tensor, root);
        }
        let flat = tensor.detach().contiguous();
        let pending = self.spread(&[&flat], root);
        in_place(self.told(pending), tensor, |all| all)
    }
    fn broadcast_all(&mut self, tensors: &[&Tensor], root: usize) -> Pending {
        if tensors.iter().any(|tensor| tensor.device() == Device::Cpu || !tensor.is_contiguous()) {
            let started: Vec<Pending> = tensors.iter().map(|tensor| self.broadcast(tensor, root)).collect();
            return Pending::new(move |deadline| {
                started.into_iter().try_fold(Tensor::new(), |_, one| one.wait(deadline))
            });
        }
        let pending = self.spread(tensors, root);
        self.told(pending)
    }
    fn barrier(&mut self) -> Pending {
        self.host.barrier()
    }
    fn abort(&mut self) {
        self.line.iter().for_each(|line| line.comm.abort());
        self.host.abort();
    }
}
