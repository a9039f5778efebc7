//! The interface of every world: rank, size, device, and channels for collectives.
//!
//! A channel is opened collectively (the same names in the same order on every rank) and used by one thread. It starts
//! a collective and returns a [`Pending`] handle that is waited for with a deadline, so that a lost rank results in an
//! error and never in a hang. Sums are taken in rank order in every world on the CPU, so threads and MPI give the same
//! bits. Ranks that call different collectives get an error (exit code 76); MPI by itself would silently return wrong
//! sums.

use crate::error::{Error, ExitCode, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::time::Duration;
use tch::{Device, Tensor};

/// Operation of a reduction over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum in rank order; bf16 is summed in fp32 and rounded once, i64 wraps.
    Sum,
    /// The maximum; NaN on any rank gives NaN.
    Max,
}

/// A message of the heartbeat: step, phase, and whether the rank leaves (0 or 1).
pub type HeartbeatMessage = [u64; 3];

/// The connection of the heartbeat: to the next rank, and from the previous one.
pub trait HeartbeatLink: Send {
    /// Sends `message` unless the previous one is still in flight. Returns whether it was sent.
    fn send(&mut self, message: HeartbeatMessage) -> Result<bool>;
    /// Returns the next message, if one has arrived.
    fn receive(&mut self) -> Result<Option<HeartbeatMessage>>;
}

/// The ranks of a job, seen from one of them.
pub trait World: Send + Sync {
    /// Returns the rank of this process, in 0..[`size`](World::size).
    fn rank(&self) -> usize;
    /// Returns the number of ranks.
    fn size(&self) -> usize;
    /// Returns the rank among the ranks of this host.
    fn local_rank(&self) -> usize;
    /// Returns the number of ranks on this host.
    fn local_size(&self) -> usize;
    /// Returns the device of this rank's tensors.
    fn device(&self) -> Device;
    /// Opens a channel; collective.
    fn open_channel(&self, name: &str) -> Result<Box<dyn Channel>>;
    /// Opens the connection of the heartbeat; collective. `None` if ranks cannot hang independently of each other.
    fn heartbeat_link(&self) -> Result<Option<Box<dyn HeartbeatLink>>> {
        Ok(None)
    }
    /// Waits until every rank has called this, as its last collective. A rank must not exit before, because launchers
    /// kill the other ranks at the first exit code that is not zero.
    ///
    /// # Errors
    /// If a rank is missing after `deadline`.
    fn leave(&self, _deadline: Duration) -> Result<()> {
        Ok(())
    }
    /// Ends every rank of the job at once with this exit code. The caller must have reported the reason.
    fn abort(&self, code: ExitCode) -> !;
    /// Enables or disables the watchdog over unfinished collectives; it must be off while collectives are captured into
    /// a CUDA graph.
    fn set_watchdog(&self, _enabled: bool) {}
    /// Tells the watchdog that a CUDA graph with collectives of this world was launched on the current stream. If the
    /// graph is unfinished after `deadline`, the job is ended.
    fn graph_launched(&self, _deadline: Duration) -> Result<()> {
        Ok(())
    }
}

/// A sequence of collectives. Each call is matched on every rank in the same order. Kinds: f32, f64, bf16, i64, and u8
/// for all_gather and broadcast. A started collective progresses while the caller computes; the caller must not touch
/// its tensor before [`Pending::wait`] has returned.
pub trait Channel: Send {
    /// Reduces `tensor` over ranks in place.
    fn all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Pending;
    /// Stacks every rank's `tensor`: [W, ..].
    fn all_gather(&mut self, tensor: &Tensor) -> Pending;
    /// Sums [W·n, ..] over ranks and returns this rank's [n, ..].
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Pending;
    /// Copies `root`'s tensor into every rank's `tensor`.
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Pending;
    /// Broadcasts several tensors, in one launch if possible. The result is the last of them, or an empty tensor.
    fn broadcast_all(&mut self, tensors: &[&Tensor], root: usize) -> Pending {
        let started: Vec<Pending> = tensors.iter().map(|tensor| self.broadcast(tensor, root)).collect();
        Pending::all(started)
    }
    /// Completes once every rank has called this.
    fn barrier(&mut self) -> Pending;
    /// Aborts this rank's side: every started and later collective of this channel ends with an error.
    fn abort(&mut self);
}

/// A collective in progress.
pub struct Pending {
    finish: Box<dyn FnOnce(Duration) -> Result<Tensor> + Send>,
}

impl Pending {
    /// Creates a handle whose `wait` calls `finish` with the deadline.
    pub fn new(finish: impl FnOnce(Duration) -> Result<Tensor> + Send + 'static) -> Self {
        Pending { finish: Box::new(finish) }
    }
    /// Creates a handle that has its result already.
    pub fn ready(result: Result<Tensor>) -> Self {
        Self::new(move |_| result)
    }
    /// Creates a handle whose result another thread sends; `what` names the collective in an error.
    pub fn from_receiver(what: String, receiver: Receiver<Result<Tensor>>) -> Self {
        Self::new(move |deadline| match receiver.recv_timeout(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(Error::failed(format!(
                "{what} is unfinished after {:.1} s: another rank is lost, hung or far behind.",
                deadline.as_secs_f64()
            ))),
            Err(RecvTimeoutError::Disconnected) => Err(Error::failed(format!("{what}: the channel has ended."))),
        })
    }
    /// Combines several handles. The result is that of the last one, or an empty tensor.
    pub fn all(pending: Vec<Pending>) -> Self {
        Self::new(move |deadline| pending.into_iter().try_fold(Tensor::new(), |_, one| one.wait(deadline)))
    }
    /// Waits for the result.
    ///
    /// # Errors
    /// [`ExitCode::Failed`], with the channel and the collective, if the collective is unfinished after `deadline`.
    pub fn wait(self, deadline: Duration) -> Result<Tensor> {
        (self.finish)(deadline)
    }
    /// Waits and discards the result, for collectives that work in place.
    ///
    /// # Errors
    /// The same as those of [`wait`](Self::wait).
    pub fn wait_done(self, deadline: Duration) -> Result<()> {
        self.wait(deadline).map(drop)
    }
}
