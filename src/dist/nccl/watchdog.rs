//! The watchdog, which ends a job with a hung collective: NCCL waits for a lost rank forever.

use super::comm::Comm;
use crate::bridge::cuda::Event;
use crate::dist::world::World;
use crate::error::{Error, ExitCode, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Work in flight: a collective, or a launched graph of several.
pub struct WatchedWork {
    /// Name of the work in an error.
    pub description: String,
    /// Event behind the work.
    pub done: Event,
    /// The communicators that the work uses.
    pub comms: Vec<Arc<Comm>>,
    pub started: Instant,
    pub deadline: Duration,
}

/// The watchdog of one rank.
#[derive(Clone, Default)]
pub struct Watchdog(Arc<Mutex<WatchdogState>>);

#[derive(Default)]
struct WatchdogState {
    work: Vec<WatchedWork>,
    disabled: bool,
}

/// Work that failed or is late.
struct WorkFailure {
    comms: Vec<Arc<Comm>>,
    message: String,
}

/// Time between two checks.
const PERIOD: Duration = Duration::from_millis(100);

impl Watchdog {
    /// Starts the thread of the watchdog. If work fails or is late, it reports this once, aborts the communicators and
    /// ends the job with exit code 70.
    pub fn start(world: Arc<dyn World>) -> Result<Watchdog> {
        let watchdog = Watchdog::default();
        let state = Arc::downgrade(&watchdog.0);
        let run = move || {
            while let Some(state) = state.upgrade() {
                let failure = lock(&state).find_failure();
                if let Some(failure) = failure {
                    failure.end_job(world.as_ref());
                }
                drop(state);
                std::thread::sleep(PERIOD);
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(run);
        thread.map_err(|error| Error::failed(format!("watchdog: cannot start its thread: {error}.")))?;
        Ok(watchdog)
    }

    /// Adds work to be watched.
    pub fn watch(&self, work: WatchedWork) {
        lock(&self.0).work.push(work);
    }

    /// Enables or disables the checks; deadlines continue to run. When this returns, no check is in progress.
    pub fn set_enabled(&self, enabled: bool) {
        lock(&self.0).disabled = !enabled;
    }
}

impl WorkFailure {
    fn end_job(&self, world: &dyn World) -> ! {
        // Rank 0 reports first, as in `report_and_abort`, so that an error of all ranks is reported once.
        std::thread::sleep(Duration::from_millis(1500) * world.rank().min(2) as u32);
        eprintln!("rank {}: {}", world.rank(), self.message);
        self.comms.iter().for_each(|comm| comm.abort());
        world.abort(ExitCode::Failed)
    }
}

fn lock(state: &Mutex<WatchdogState>) -> MutexGuard<'_, WatchdogState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WatchdogState {
    /// Removes finished work, and returns the first work that failed or is late.
    fn find_failure(&mut self) -> Option<WorkFailure> {
        if self.disabled {
            return None;
        }
        let mut failure = None;
        self.work.retain(|work| {
            let is_done = work.done.is_done();
            let async_error = work.comms.iter().find_map(|comm| comm.async_error());
            let reason = match (is_done, async_error) {
                (Ok(true), _) => return false,
                (Err(error), _) => error.message,
                (_, Some(error)) => error,
                _ if work.started.elapsed() > work.deadline => format!(
                    "unfinished after {:.1} s: another rank is lost, hung or far behind",
                    work.started.elapsed().as_secs_f64()
                ),
                _ => return true,
            };
            failure.get_or_insert_with(|| WorkFailure {
                comms: work.comms.clone(),
                message: format!("{}: {reason}. Ending the job.", work.description),
            });
            true
        });
        failure
    }
}
