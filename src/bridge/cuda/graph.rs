//! CUDA graphs: work that is captured once and replayed as a whole, at the same addresses.

use super::functions::{RawGraph, RawGraphPool};
use super::stream::Stream;
use super::{call, library, synchronize};
use crate::error::Result;
use std::ptr::NonNull;

/// A memory pool for the intermediate results of graphs. Graphs that share a pool must be replayed in the order of
/// their capture and never concurrently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphPool(RawGraphPool);

impl GraphPool {
    /// Creates a new pool.
    pub fn new() -> Result<GraphPool> {
        let mut pool = RawGraphPool::default();
        // SAFETY: a structure to be written.
        call("a memory pool", |functions| unsafe { (functions.pool_create)(&mut pool) })?;
        Ok(GraphPool(pool))
    }
}

/// A captured CUDA graph. It reads and writes the memory of the tensors that it was captured with, which must outlive
/// it.
pub struct Graph(NonNull<RawGraph>);

// SAFETY: owned by this value alone, and CUDA ties graphs to no thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures the work that `body` queues on `stream`, which is the current stream meanwhile and must not be the
    /// default one. Nothing is computed before the first replay; replays write to the tensors that `body` returns.
    ///
    /// The capture mode is thread-local: other threads may call CUDA meanwhile. Whatever libtorch initializes at the
    /// first use of an operation must be initialized before: run `body` a few times first.
    ///
    /// # Errors
    /// The errors of `body`, and operations in it that cannot be captured (a copy to the host, a wait). After the
    /// latter libtorch's allocator may be left inside the pool, so the process must end.
    pub fn capture<T>(stream: &Stream, pool: GraphPool, body: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        synchronize(stream.device())?;
        let _guard = stream.set_current()?;
        let mut graph = std::ptr::null_mut();
        // SAFETY: a place for a pointer.
        call("a graph", |functions| unsafe { (functions.graph_create)(&mut graph) })?;
        let graph = Graph(NonNull::new(graph).expect("a call that succeeded writes its result"));
        // SAFETY: a live graph, and a live structure.
        call("beginning a capture", |functions| unsafe { (functions.graph_capture_begin)(graph.0.as_ptr(), &pool.0) })?;
        let capture = Capture(&graph);
        let result = body();
        let ended = capture.end();
        // An error of the body also makes its capture fail, and is the cause.
        let result = result?;
        ended?;
        Ok((graph, result))
    }

    /// Launches the graph on the current stream of the device that it was captured on.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: a live graph; a replay is queued on one stream by one thread, since a graph is not shared (not Sync).
        call("replaying a graph", |functions| unsafe { (functions.graph_replay)(self.0.as_ptr()) })
    }

    /// Returns the graph's memory to the pool. No replay may be running.
    pub fn reset(self) -> Result<()> {
        // SAFETY: a live graph, which is not used again.
        call("resetting a graph", |functions| unsafe { (functions.graph_reset)(self.0.as_ptr()) })
    }
}

/// A capture in progress, which ends even if its body panics.
struct Capture<'a>(&'a Graph);

impl Capture<'_> {
    fn end(self) -> Result<()> {
        let graph = std::mem::ManuallyDrop::new(self).0;
        end_capture(graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        // An error here would hide the panic of the body.
        let _ = end_capture(self.0);
    }
}

fn end_capture(graph: &Graph) -> Result<()> {
    // SAFETY: a live graph that is capturing.
    call("ending a capture", |functions| unsafe { (functions.graph_capture_end)(graph.0.as_ptr()) })
}

impl Drop for Graph {
    fn drop(&mut self) {
        let library = library().expect("loaded, since it made this graph");
        // SAFETY: made by graph_create and not used again.
        unsafe { (library.functions.graph_destroy)(self.0.as_ptr()) }
    }
}
