//! What would be launched, without launching it: which blocks an operation asks for at a shape.

use super::{Launch, Variant};
use crate::fault::Result;
use std::cell::RefCell;

/// A launch that was not made.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The file of kernels, its variant, and the kernel.
    pub source: &'static str,
    pub variant: Variant,
    pub entry: &'static str,
    pub grid: [u32; 3],
    pub threads: u32,
    /// Bytes of shared memory a block.
    pub shared: usize,
}

thread_local! {
    static LIST: RefCell<Option<Vec<Planned>>> = const { RefCell::new(None) };
}

/// The launches that `work` would make on this thread. None is made, so that what it computes holds nothing; all else that
/// it does is done.
pub fn planned(work: impl FnOnce() -> Result<()>) -> Result<Vec<Planned>> {
    LIST.set(Some(Vec::new()));
    let done = work();
    let list = LIST.take().unwrap_or_default();
    done.map(|()| list)
}

/// Notes the launch where only plans are wanted. Returns whether they are.
pub(super) fn note(launch: &Launch) -> bool {
    LIST.with_borrow_mut(|list| {
        let Some(list) = list else { return false };
        let Launch { source, variant, entry, grid, threads, shared } = launch;
        let (source, variant) = (source.name, variant.clone());
        list.push(Planned { source, variant, entry, grid: *grid, threads: *threads, shared: *shared });
        true
    })
}
