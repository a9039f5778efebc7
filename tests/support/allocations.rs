//! Counts allocations, per thread or of the process, so that tests can bound them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    /// Bytes held now, their maximum, and bytes ever allocated, by this thread.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MAX_HELD: Cell<isize> = const { Cell::new(0) };
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

/// Number of allocations so far, by all threads.
static CALLS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn count(change: isize) {
    if change > 0 {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
    // A thread that ends has lost its counters already.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + change);
        let _ = MAX_HELD.try_with(|max| max.set(max.get().max(held.get())));
    });
    let _ = ALLOCATED.try_with(|request| request.set(request.get() + change.max(0) as usize));
}

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize);
        count(-(layout.size() as isize));
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Returns the number of allocations of the process. Only useful in a process of its own.
pub fn allocation_count() -> usize {
    CALLS.load(Ordering::Relaxed)
}

/// Returns the result of `work`, the maximum of bytes held at once, and all bytes allocated.
pub fn count_allocations<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    let held = HELD.get();
    let request = ALLOCATED.get();
    MAX_HELD.set(held);
    let output = work();
    (output, (MAX_HELD.get() - held).max(0) as usize, ALLOCATED.get() - request)
}
