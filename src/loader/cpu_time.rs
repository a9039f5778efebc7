//! CPU time of the data loader's stages.

use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// A stage of the data loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoaderStage {
    /// Reads bytes from a disk. Fetches from a store run on threads that are not measured.
    Fetch,
    /// Decodes bytes to pixels or audio samples.
    Decode,
    /// Makes views of decoded samples.
    View,
    /// Assembles views into steps.
    Batch,
}

/// CPU time of each stage over all threads, and the number of rows built.
#[derive(Debug, Default)]
pub struct StageCpuTime {
    /// Nanoseconds, indexed by [`LoaderStage`].
    stages: [AtomicU64; 4],
    rows: AtomicU64,
}

impl StageCpuTime {
    /// Runs `work` and adds this thread's CPU time to a stage.
    pub fn measure<T>(&self, stage: LoaderStage, work: impl FnOnce() -> T) -> T {
        let start = cpu_nanoseconds(ClockId::ThreadCPUTime);
        let result = work();
        let elapsed = cpu_nanoseconds(ClockId::ThreadCPUTime) - start;
        self.stages[stage as usize].fetch_add(elapsed, Ordering::Relaxed);
        result
    }

    /// Moves nanoseconds from one stage to another.
    pub fn reassign(&self, from: LoaderStage, to: LoaderStage, nanoseconds: u64) {
        self.stages[from as usize].fetch_sub(nanoseconds, Ordering::Relaxed);
        self.stages[to as usize].fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Adds to the number of rows built.
    pub fn add_rows(&self, count: u64) {
        self.rows.fetch_add(count, Ordering::Relaxed);
    }

    /// Returns the number of rows built so far.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Returns the CPU seconds of a stage so far.
    pub fn seconds(&self, stage: LoaderStage) -> f64 {
        self.stages[stage as usize].load(Ordering::Relaxed) as f64 / 1e9
    }
}

/// Returns the CPU seconds of the whole process so far.
pub fn process_cpu_seconds() -> f64 {
    cpu_nanoseconds(ClockId::ProcessCPUTime) as f64 / 1e9
}

fn cpu_nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
