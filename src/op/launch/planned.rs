//! Records launches instead of executing them, to see the grids that an operation launches for a shape.

use super::{Launch, Variant};
use crate::error::Result;
use std::cell::RefCell;

/// A recorded launch.
#[derive(Clone, Debug)]
pub struct PlannedLaunch {
    /// Name of the source file.
    pub source: &'static str,
    pub variant: Variant,
    /// Name of the kernel.
    pub entry: &'static str,
    pub grid: [u32; 3],
    pub threads: u32,
    /// Dynamic shared memory per block.
    pub shared_bytes: usize,
}

thread_local! {
    static RECORDED: RefCell<Option<Vec<PlannedLaunch>>> = const { RefCell::new(None) };
}

/// Returns the launches that `work` makes on this thread. They are not executed, so that the outputs are uninitialized;
/// everything else that `work` does takes place.
pub fn record_launches(work: impl FnOnce() -> Result<()>) -> Result<Vec<PlannedLaunch>> {
    RECORDED.set(Some(Vec::new()));
    let result = work();
    let launches = RECORDED.take().unwrap_or_default();
    result.map(|()| launches)
}

/// Records the launch if [`record_launches`] is active. Returns whether it is.
pub(super) fn record(launch: &Launch) -> bool {
    RECORDED.with_borrow_mut(|recorded| {
        let Some(recorded) = recorded else { return false };
        let Launch { source, variant, entry, grid, threads, shared_bytes } = launch;
        recorded.push(PlannedLaunch {
            source: source.name,
            variant: variant.clone(),
            entry,
            grid: *grid,
            threads: *threads,
            shared_bytes: *shared_bytes,
        });
        true
    })
}
