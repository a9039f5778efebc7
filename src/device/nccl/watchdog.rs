//! What ends a job whose reduction hangs: NCCL waits for a lost rank for ever.

use super::comm::Comm;
use crate::bridge::cuda::Event;
use crate::device::world::World;
use crate::fault::{Code, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is under way: a collective, or a launched graph of several.
pub struct Watched {
    pub what: String,
    pub done: Event,
    /// The communicators that it uses.
    pub comms: Vec<Arc<Comm>>,
    pub since: Instant,
    pub deadline: Duration,
}

/// Looks after the collectives of one rank.
#[derive(Clone, Default)]
pub struct Watchdog(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    watched: Vec<Watched>,
    looking_away: bool,
}

const PERIOD: Duration = Duration::from_millis(100);

impl Watchdog {
    /// Starts looking. Whatever is late or broken is given up and told once, and the job ended with exit code 70.
    pub fn start(world: Arc<dyn World>) -> Result<Watchdog> {
        let dog = Watchdog::default();
        let seen = Arc::downgrade(&dog.0);
        let look = move || {
            while let Some(state) = seen.upgrade() {
                let trouble = lock(&state).trouble();
                if let Some((comms, story)) = trouble {
                    // Rank 0 speaks first, as in `fail`: a fault that all ranks share is told once.
                    std::thread::sleep(Duration::from_millis(1500) * world.rank().min(2) as u32);
                    eprintln!("rank {}: {story}", world.rank());
                    comms.iter().for_each(|comm| comm.abort());
                    world.abort(Code::Failed);
                }
                drop(state);
                std::thread::sleep(PERIOD);
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(look);
        thread.map_err(|error| crate::fault::Fault::failed(format!("watchdog: no thread for it: {error}.")))?;
        Ok(dog)
    }

    pub fn watch(&self, watched: Watched) {
        lock(&self.0).watched.push(watched);
    }

    /// Looks away until told to look again; deadlines go on. Where this returns, no look is under way.
    pub fn look(&self, on: bool) {
        lock(&self.0).looking_away = !on;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Forgets what has finished; the first that never will, and why.
    fn trouble(&mut self) -> Option<(Vec<Arc<Comm>>, String)> {
        if self.looking_away {
            return None;
        }
        let mut found = None;
        self.watched.retain(|one| {
            let done = one.done.is_done();
            let late = one.since.elapsed() > one.deadline;
            let story = match (done, one.comms.iter().find_map(|comm| comm.trouble())) {
                (Ok(true), _) => return false,
                (Err(fault), _) => fault.message,
                (_, Some(trouble)) => trouble,
                _ if late => format!(
                    "unfinished after {:.1} s: another rank is lost, hung or far behind",
                    one.since.elapsed().as_secs_f64()
                ),
                _ => return true,
            };
            found.get_or_insert((one.comms.clone(), format!("{}: {story}. Ending the job.", one.what)));
            true
        });
        found
    }
}
