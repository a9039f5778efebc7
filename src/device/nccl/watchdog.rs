//! What ends a job whose reduction hangs: NCCL waits for a lost rank for ever.

use super::Comm;
use crate::bridge::cuda::Event;
use crate::device::world::World;
use crate::fault::{Code, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A collective that is under way.
pub struct Watched {
    pub what: String,
    pub done: Event,
    pub comm: Arc<Comm>,
    pub since: Instant,
    pub deadline: Duration,
}

/// Looks after the collectives of one rank.
#[derive(Clone, Default)]
pub struct Watchdog(Arc<Mutex<Vec<Watched>>>);

const PERIOD: Duration = Duration::from_millis(100);

impl Watchdog {
    /// Starts looking. Whatever is late or broken is given up and told once, and the job ended with exit code 70.
    pub fn start(world: Arc<dyn World>) -> Result<Watchdog> {
        let dog = Watchdog::default();
        let seen = Arc::downgrade(&dog.0);
        let look = move || {
            while let Some(watched) = seen.upgrade() {
                let trouble = trouble(&mut watched.lock().unwrap_or_else(PoisonError::into_inner));
                if let Some((comm, story)) = trouble {
                    // Rank 0 speaks first, as in `fail`: a fault that all ranks share is told once.
                    std::thread::sleep(Duration::from_millis(1500) * world.rank().min(2) as u32);
                    eprintln!("rank {}: {story}", world.rank());
                    comm.abort();
                    world.abort(Code::Failed);
                }
                drop(watched);
                std::thread::sleep(PERIOD);
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(look);
        thread.map_err(|error| crate::fault::Fault::failed(format!("watchdog: no thread for it: {error}.")))?;
        Ok(dog)
    }

    pub fn watch(&self, watched: Watched) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
    }
}

/// Forgets what has finished; the first collective that never will, and why.
fn trouble(watched: &mut Vec<Watched>) -> Option<(Arc<Comm>, String)> {
    let mut found = None;
    watched.retain(|one| {
        let done = one.done.is_done();
        let late = one.since.elapsed() > one.deadline;
        let story = match (done, one.comm.trouble()) {
            (Ok(true), _) => return false,
            (Err(fault), _) => fault.message,
            (_, Some(trouble)) => trouble,
            _ if late => format!(
                "unfinished after {:.1} s: another rank is lost, hung or far behind",
                one.since.elapsed().as_secs_f64()
            ),
            _ => return true,
        };
        found.get_or_insert((one.comm.clone(), format!("{}: {story}. Ending the job.", one.what)));
        true
    });
    found
}
