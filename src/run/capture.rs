//! Parts of a step as CUDA graphs: run as they are a few times, then captured, from then on launched whole.
//!
//! What is captured reads and writes the same memory at every launch, so that all of it must outlive the graph. While a
//! capture is under way the world's watchdog looks away, since nothing that is captured ever finishes; afterwards it
//! looks at the end of each launch that holds collectives.
//!
//! NCCL wants a collective captured on every rank or on none, and launched alike. So what decides is how often a part has
//! run, which is the same on every rank as long as the parts of every step that hold collectives are the same parts, or
//! some of several whose turns come alike on every rank.

use crate::bridge::cuda::{Graph, Pool, Stream, empty_cache};
use crate::device::World;
use crate::fault::Result;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tch::Tensor;

/// How often a part runs as it is: kernels are compiled, libraries set up and communicators made by then. The first run
/// does most of it; the second begins where the first left the allocator.
const WARM: u32 = 3;

/// Which part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// Its number of samples and of their frames.
    pub size: [i64; 2],
    /// Whether it is the first where ranks keep shares of the weights, and brings those to all.
    pub gathers: bool,
    /// Whether it is the last, which reduces and updates.
    pub last: bool,
}

/// The parts of a step by their shapes, one after the other on one stream.
pub struct Graphs {
    stream: Stream,
    /// One for all graphs: they never run at the same time.
    pool: Pool,
    world: Arc<dyn World>,
    deadline: Duration,
    parts: HashMap<Part, State>,
}

enum State {
    /// It has run so often.
    Run(u32),
    /// And what it returned, which every launch writes anew.
    Captured(Graph, Option<Tensor>),
}

impl Graphs {
    /// On `stream`, which is its thread's current one from here on; a launch may take until `deadline`.
    pub fn new(stream: Stream, world: Arc<dyn World>, deadline: Duration) -> Result<Graphs> {
        Ok(Graphs { stream, pool: Pool::new()?, world, deadline, parts: HashMap::new() })
    }

    /// Queues a part. `body` is called while it is not captured; it allocates on the current stream, waits for nothing
    /// and does the same at every call.
    ///
    /// # Errors
    /// A fault of `body`, and whatever in it cannot be captured. The latter leaves libtorch's allocator in a state that
    /// is not to be relied on: leave the process.
    pub fn run(&mut self, part: Part, body: impl FnOnce() -> Result<Option<Tensor>>) -> Result<Option<Tensor>> {
        let runs = match self.parts.entry(part).or_insert(State::Run(0)) {
            State::Captured(..) => return self.launch(part),
            State::Run(runs) => runs,
        };
        if *runs < WARM {
            *runs += 1;
            return body();
        }
        // What the runs before have left in the allocator's hands is wanted for the pool.
        empty_cache()?;
        let looking_away = LookingAway::from(self.world.as_ref());
        let captured = Graph::capture(&self.stream, self.pool, body);
        drop(looking_away);
        let (graph, made) = captured.map_err(|fault| {
            fault.at("the step could not be captured as a CUDA graph; train.graph = false goes without")
        })?;
        self.parts.insert(part, State::Captured(graph, made));
        self.launch(part)
    }

    fn launch(&self, part: Part) -> Result<Option<Tensor>> {
        let Some(State::Captured(graph, made)) = self.parts.get(&part) else { unreachable!("captured before") };
        graph.replay()?;
        if part.gathers || part.last {
            self.world.launched(self.deadline)?;
        }
        Ok(made.as_ref().map(Tensor::shallow_clone))
    }

    /// How many parts have been captured.
    pub fn captured(&self) -> usize {
        self.parts.values().filter(|state| matches!(state, State::Captured(..))).count()
    }
}

/// While it lives, nobody asks after collectives that are under way.
struct LookingAway<'a>(&'a dyn World);

impl<'a> From<&'a dyn World> for LookingAway<'a> {
    fn from(world: &'a dyn World) -> Self {
        world.look(false);
        LookingAway(world)
    }
}

impl Drop for LookingAway<'_> {
    fn drop(&mut self) {
        self.0.look(true);
    }
}
