//! What every world offers: rank, size, device, and channels over which ranks talk.
//!
//! A channel is created collectively (the same names in the same order on every rank) and used by one thread. It
//! starts a collective and returns a [`Pending`] handle that is waited for with a deadline, so that a lost rank ends
//! in a message and never in a hang. Sums are taken in rank order whatever the world, so the same ranks give the same
//! bits on threads and over MPI. Ranks that call different collectives are told so (exit code 76): MPI by itself
//! would return wrong sums without a word.

use super::pulse::Ring;
use crate::fault::{Code, Fault, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::time::Duration;
use tch::{Device, Tensor};

pub use super::delayed::{Delayed, Event};

/// How values of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Summed in rank order; bf16 is summed in fp32 and rounded once, i64 wraps.
    Sum,
    /// The largest; a NaN on any rank gives NaN.
    Max,
}

/// The ranks of one job, seen from one of them.
pub trait World: Send + Sync {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// The rank's number on its own host, and how many ranks that host has.
    fn local_rank(&self) -> usize;
    fn local_size(&self) -> usize;
    /// Where this rank's tensors live.
    fn device(&self) -> Device;
    /// Opens a channel; collective.
    fn channel(&self, name: &str) -> Result<Box<dyn Channel>>;
    /// The wire of the heartbeat, or none where ranks cannot freeze one by one; collective.
    fn ring(&self) -> Result<Option<Box<dyn Ring>>> {
        Ok(None)
    }
    /// The last collective act of every rank: returns once all have come, or with a fault after `deadline`. Only
    /// then may a rank exit, for launchers kill the others at the first exit code that is not zero.
    fn leave(&self, _deadline: Duration) -> Result<()> {
        Ok(())
    }
    /// Ends every rank of the job at once with this code, after the caller has told why.
    fn abort(&self, code: Code) -> !;
    /// Whether anybody looks after the collectives that are under way: not while some are captured in a CUDA graph.
    fn look(&self, _on: bool) {}
    /// A CUDA graph that holds this world's collectives has been launched on the current stream. It ends before
    /// `deadline`, or the job does.
    fn launched(&self, _deadline: Duration) -> Result<()> {
        Ok(())
    }
}

/// One stream of collectives. Each call is matched on every rank in the same order. Kinds: f32, f64, bf16, i64, u8
/// (u8 is gathered and broadcast only). A started collective makes progress while the caller computes; its tensor is
/// not touched before [`Pending::wait`] returns.
pub trait Channel: Send {
    /// Reduces `tensor` over ranks in place.
    fn all_reduce(&mut self, tensor: &Tensor, how: Reduce) -> Pending;
    /// Every rank's `tensor`, stacked: [W, ..].
    fn all_gather(&mut self, tensor: &Tensor) -> Pending;
    /// Sums [W·n, ..] over ranks and returns this rank's [n, ..].
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending;
    /// Copies `root`'s tensor into everyone's, in place.
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending;
    /// The same for several tensors, which may travel together. The result is the last of them, or an empty tensor.
    fn broadcast_all(&mut self, tensors: &[&Tensor], root: usize) -> Pending {
        let started: Vec<Pending> = tensors.iter().map(|tensor| self.broadcast(tensor, root)).collect();
        Pending::new(move |deadline| started.into_iter().try_fold(Tensor::new(), |_, one| one.wait(deadline)))
    }
    /// Returns once every rank has come here.
    fn barrier(&mut self) -> Pending;
    /// Gives up on this rank: every started and later collective of this channel ends with a fault.
    fn abort(&mut self);
}

/// A collective under way.
pub struct Pending {
    finish: Box<dyn FnOnce(Duration) -> Result<Tensor> + Send>,
}

impl Pending {
    pub fn new(finish: impl FnOnce(Duration) -> Result<Tensor> + Send + 'static) -> Self {
        Pending { finish: Box::new(finish) }
    }
    /// One that has its result already.
    pub fn ready(result: Result<Tensor>) -> Self {
        Self::new(move |_| result)
    }
    /// One whose result another thread will send; `what` names it in the fault.
    pub fn from_worker(what: String, reply: Receiver<Result<Tensor>>) -> Self {
        Self::new(move |deadline| match reply.recv_timeout(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(Fault::failed(format!(
                "{what} is unfinished after {:.1} s: another rank is lost, hung or far behind.",
                deadline.as_secs_f64()
            ))),
            Err(RecvTimeoutError::Disconnected) => Err(Fault::failed(format!("{what}: the channel has ended."))),
        })
    }
    /// The result, or a fault (exit code 70) that names the channel and the collective once `deadline` has passed.
    pub fn wait(self, deadline: Duration) -> Result<Tensor> {
        (self.finish)(deadline)
    }
    /// As `wait`, for collectives that work in place.
    pub fn done(self, deadline: Duration) -> Result<()> {
        self.wait(deadline).map(drop)
    }
}
