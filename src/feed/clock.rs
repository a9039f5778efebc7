//! What the conveyor's stages cost, in seconds of processor.

use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// A stage of the conveyor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Bytes come from a disk. From a store they come on threads of their own.
    Fetch,
    /// They become pixels.
    Decode,
    /// Pixels become a view.
    View,
    /// Views are laid into steps.
    Batch,
}

/// Nanoseconds of processor that each stage took so far, over all threads, and the rows made.
#[derive(Debug, Default)]
pub struct Clock {
    stages: [AtomicU64; 4],
    rows: AtomicU64,
}

impl Clock {
    /// Runs a stage's work on this thread's processor time.
    pub fn of<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let began = now(ClockId::ThreadCPUTime);
        let done = work();
        self.stages[stage as usize].fetch_add(now(ClockId::ThreadCPUTime) - began, Ordering::Relaxed);
        done
    }

    /// Books so many nanoseconds of a stage to another.
    pub fn part_of(&self, whole: Stage, part: Stage, nanoseconds: u64) {
        self.stages[whole as usize].fetch_sub(nanoseconds, Ordering::Relaxed);
        self.stages[part as usize].fetch_add(nanoseconds, Ordering::Relaxed);
    }

    pub fn rows_made(&self, count: u64) {
        self.rows.fetch_add(count, Ordering::Relaxed);
    }

    /// Rows made so far.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Seconds of processor of a stage so far.
    pub fn seconds(&self, stage: Stage) -> f64 {
        self.stages[stage as usize].load(Ordering::Relaxed) as f64 / 1e9
    }
}

/// Seconds of processor of the whole process so far.
pub fn process_seconds() -> f64 {
    now(ClockId::ProcessCPUTime) as f64 / 1e9
}

fn now(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
