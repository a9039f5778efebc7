//! CUDA graphs: work that was queued once and is launched again as a whole, with the same addresses.

use super::stream::Stream;
use super::table::{RawGraph, RawPool};
use super::{call, half, synchronize};
use crate::fault::Result;
use std::ptr::NonNull;

/// Memory for what graphs compute on the way. Graphs that share one must be replayed in the order of their capture,
/// and not at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool(RawPool);

impl Pool {
    pub fn new() -> Result<Pool> {
        let mut pool = RawPool::default();
        // SAFETY: a structure to be written.
        call("a memory pool", |table| unsafe { (table.pool_create)(&mut pool) })?;
        Ok(Pool(pool))
    }
}

/// Captured work. It reads and writes the memory of the tensors that it was captured with, which must outlive it.
pub struct Graph(NonNull<RawGraph>);

// SAFETY: owned by this value alone, and CUDA ties graphs to no thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `body` queues on `stream`, which is its thread's current stream meanwhile and not the default one.
    /// Nothing of it is computed before the first replay. What `body` returns are the tensors that replays write to.
    ///
    /// The capture is thread-local: other threads may ask anything of CUDA meanwhile. Whatever libtorch sets up at an
    /// operation's first use must have been used before: run `body` a few times first.
    ///
    /// # Errors
    /// A fault of `body`, and whatever in it cannot be captured (a copy to the host, a wait). After the latter libtorch's
    /// allocator may be left inside the pool: leave the process.
    pub fn capture<T>(stream: &Stream, pool: Pool, body: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        synchronize(stream.device())?;
        let _entered = stream.enter()?;
        let mut graph = std::ptr::null_mut();
        // SAFETY: a place for a pointer.
        call("a graph", |table| unsafe { (table.graph_create)(&mut graph) })?;
        let graph = Graph(NonNull::new(graph).expect("a call that succeeded writes its result"));
        // SAFETY: a live graph, and a live structure.
        call("beginning a capture", |table| unsafe { (table.graph_begin)(graph.0.as_ptr(), &pool.0) })?;
        let capture = Capture(&graph);
        let made = body();
        let ended = capture.end();
        // The body's own fault says more than that its capture ended badly.
        let made = made?;
        ended?;
        Ok((graph, made))
    }

    /// Launches the work on the current stream of the device that it was captured on.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: a live graph; a replay is queued on one stream by one thread, since a graph is not shared (not Sync).
        call("replaying a graph", |table| unsafe { (table.graph_replay)(self.0.as_ptr()) })
    }

    /// Gives its memory back to the pool, once no replay is under way.
    pub fn reset(self) -> Result<()> {
        // SAFETY: a live graph, which is not used again.
        call("resetting a graph", |table| unsafe { (table.graph_reset)(self.0.as_ptr()) })
    }
}

/// A capture under way, which is ended also where its body panics.
struct Capture<'a>(&'a Graph);

impl Capture<'_> {
    fn end(self) -> Result<()> {
        let graph = std::mem::ManuallyDrop::new(self).0;
        // SAFETY: a live graph that is capturing.
        call("ending a capture", |table| unsafe { (table.graph_end)(graph.0.as_ptr()) })
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        let graph = self.0.0.as_ptr();
        // SAFETY: a live graph that is capturing. The panic is the news, not how the capture ended.
        let _ = call("ending a capture", |table| unsafe { (table.graph_end)(graph) });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let half = half().expect("open, since it made this graph");
        // SAFETY: made by graph_create and not used again.
        unsafe { (half.table.graph_destroy)(self.0.as_ptr()) }
    }
}
