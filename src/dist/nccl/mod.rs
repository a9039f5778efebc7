//! Ranks with one GPU each: NCCL reduces CUDA tensors on streams of its own; CPU tensors use the inner world.
//!
//! A channel's communicator is created when the channel gets its first CUDA tensor. A collective is queued behind the
//! work of the caller's current stream, and [`Pending::wait`] queues the caller's stream behind the collective; the
//! calling thread does not block. Lost ranks and errors are detected by the watchdog. Unlike on the CPU, sums are
//! taken in NCCL's order (the same on every rank and, with NCCL_ALGO pinned, in every run), bf16 is summed as NCCL
//! does, and ranks that call different collectives get an error only at the deadline.
//!
//! A collective behind a stream that is being captured becomes part of the graph: its stream is forked from the
//! captured one and joined again by `wait`. Captured collectives never finish, so the watchdog watches graph launches
//! instead.

mod comm;
pub mod library;
mod watchdog;

use super::channel::shard_shape;
use super::world::{Channel, HeartbeatLink, Pending, ReduceOp, World};
use crate::bridge::bytes;
use crate::bridge::cuda::{self, Event, Priority, Stream};
use crate::error::{Error, ExitCode, Result};
use comm::{Comm, InFlightTensors};
use library::{CommHandle, NcclLibrary, UNIQUE_ID_BYTES, UniqueId};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use watchdog::{Watchdog, WatchedWork};

/// Maximum time for all ranks to create a communicator.
const OPEN_TIMEOUT: Duration = Duration::from_secs(600);

/// A world whose ranks have a GPU each, over an inner world for the CPU.
pub struct NcclWorld {
    inner: Arc<dyn World>,
    device: usize,
    watchdog: Watchdog,
    /// The communicators of all channels.
    comms: Comms,
}

type Comms = Arc<Mutex<Vec<Weak<Comm>>>>;

impl NcclWorld {
    /// Gives every rank of a host its own GPU, by local rank.
    ///
    /// # Errors
    /// [`ExitCode::Usage`] if the host has more ranks than GPUs; otherwise if NCCL cannot be used.
    pub fn new(inner: Arc<dyn World>) -> Result<NcclWorld> {
        let rank = inner.local_rank();
        let ranks = inner.local_size();
        let devices = tch::Cuda::device_count() as usize;
        if ranks > devices {
            return Err(Error::usage(format!(
                "{ranks} ranks on a host with {devices} GPUs; wanted one each: start at most {devices} on a host, or \
                 set CUDA_VISIBLE_DEVICES to nothing to compute on CPUs"
            )));
        }
        NcclWorld::with_device(inner, rank)
    }

    /// Gives this rank the GPU `device`. Ranks of a host need different GPUs: NCCL refuses two ranks on one, unless
    /// NCCL_HOSTID gives each another host, which only tests do.
    pub fn with_device(inner: Arc<dyn World>, device: usize) -> Result<NcclWorld> {
        let version = NcclLibrary::get()?.version_string()?;
        tracing::debug!("rank {} computes on GPU {device}", inner.rank());
        if inner.rank() == 0 {
            tracing::info!("{} ranks on GPUs, NCCL {version}", inner.size());
        }
        cuda::set_device(device)?;
        Ok(NcclWorld { watchdog: Watchdog::start(inner.clone())?, inner, device, comms: Comms::default() })
    }
}

impl World for NcclWorld {
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
    fn open_channel(&self, name: &str) -> Result<Box<dyn Channel>> {
        Ok(Box::new(NcclChannel {
            name: name.to_owned(),
            cpu: self.inner.open_channel(name)?,
            nccl: None,
            rank: self.rank(),
            size: self.size(),
            device: self.device,
            watchdog: self.watchdog.clone(),
            comms: self.comms.clone(),
        }))
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
        self.watchdog.set_enabled(enabled);
    }
    fn graph_launched(&self, deadline: Duration) -> Result<()> {
        let comms = self.comms.lock().unwrap_or_else(PoisonError::into_inner);
        let comms: Vec<_> = comms.iter().filter_map(Weak::upgrade).filter(|comm| comm.is_captured()).collect();
        if comms.is_empty() {
            return Ok(());
        }
        let mut done = Event::new()?;
        done.record(&Stream::current(self.device)?)?;
        let description = "a step with its reductions, launched as a graph".into();
        self.watchdog.watch(WatchedWork { description, done, comms, started: Instant::now(), deadline });
        Ok(())
    }
}

/// A communicator and its stream.
struct CommStream {
    comm: Arc<Comm>,
    stream: Stream,
}

/// A channel for CUDA tensors, with an inner channel for CPU tensors.
struct NcclChannel {
    name: String,
    cpu: Box<dyn Channel>,
    /// `None` until the first CUDA tensor.
    nccl: Option<CommStream>,
    rank: usize,
    size: usize,
    device: usize,
    watchdog: Watchdog,
    comms: Comms,
}

/// Returns the ncclDataType_t of a kind.
fn data_type(kind: Kind) -> Result<c_int> {
    match kind {
        Kind::Uint8 => Ok(1),
        Kind::Int64 => Ok(4),
        Kind::Half => Ok(6),
        Kind::Float => Ok(7),
        Kind::Double => Ok(8),
        Kind::BFloat16 => Ok(9),
        other => Err(Error::failed(format!("NCCL does not support tensors of kind {other:?}"))),
    }
}

/// ncclSum of ncclRedOp_t.
const SUM: c_int = 0;

/// The contiguous tensors that a collective reads and writes.
struct Operands<'a> {
    source: &'a Tensor,
    target: &'a Tensor,
}

/// The arguments that all of NCCL's collectives have.
struct NcclArgs {
    library: &'static NcclLibrary,
    source: *const c_void,
    target: *mut c_void,
    /// Elements of the target.
    target_elements: usize,
    data_type: c_int,
    comm: CommHandle,
    /// cudaStream_t.
    stream: *mut c_void,
}

impl NcclChannel {
    /// Returns the communicator, which is created at the first call; collective.
    fn comm_stream(&mut self) -> Result<&CommStream> {
        if self.nccl.is_none() {
            let library = NcclLibrary::get()?;
            let id = if self.rank == 0 { library.unique_id()?.0 } else { [0; UNIQUE_ID_BYTES] };
            let id = self.cpu.broadcast(&Tensor::from_slice(&id), 0).wait(OPEN_TIMEOUT)?;
            let id: [u8; UNIQUE_ID_BYTES] = bytes(&id).try_into().expect("the size that was sent");
            let comm = Arc::new(Comm::open(UniqueId(id), self.rank, self.size)?);
            self.comms.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&comm));
            self.nccl = Some(CommStream { comm, stream: Stream::new(self.device, Priority::High)? });
        }
        Ok(self.nccl.as_ref().expect("created above"))
    }

    /// Queues one collective per element of `operands`, as one group that NCCL starts together, behind the work of the
    /// current stream. The result is the target of the last one.
    fn queue(
        &mut self,
        what: &'static str,
        operands: &[Operands],
        call: impl Fn(&NcclArgs) -> c_int,
    ) -> Result<Pending> {
        let data_types = operands.iter().map(|one| data_type(one.source.kind())).collect::<Result<Vec<_>>>()?;
        let device = self.device;
        let description = format!("channel {}: {what}", self.name);
        let watchdog = self.watchdog.clone();
        let &CommStream { ref comm, stream } = self.comm_stream()?;
        if comm.is_aborted() {
            return Err(Error::failed("the channel was aborted"));
        }
        let current = Stream::current(device)?;
        let capturing = current.is_capturing()?;
        if capturing {
            comm.mark_captured();
        }
        let mut ready = Event::new()?;
        ready.record(&current)?;
        stream.wait(&ready)?;
        let tensors =
            operands.iter().flat_map(|one| [one.source.shallow_clone(), one.target.shallow_clone()]).collect();
        let mut in_flight = InFlightTensors { tensors, stream, joined: false };
        let library = NcclLibrary::get()?;
        comm.with_handle(|handle| {
            library.group(|| {
                operands.iter().zip(&data_types).try_for_each(|(one, &data_type)| {
                    let args = NcclArgs {
                        library,
                        source: one.source.data_ptr().cast_const(),
                        target: one.target.data_ptr(),
                        target_elements: one.target.numel(),
                        data_type,
                        comm: handle,
                        stream: stream.raw(),
                    };
                    library.check(call(&args), what)
                })
            })
        })?;
        let mut done = Event::new()?;
        let mut watched = Event::new()?;
        done.record(&stream)?;
        if !capturing {
            watched.record(&stream)?;
        }
        let comms = vec![comm.clone()];
        let started = Instant::now();
        Ok(Pending::new(move |deadline| {
            Stream::current(device)?.wait(&done)?;
            in_flight.joined = true;
            if !capturing {
                watchdog.watch(WatchedWork { description, done: watched, comms, started, deadline });
            }
            Ok(in_flight.tensors.last().map_or_else(Tensor::new, Tensor::shallow_clone))
        }))
    }

    fn pending(&self, started: Result<Pending>) -> Pending {
        started.unwrap_or_else(|error| Pending::ready(Err(error.with_context(format!("channel {}", self.name)))))
    }

    fn start_sum(&mut self, tensor: &Tensor) -> Result<Pending> {
        let flat = tensor.detach().contiguous();
        let operands = Operands { source: &flat, target: &flat };
        // SAFETY: `queue` passes the addresses of live contiguous tensors of this data type.
        let pending = self.queue("all_reduce (sum)", &[operands], |args| unsafe {
            let &NcclArgs { library, source, target, target_elements, data_type, comm, stream } = args;
            (library.all_reduce)(source, target, target_elements, data_type, SUM, comm, stream)
        })?;
        Ok(copy_result_to(pending, tensor))
    }

    fn start_all_gather(&mut self, tensor: &Tensor) -> Result<Pending> {
        let elements = tensor.numel();
        let shape: Vec<i64> = std::iter::once(self.size as i64).chain(tensor.size()).collect();
        let gathered = Tensor::f_empty(shape, (tensor.kind(), tensor.device()))?;
        // SAFETY: as in `start_sum`; the target has room for the tensors of all ranks.
        self.queue("all_gather", &[Operands { source: tensor, target: &gathered }], |args| unsafe {
            let &NcclArgs { library, source, target, data_type, comm, stream, .. } = args;
            (library.all_gather)(source, target, elements, data_type, comm, stream)
        })
    }

    fn start_reduce_scatter(&mut self, tensor: &Tensor) -> Result<Pending> {
        let shape = shard_shape(tensor, self.size)?;
        let shard = Tensor::f_empty(shape, (tensor.kind(), tensor.device()))?;
        // SAFETY: as in `start_sum`; the source has the elements of the target for each rank.
        self.queue("reduce_scatter", &[Operands { source: tensor, target: &shard }], |args| unsafe {
            let &NcclArgs { library, source, target, target_elements, data_type, comm, stream } = args;
            (library.reduce_scatter)(source, target, target_elements, data_type, SUM, comm, stream)
        })
    }

    fn start_broadcast(&mut self, tensors: &[&Tensor], root: usize) -> Result<Pending> {
        if root >= self.size {
            return Err(Error::failed(format!("broadcast from rank {root}, but there are {} ranks.", self.size)));
        }
        let operands: Vec<_> = tensors.iter().map(|tensor| Operands { source: tensor, target: tensor }).collect();
        // SAFETY: as in `start_sum`.
        self.queue("broadcast", &operands, |args| unsafe {
            let &NcclArgs { library, source, target, target_elements, data_type, comm, stream } = args;
            (library.broadcast)(source, target, target_elements, data_type, root as c_int, comm, stream)
        })
    }
}

/// Copies the result of `pending` to `tensor`, unless it has the same memory.
fn copy_result_to(pending: Pending, tensor: &Tensor) -> Pending {
    let mut target = tensor.detach();
    Pending::new(move |deadline| {
        let result = pending.wait(deadline)?;
        if result.data_ptr() != target.data_ptr() {
            target.f_copy_(&result)?;
        }
        Ok(target)
    })
}

impl Channel for NcclChannel {
    fn all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Pending {
        if tensor.device() == Device::Cpu {
            return self.cpu.all_reduce(tensor, op);
        }
        match op {
            ReduceOp::Sum => {
                let started = self.start_sum(tensor);
                self.pending(started)
            }
            // A gather, because NCCL's maximum ignores NaN.
            ReduceOp::Max => {
                let started = self.start_all_gather(&tensor.detach().contiguous());
                let gathered = self.pending(started);
                let max = Pending::new(move |deadline| Ok(gathered.wait(deadline)?.amax([0i64].as_slice(), false)));
                copy_result_to(max, tensor)
            }
        }
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        if tensor.device() == Device::Cpu {
            return self.cpu.all_gather(tensor);
        }
        let started = self.start_all_gather(&tensor.detach().contiguous());
        self.pending(started)
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        if tensor.device() == Device::Cpu {
            return self.cpu.reduce_scatter(tensor);
        }
        let started = self.start_reduce_scatter(&tensor.detach().contiguous());
        self.pending(started)
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        if tensor.device() == Device::Cpu {
            return self.cpu.broadcast(tensor, root);
        }
        let flat = tensor.detach().contiguous();
        let started = self.start_broadcast(&[&flat], root);
        copy_result_to(self.pending(started), tensor)
    }
    fn broadcast_all(&mut self, tensors: &[&Tensor], root: usize) -> Pending {
        if tensors.iter().any(|tensor| tensor.device() == Device::Cpu || !tensor.is_contiguous()) {
            return Pending::all(tensors.iter().map(|tensor| self.broadcast(tensor, root)).collect());
        }
        let started = self.start_broadcast(tensors, root);
        self.pending(started)
    }
    fn barrier(&mut self) -> Pending {
        self.cpu.barrier()
    }
    fn abort(&mut self) {
        if let Some(nccl) = &self.nccl {
            nccl.comm.abort();
        }
        self.cpu.abort();
    }
}
