//! Parts of a step as CUDA graphs: run as they are a few times, then captured, from then on launched whole.
//!
//! A captured part reads and writes the same memory at every launch, so that all of it must outlive the graph. During a
//! capture the world's watchdog is paused, because nothing that is captured ever finishes; afterwards it looks at the
//! end of each launch that holds collectives.
//!
//! NCCL wants a collective captured on every rank or on none, and launched alike. So what decides is how often a part
//! has run, which is the same on every rank as long as the parts of every step that hold collectives are the same
//! parts, or some of several whose turns come alike on every rank.

use crate::bridge::cuda::{Graph, GraphPool, Stream, empty_cache};
use crate::dist::World;
use crate::error::Result;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tch::Tensor;

/// Runs of a part before it is captured: kernels are compiled, libraries set up and communicators made by then. The
/// first run does most of it; the second begins where the first left the allocator.
const WARMUP_RUNS: u32 = 3;

/// Identifies a part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepPart {
    /// Number of samples, and of their frames.
    pub size: [i64; 2],
    /// It starts the all-gather of sharded weights.
    pub gathers_weights: bool,
    /// It sums the counts of loss terms over ranks.
    pub sums_counts: bool,
    /// It reduces and updates.
    pub is_last: bool,
}

/// The parts of a step by their shapes, one after the other on one stream.
pub struct GraphCache {
    stream: Stream,
    /// One memory pool for all graphs: they never run at the same time.
    pool: GraphPool,
    world: Arc<dyn World>,
    timeout: Duration,
    parts: HashMap<StepPart, GraphState>,
}

enum GraphState {
    /// The number of runs so far.
    Warmup(u32),
    /// The graph, and what the part returned, which every launch writes anew.
    Captured(Graph, Option<Tensor>),
}

impl GraphCache {
    /// For `stream`, which is its thread's current one from here on; a launch may take until `timeout`.
    pub fn new(stream: Stream, world: Arc<dyn World>, timeout: Duration) -> Result<GraphCache> {
        Ok(GraphCache { stream, pool: GraphPool::new()?, world, timeout, parts: HashMap::new() })
    }

    /// Queues a part. `body` is called while it is not captured; it allocates on the current stream, waits for nothing
    /// and does the same at every call.
    ///
    /// # Errors
    /// An error of `body`, or anything in it that cannot be captured. The latter leaves libtorch's allocator in a state
    /// that cannot be relied on: leave the process.
    pub fn run(&mut self, part: StepPart, body: impl FnOnce() -> Result<Option<Tensor>>) -> Result<Option<Tensor>> {
        let runs = match self.parts.entry(part).or_insert(GraphState::Warmup(0)) {
            GraphState::Captured(..) => return self.launch(part),
            GraphState::Warmup(runs) => runs,
        };
        if *runs < WARMUP_RUNS {
            *runs += 1;
            return body();
        }
        // Memory that the runs before have left with the allocator is wanted for the pool.
        empty_cache()?;
        let pause = WatchdogPause::from(self.world.as_ref());
        let captured = Graph::capture(&self.stream, self.pool, body);
        drop(pause);
        let (graph, output) = captured.map_err(|error| {
            error.with_context("the step could not be captured as a CUDA graph; train.cuda_graph = false goes without")
        })?;
        self.parts.insert(part, GraphState::Captured(graph, output));
        self.launch(part)
    }

    fn launch(&self, part: StepPart) -> Result<Option<Tensor>> {
        let Some(GraphState::Captured(graph, output)) = self.parts.get(&part) else { unreachable!("captured before") };
        graph.replay()?;
        if part.gathers_weights || part.sums_counts || part.is_last {
            self.world.graph_launched(self.timeout)?;
        }
        Ok(output.as_ref().map(Tensor::shallow_clone))
    }

    /// Number of parts that have been captured.
    pub fn captured_parts(&self) -> usize {
        self.parts.values().filter(|state| matches!(state, GraphState::Captured(..))).count()
    }
}

/// Pauses the watchdog of a world while it lives.
struct WatchdogPause<'a>(&'a dyn World);

impl<'a> From<&'a dyn World> for WatchdogPause<'a> {
    fn from(world: &'a dyn World) -> Self {
        world.set_watchdog(false);
        WatchdogPause(world)
    }
}

impl Drop for WatchdogPause<'_> {
    fn drop(&mut self) {
        self.0.set_watchdog(true);
    }
}
