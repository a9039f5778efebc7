//! The collectives, once for every wire: each is announced to all ranks, compared, and carried out by the channel's
//! own thread, so that it goes on while the caller computes.
//!
//! An all_reduce gives each rank one chunk: all ranks send it theirs, it sums them in rank order, and the sums are
//! gathered. The bits depend on the ranks and never on the wire.

use super::call::{Act, Call, FRAME, HEADER, INLINE, compare, word};
use super::fold::fold;
use super::wire::{Gate, Halt, Wire};
use super::world::{Channel, Pending, Reduce};
use crate::bridge::{bytes, bytes_mut};
use crate::fault::{Fault, Result};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Refuses what no channel carries; the same on every world, so that a run of one rank finds the mistake too.
pub fn check(tensor: &Tensor, reduced: bool) -> Result<()> {
    let kind = tensor.kind();
    if word(kind) == "unknown" || (reduced && kind == Kind::Uint8) {
        let wanted = if reduced { "f32, f64, bf16 or i64" } else { "f32, f64, bf16, i64 or u8" };
        return Err(Fault::failed(format!("A collective got a tensor of kind {kind:?}; wanted {wanted}.")));
    }
    Ok(())
}

/// The shape of one of `size` equal parts along the first axis, or a fault.
pub fn part_shape(tensor: &Tensor, size: usize) -> Result<Vec<i64>> {
    let mut shape = tensor.size();
    match shape.first_mut() {
        Some(first) if *first % size as i64 == 0 => *first /= size as i64,
        _ => {
            let got = tensor.size();
            return Err(Fault::failed(format!("reduce_scatter wants [{size}·n, ..] on {size} ranks; got {got:?}.")));
        }
    }
    Ok(shape)
}

/// One collective on its way to the worker. `tensor` shares the caller's memory.
struct Job {
    call: Call,
    tensor: Tensor,
    reply: Sender<Result<Tensor>>,
}

/// A channel over any wire.
pub struct Lane {
    name: Arc<str>,
    size: usize,
    jobs: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
    gate: Gate,
    under_way: Arc<AtomicUsize>,
    number: u64,
}

impl Lane {
    /// Opens the channel and makes sure that all ranks open the same one. `gate` is the one that `wire` looks at.
    pub fn open(name: &str, wire: Box<dyn Wire>, gate: Gate, deadline: Duration) -> Result<Self> {
        let (jobs, queue) = unbounded();
        let under_way = Arc::new(AtomicUsize::new(0));
        let (name, size): (Arc<str>, usize) = (name.into(), wire.size());
        let worker = Worker { name: name.clone(), wire, under_way: under_way.clone(), scratch: Default::default() };
        let thread = std::thread::Builder::new().name(format!("channel {name}")).spawn(move || worker.work(queue));
        let thread = thread.map_err(|error| Fault::failed(format!("channel {name}: no thread for it: {error}.")))?;
        let mut lane = Lane { name, size, jobs: Some(jobs), worker: Some(thread), gate, under_way, number: 0 };
        let label = Tensor::from_slice(&lane.name.as_bytes()[..lane.name.len().min(INLINE)]);
        lane.start(Act::Open, label).done(deadline)?;
        Ok(lane)
    }

    fn start(&mut self, act: Act, tensor: Tensor) -> Pending {
        let call = Call { number: self.number, act, kind: tensor.kind(), elements: tensor.numel() };
        self.number += 1;
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let (reply, result) = bounded(1);
        if let Some(jobs) = &self.jobs {
            // A worker that is gone drops the job and with it `reply`, which `wait` reports.
            let _ = jobs.send(Job { call, tensor, reply });
        }
        Pending::from_worker(format!("channel {}: {call}", self.name), result)
    }

    /// Starts `act` once `tensor` has been found fit.
    fn checked(&mut self, act: Act, tensor: &Tensor, reduced: bool) -> Pending {
        let here = match tensor.device() {
            Device::Cpu => check(tensor, reduced),
            device => Err(Fault::failed(format!("This channel carries tensors on the CPU; got one on {device:?}."))),
        };
        match here {
            Ok(()) => self.start(act, tensor.detach()),
            Err(fault) => Pending::ready(Err(fault.at(format!("channel {}", self.name)))),
        }
    }
}

impl Channel for Lane {
    fn all_reduce(&mut self, tensor: &Tensor, how: Reduce) -> Pending {
        self.checked(Act::AllReduce(how), tensor, true)
    }
    fn all_gather(&mut self, tensor: &Tensor) -> Pending {
        self.checked(Act::AllGather, tensor, false)
    }
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending {
        match part_shape(tensor, self.size) {
            Ok(_) => self.checked(Act::ReduceScatter, tensor, true),
            Err(fault) => Pending::ready(Err(fault.at(format!("channel {}", self.name)))),
        }
    }
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending {
        if root >= self.size {
            let (name, size) = (&self.name, self.size);
            let message = format!("channel {name}: broadcast from rank {root}, but there are {size} ranks.");
            return Pending::ready(Err(Fault::failed(message)));
        }
        self.checked(Act::Broadcast(root), tensor, false)
    }
    fn barrier(&mut self) -> Pending {
        self.start(Act::Barrier, Tensor::zeros([0], (Kind::Uint8, Device::Cpu)))
    }
    fn abort(&mut self) {
        self.gate.close();
    }
}

impl Drop for Lane {
    /// Waits for the thread. A collective that nobody waited for is given up, for its peers may never come.
    fn drop(&mut self) {
        if self.under_way.load(Ordering::SeqCst) > 0 {
            self.gate.close();
        }
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            // A panic of the worker has been told by its own thread.
            let _ = worker.join();
        }
    }
}

/// The bytes of a tensor that travel in one go. Large enough to reach full speed, small enough to stay in the last
/// cache between the two halves of an all_reduce, and far from the 2 GiB that MPI counts to.
const PIECE: usize = 8 << 20;
/// Nor shall the chunks of many ranks become tiny.
const CHUNK: usize = 64 << 10;

struct Worker {
    name: Arc<str>,
    wire: Box<dyn Wire>,
    under_way: Arc<AtomicUsize>,
    /// What arrives from the others, and what goes out.
    scratch: [Vec<u8>; 2],
}

impl Worker {
    fn work(mut self, queue: Receiver<Job>) {
        let mut broken: Option<Fault> = None;
        for Job { call, tensor, reply } in queue {
            let result = match &broken {
                Some(fault) => Err(fault.clone().at(format!("{call} comes after a failure"))),
                None => self.carry_out(&call, &tensor).map_err(|fault| fault.at(call)),
            };
            let result = result.map_err(|fault| {
                std::mem::forget(std::mem::take(&mut self.scratch));
                broken.get_or_insert_with(|| fault.clone());
                fault.at(format!("channel {}", self.name))
            });
            self.under_way.fetch_sub(1, Ordering::SeqCst);
            // The caller may have stopped waiting; that is its right.
            let _ = reply.send(result);
        }
    }

    fn carry_out(&mut self, call: &Call, tensor: &Tensor) -> Result<Tensor> {
        let mut flat = tensor.f_contiguous()?;
        let result = self.collective(call, &mut flat);
        if result.is_err() {
            // The transport may still write into the tensor; the job is about to end anyway.
            std::mem::forget(flat);
            return result;
        }
        if matches!(call.act, Act::AllReduce(_) | Act::Broadcast(_)) {
            if !tensor.is_contiguous() {
                tensor.shallow_clone().f_copy_(&flat)?;
            }
            return Ok(tensor.shallow_clone());
        }
        result
    }

    /// The collective on contiguous memory; returns what is new, or `flat` itself.
    fn collective(&mut self, call: &Call, flat: &mut Tensor) -> Result<Tensor> {
        let frames = self.announce(call, bytes(flat))?;
        compare(call, &frames, self.wire.size())?;
        let inline = bytes(flat).len() <= INLINE;
        match call.act {
            Act::Open | Act::Barrier => {}
            Act::AllGather => return self.all_gather(flat, inline.then_some(&frames)),
            Act::ReduceScatter => return self.reduce_scatter(flat, inline.then_some(&frames)),
            Act::AllReduce(how) if inline => {
                let bytes = bytes_mut(flat);
                let parts: Vec<&[u8]> = frames.chunks(FRAME).map(|f| &f[HEADER..HEADER + bytes.len()]).collect();
                fold(call.kind, how, &parts, bytes);
            }
            Act::AllReduce(how) => self.all_reduce(call.kind, how, bytes_mut(flat))?,
            Act::Broadcast(root) if inline => {
                let bytes = bytes_mut(flat);
                bytes.copy_from_slice(&frames[root * FRAME + HEADER..][..bytes.len()]);
            }
            Act::Broadcast(root) => {
                bytes_mut(flat).chunks_mut(1 << 30).try_for_each(|piece| self.wire.broadcast(piece, root))?;
            }
        }
        Ok(flat.shallow_clone())
    }

    /// Sends the call, and the data if they are small, to every rank; returns all ranks' frames.
    fn announce(&mut self, call: &Call, data: &[u8]) -> Result<Vec<u8>, Halt> {
        let mut own = vec![0; FRAME];
        call.write(&mut own);
        if data.len() <= INLINE {
            own[HEADER..HEADER + data.len()].copy_from_slice(data);
        }
        let mut frames = vec![0; FRAME * self.wire.size()];
        let sent = self.wire.all_gather(&own, &mut frames, &equal(self.wire.size(), FRAME));
        if sent.is_err() {
            // As in `carry_out`.
            std::mem::forget((own, std::mem::take(&mut frames)));
        }
        sent.map(|()| frames)
    }

    fn all_reduce(&mut self, kind: Kind, how: Reduce, bytes: &mut [u8]) -> Result<(), Halt> {
        let (size, rank, width) = (self.wire.size(), self.wire.rank(), kind.elt_size_in_bytes());
        for piece in bytes.chunks_mut(PIECE.max(CHUNK * size)) {
            let elements = piece.len() / width;
            let edge = |r: usize| r * elements / size * width;
            let chunks: Vec<Range<usize>> = (0..size).map(|r| edge(r)..edge(r + 1)).collect();
            self.exchange_and_fold(kind, how, piece, &chunks)?;
            self.wire.all_gather(&self.scratch[1][..chunks[rank].len()], piece, &chunks)?;
        }
        Ok(())
    }

    /// Sends each rank its chunk of `data` and leaves the reduction of this rank's own chunk in the second scratch.
    fn exchange_and_fold(&mut self, kind: Kind, how: Reduce, data: &[u8], chunks: &[Range<usize>]) -> Result<(), Halt> {
        let (size, rank) = (self.wire.size(), self.wire.rank());
        let length = chunks[rank].len();
        let [arrived, sums] = &mut self.scratch;
        grow(arrived, size * length);
        grow(sums, length);
        // What a rank sends itself stays where it is.
        let mut from = chunks.to_vec();
        from[rank] = 0..0;
        let mut into = equal(size, length);
        into[rank] = 0..0;
        self.wire.all_to_all(data, &from, arrived, &into)?;
        let part = |r: usize| if r == rank { &data[chunks[r].clone()] } else { &arrived[into[r].clone()] };
        fold(kind, how, &(0..size).map(part).collect::<Vec<_>>(), &mut sums[..length]);
        Ok(())
    }

    fn reduce_scatter(&mut self, tensor: &Tensor, frames: Option<&Vec<u8>>) -> Result<Tensor> {
        let (size, rank, kind) = (self.wire.size(), self.wire.rank(), tensor.kind());
        let mut out = Tensor::f_empty(part_shape(tensor, size)?, (kind, Device::Cpu))?;
        let (data, own) = (bytes(tensor), bytes_mut(&mut out));
        let length = own.len();
        if let Some(frames) = frames {
            let parts: Vec<&[u8]> = frames.chunks(FRAME).map(|f| &f[HEADER + rank * length..][..length]).collect();
            fold(kind, Reduce::Sum, &parts, own);
            return Ok(out);
        }
        let step = (PIECE / size).max(CHUNK);
        let mut packed = Vec::new();
        for start in (0..length).step_by(step) {
            let width = step.min(length - start);
            // The chunks of one piece lie far apart, further than MPI can count; packed, they do not.
            packed.clear();
            (0..size).for_each(|r| packed.extend_from_slice(&data[r * length + start..][..width]));
            if let Err(halt) = self.exchange_and_fold(kind, Reduce::Sum, &packed, &equal(size, width)) {
                std::mem::forget(packed);
                return Err(halt.into());
            }
            own[start..start + width].copy_from_slice(&self.scratch[1][..width]);
        }
        Ok(out)
    }

    fn all_gather(&mut self, tensor: &Tensor, frames: Option<&Vec<u8>>) -> Result<Tensor> {
        let size = self.wire.size();
        let mut shape = tensor.size();
        shape.insert(0, size as i64);
        let mut out = Tensor::f_empty(shape, (tensor.kind(), Device::Cpu))?;
        let (own, all) = (bytes(tensor), bytes_mut(&mut out));
        let length = own.len();
        if let Some(frames) = frames {
            let parts = frames.chunks(FRAME).enumerate();
            parts.for_each(|(r, f)| all[r * length..][..length].copy_from_slice(&f[HEADER..][..length]));
            return Ok(out);
        }
        let step = (PIECE / size).max(CHUNK);
        let arrived = &mut self.scratch[0];
        for start in (0..length).step_by(step) {
            let width = step.min(length - start);
            grow(arrived, size * width);
            self.wire.all_gather(&own[start..start + width], arrived, &equal(size, width))?;
            (0..size).for_each(|r| all[r * length + start..][..width].copy_from_slice(&arrived[r * width..][..width]));
        }
        Ok(out)
    }
}

/// `size` spans of `length`, end to end.
fn equal(size: usize, length: usize) -> Vec<Range<usize>> {
    (0..size).map(|r| r * length..(r + 1) * length).collect()
}

fn grow(scratch: &mut Vec<u8>, length: usize) {
    if scratch.len() < length {
        scratch.resize(length, 0);
    }
}

impl From<Halt> for Fault {
    fn from(halt: Halt) -> Self {
        Fault::failed(match halt {
            Halt::Aborted => "the channel was given up.".to_string(),
            Halt::Broken(why) => format!("the transport failed: {why}."),
        })
    }
}
