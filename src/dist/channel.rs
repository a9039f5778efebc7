//! The collectives, written once for every transport. Each is announced to all ranks, compared, and carried out by the
//! channel's own thread, so that it progresses while the caller computes.
//!
//! all_reduce assigns one chunk to each rank: all ranks send it theirs, it sums them in rank order, and the sums are
//! gathered. The bits depend on the ranks and never on the transport.

use super::collective::{
    CollectiveCall, CollectiveKind, FRAME_BYTES, HEADER_BYTES, MAX_INLINE_BYTES, check_calls_match, kind_name,
};
use super::reduce::reduce;
use super::transport::{CancelFlag, Transport, TransportError};
use super::world::{Channel, Pending, ReduceOp};
use crate::bridge::{bytes, bytes_mut};
use crate::error::{Error, Result};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Checks that collectives support the kind of `tensor`. The check is the same in every world, so that a run of one
/// rank finds the mistake too.
pub fn check_kind(tensor: &Tensor, reduces: bool) -> Result<()> {
    let kind = tensor.kind();
    if kind_name(kind) == "unknown" || (reduces && kind == Kind::Uint8) {
        let wanted = if reduces { "f32, f64, bf16 or i64" } else { "f32, f64, bf16, i64 or u8" };
        return Err(Error::failed(format!("A collective got a tensor of kind {kind:?}; wanted {wanted}.")));
    }
    Ok(())
}

/// Returns the shape of one of `size` equal parts along the first dimension.
///
/// # Errors
/// [`ExitCode::Failed`](crate::error::ExitCode::Failed) if the dimension is not divisible by `size`.
pub fn shard_shape(tensor: &Tensor, size: usize) -> Result<Vec<i64>> {
    let mut shape = tensor.size();
    match shape.first_mut() {
        Some(first) if *first % size as i64 == 0 => *first /= size as i64,
        _ => {
            let shape = tensor.size();
            return Err(Error::failed(format!("reduce_scatter wants [{size}·n, ..] on {size} ranks; got {shape:?}.")));
        }
    }
    Ok(shape)
}

/// A collective for the worker thread. `tensor` shares the caller's memory.
struct Job {
    call: CollectiveCall,
    tensor: Tensor,
    reply: Sender<Result<Tensor>>,
}

/// A channel over a [`Transport`].
pub struct TransportChannel {
    name: Arc<str>,
    size: usize,
    jobs: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
    cancel: CancelFlag,
    in_flight: Arc<AtomicUsize>,
    sequence: u64,
}

impl TransportChannel {
    /// Opens the channel and checks that all ranks open the same one; collective. `cancel` is the flag that `transport`
    /// polls.
    pub fn open(name: &str, transport: Box<dyn Transport>, cancel: CancelFlag, deadline: Duration) -> Result<Self> {
        let (jobs, queue) = unbounded();
        let in_flight = Arc::new(AtomicUsize::new(0));
        let name: Arc<str> = name.into();
        let size = transport.size();
        let worker = ChannelWorker {
            name: name.clone(),
            transport,
            in_flight: in_flight.clone(),
            received: Vec::new(),
            reduced: Vec::new(),
        };
        let worker = std::thread::Builder::new()
            .name(format!("channel {name}"))
            .spawn(move || worker.run(queue))
            .map_err(|error| Error::failed(format!("channel {name}: cannot start its thread: {error}.")))?;
        let label = Tensor::from_slice(&name.as_bytes()[..name.len().min(MAX_INLINE_BYTES)]);
        let mut channel =
            TransportChannel { name, size, jobs: Some(jobs), worker: Some(worker), cancel, in_flight, sequence: 0 };
        channel.start(CollectiveKind::Open, label).wait_done(deadline)?;
        Ok(channel)
    }

    fn start(&mut self, collective: CollectiveKind, tensor: Tensor) -> Pending {
        let call =
            CollectiveCall { sequence: self.sequence, collective, kind: tensor.kind(), elements: tensor.numel() };
        self.sequence += 1;
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        let (reply, result) = bounded(1);
        if let Some(jobs) = &self.jobs {
            // A dead worker drops the job and with it `reply`, which `wait` reports.
            let _ = jobs.send(Job { call, tensor, reply });
        }
        Pending::from_receiver(format!("channel {}: {call}", self.name), result)
    }

    /// Starts the collective after checking the device and the kind of `tensor`.
    fn start_checked(&mut self, collective: CollectiveKind, tensor: &Tensor, reduces: bool) -> Pending {
        let checked = match tensor.device() {
            Device::Cpu => check_kind(tensor, reduces),
            device => Err(Error::failed(format!("This channel carries tensors on the CPU; got one on {device:?}."))),
        };
        match checked {
            Ok(()) => self.start(collective, tensor.detach()),
            Err(error) => self.failed(error),
        }
    }

    fn failed(&self, error: Error) -> Pending {
        Pending::ready(Err(error.with_context(format!("channel {}", self.name))))
    }
}

impl Channel for TransportChannel {
    fn all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Pending {
        self.start_checked(CollectiveKind::AllReduce(op), tensor, true)
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        self.start_checked(CollectiveKind::AllGather, tensor, false)
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        match shard_shape(tensor, self.size) {
            Ok(_) => self.start_checked(CollectiveKind::ReduceScatter, tensor, true),
            Err(error) => self.failed(error),
        }
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        if root >= self.size {
            let message = format!("broadcast from rank {root}, but there are {} ranks.", self.size);
            return self.failed(Error::failed(message));
        }
        self.start_checked(CollectiveKind::Broadcast(root), tensor, false)
    }
    fn barrier(&mut self) -> Pending {
        self.start(CollectiveKind::Barrier, Tensor::zeros([0], (Kind::Uint8, Device::Cpu)))
    }
    fn abort(&mut self) {
        self.cancel.set();
    }
}

impl Drop for TransportChannel {
    /// Waits for the thread. Unfinished collectives are canceled, because the other ranks may never join them.
    fn drop(&mut self) {
        if self.in_flight.load(Ordering::SeqCst) > 0 {
            self.cancel.set();
        }
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            // The thread has reported its panic itself.
            let _ = worker.join();
        }
    }
}

/// Size of the pieces that are sent at once. Large enough for full speed, small enough to stay in the last-level cache
/// between the two halves of an all_reduce, and far below the 2 GiB limit of MPI's counts.
const PIECE_BYTES: usize = 8 << 20;
/// Minimum size of one rank's chunk of a piece.
const MIN_CHUNK_BYTES: usize = 64 << 10;

struct ChannelWorker {
    name: Arc<str>,
    transport: Box<dyn Transport>,
    in_flight: Arc<AtomicUsize>,
    /// Scratch memory for the chunks of the other ranks.
    received: Vec<u8>,
    /// Scratch memory for the reduction of this rank's chunk.
    reduced: Vec<u8>,
}

impl ChannelWorker {
    fn run(mut self, queue: Receiver<Job>) {
        let mut failure: Option<Error> = None;
        for Job { call, tensor, reply } in queue {
            let result = match &failure {
                Some(error) => Err(error.clone().with_context(format!("{call} comes after a failure"))),
                None => self.execute(&call, &tensor).map_err(|error| error.with_context(call)),
            };
            let result = result.map_err(|error| {
                // The transport may still write to the scratch memory.
                std::mem::forget((std::mem::take(&mut self.received), std::mem::take(&mut self.reduced)));
                failure.get_or_insert_with(|| error.clone());
                error.with_context(format!("channel {}", self.name))
            });
            self.in_flight.fetch_sub(1, Ordering::SeqCst);
            // The caller may have stopped waiting.
            let _ = reply.send(result);
        }
    }

    fn execute(&mut self, call: &CollectiveCall, tensor: &Tensor) -> Result<Tensor> {
        let mut flat = tensor.f_contiguous()?;
        let result = self.execute_contiguous(call, &mut flat);
        if result.is_err() {
            // The transport may still write to the tensor; the job is about to end anyway.
            std::mem::forget(flat);
            return result;
        }
        if matches!(call.collective, CollectiveKind::AllReduce(_) | CollectiveKind::Broadcast(_)) {
            if !tensor.is_contiguous() {
                tensor.shallow_clone().f_copy_(&flat)?;
            }
            return Ok(tensor.shallow_clone());
        }
        result
    }

    /// Runs the collective on contiguous memory. Returns a new tensor, or `flat` if it works in place.
    fn execute_contiguous(&mut self, call: &CollectiveCall, flat: &mut Tensor) -> Result<Tensor> {
        let frames = self.announce(call, bytes(flat))?;
        check_calls_match(call, &frames, self.transport.size())?;
        let inline = bytes(flat).len() <= MAX_INLINE_BYTES;
        match call.collective {
            CollectiveKind::Open | CollectiveKind::Barrier => {}
            CollectiveKind::AllGather => return self.all_gather(flat, inline.then_some(&frames)),
            CollectiveKind::ReduceScatter => return self.reduce_scatter(flat, inline.then_some(&frames)),
            CollectiveKind::AllReduce(op) if inline => {
                let bytes = bytes_mut(flat);
                let parts: Vec<&[u8]> =
                    frames.chunks(FRAME_BYTES).map(|frame| &frame[HEADER_BYTES..HEADER_BYTES + bytes.len()]).collect();
                reduce(call.kind, op, &parts, bytes);
            }
            CollectiveKind::AllReduce(op) => self.all_reduce(call.kind, op, bytes_mut(flat))?,
            CollectiveKind::Broadcast(root) if inline => {
                let bytes = bytes_mut(flat);
                bytes.copy_from_slice(&frames[root * FRAME_BYTES + HEADER_BYTES..][..bytes.len()]);
            }
            CollectiveKind::Broadcast(root) => {
                bytes_mut(flat).chunks_mut(1 << 30).try_for_each(|piece| self.transport.broadcast(piece, root))?;
            }
        }
        Ok(flat.shallow_clone())
    }

    /// Sends the call, and the data if they fit into a frame, to every rank. Returns all ranks' frames.
    fn announce(&mut self, call: &CollectiveCall, data: &[u8]) -> Result<Vec<u8>, TransportError> {
        let mut frame = vec![0; FRAME_BYTES];
        call.encode(&mut frame);
        if data.len() <= MAX_INLINE_BYTES {
            frame[HEADER_BYTES..HEADER_BYTES + data.len()].copy_from_slice(data);
        }
        let mut frames = vec![0; FRAME_BYTES * self.transport.size()];
        let ranges = equal_ranges(self.transport.size(), FRAME_BYTES);
        match self.transport.all_gather(&frame, &mut frames, &ranges) {
            Ok(()) => Ok(frames),
            Err(error) => {
                // The transport may still use them.
                std::mem::forget((frame, frames));
                Err(error)
            }
        }
    }

    fn all_reduce(&mut self, kind: Kind, op: ReduceOp, bytes: &mut [u8]) -> Result<(), TransportError> {
        let size = self.transport.size();
        let rank = self.transport.rank();
        let width = kind.elt_size_in_bytes();
        for piece in bytes.chunks_mut(PIECE_BYTES.max(MIN_CHUNK_BYTES * size)) {
            let elements = piece.len() / width;
            let edge = |r: usize| r * elements / size * width;
            let chunks: Vec<Range<usize>> = (0..size).map(|r| edge(r)..edge(r + 1)).collect();
            self.exchange_and_reduce(kind, op, piece, &chunks)?;
            self.transport.all_gather(&self.reduced[..chunks[rank].len()], piece, &chunks)?;
        }
        Ok(())
    }

    /// Sends each rank its chunk of `data` and leaves the reduction of this rank's chunk in `reduced`.
    fn exchange_and_reduce(
        &mut self,
        kind: Kind,
        op: ReduceOp,
        data: &[u8],
        chunks: &[Range<usize>],
    ) -> Result<(), TransportError> {
        let size = self.transport.size();
        let rank = self.transport.rank();
        let length = chunks[rank].len();
        grow(&mut self.received, size * length);
        grow(&mut self.reduced, length);
        // A rank does not send its chunk to itself.
        let mut from = chunks.to_vec();
        from[rank] = 0..0;
        let mut into = equal_ranges(size, length);
        into[rank] = 0..0;
        self.transport.all_to_all(data, &from, &mut self.received, &into)?;
        let received = &self.received;
        let part = |r: usize| if r == rank { &data[chunks[r].clone()] } else { &received[into[r].clone()] };
        reduce(kind, op, &(0..size).map(part).collect::<Vec<_>>(), &mut self.reduced[..length]);
        Ok(())
    }

    fn reduce_scatter(&mut self, tensor: &Tensor, frames: Option<&Vec<u8>>) -> Result<Tensor> {
        let size = self.transport.size();
        let rank = self.transport.rank();
        let kind = tensor.kind();
        let mut result = Tensor::f_empty(shard_shape(tensor, size)?, (kind, Device::Cpu))?;
        let data = bytes(tensor);
        let out = bytes_mut(&mut result);
        let length = out.len();
        if let Some(frames) = frames {
            let start = HEADER_BYTES + rank * length;
            let parts: Vec<&[u8]> = frames.chunks(FRAME_BYTES).map(|frame| &frame[start..start + length]).collect();
            reduce(kind, ReduceOp::Sum, &parts, out);
            return Ok(result);
        }
        let step = chunk_bytes(size);
        let mut packed = Vec::new();
        for start in (0..length).step_by(step) {
            let width = step.min(length - start);
            // The chunks of one piece are further apart than MPI's offsets can express, so they are packed.
            packed.clear();
            (0..size).for_each(|r| packed.extend_from_slice(&data[r * length + start..][..width]));
            if let Err(error) = self.exchange_and_reduce(kind, ReduceOp::Sum, &packed, &equal_ranges(size, width)) {
                std::mem::forget(packed);
                return Err(error.into());
            }
            out[start..start + width].copy_from_slice(&self.reduced[..width]);
        }
        Ok(result)
    }

    fn all_gather(&mut self, tensor: &Tensor, frames: Option<&Vec<u8>>) -> Result<Tensor> {
        let size = self.transport.size();
        let mut shape = tensor.size();
        shape.insert(0, size as i64);
        let mut result = Tensor::f_empty(shape, (tensor.kind(), Device::Cpu))?;
        let local = bytes(tensor);
        let out = bytes_mut(&mut result);
        let length = local.len();
        if let Some(frames) = frames {
            for (rank, frame) in frames.chunks(FRAME_BYTES).enumerate() {
                out[rank * length..][..length].copy_from_slice(&frame[HEADER_BYTES..][..length]);
            }
            return Ok(result);
        }
        let step = chunk_bytes(size);
        for start in (0..length).step_by(step) {
            let width = step.min(length - start);
            grow(&mut self.received, size * width);
            let ranges = equal_ranges(size, width);
            self.transport.all_gather(&local[start..start + width], &mut self.received, &ranges)?;
            for (rank, range) in ranges.into_iter().enumerate() {
                out[rank * length + start..][..width].copy_from_slice(&self.received[range]);
            }
        }
        Ok(result)
    }
}

/// Returns the size of one rank's chunk of a piece: a multiple of the size of every element type.
fn chunk_bytes(size: usize) -> usize {
    const ALIGNMENT: usize = 8;
    (PIECE_BYTES / size).max(MIN_CHUNK_BYTES) / ALIGNMENT * ALIGNMENT
}

/// Returns `size` consecutive ranges of `length`.
fn equal_ranges(size: usize, length: usize) -> Vec<Range<usize>> {
    (0..size).map(|r| r * length..(r + 1) * length).collect()
}

fn grow(scratch: &mut Vec<u8>, length: usize) {
    if scratch.len() < length {
        scratch.resize(length, 0);
    }
}

impl From<TransportError> for Error {
    fn from(error: TransportError) -> Self {
        Error::failed(match error {
            TransportError::Aborted => "the channel was aborted.".to_string(),
            TransportError::Failed(reason) => format!("the transport failed: {reason}."),
        })
    }
}
