//! Counts what is asked of Rust's allocator, by a thread or by the process, so that a test can say "no more than".

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    /// Bytes held now, the most of them, and bytes ever asked for, by this thread.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

/// Requests for memory so far, by all threads.
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
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
    let _ = ASKED.try_with(|asked| asked.set(asked.get() + change.max(0) as usize));
}

// SAFETY: every call is handed on to the system's allocator as it came.
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

/// How often the process has asked for memory. Only a process of one's own makes sense of it.
pub fn calls() -> usize {
    CALLS.load(Ordering::Relaxed)
}

/// What `work` gives, the most bytes that it held at once, and all that it asked for.
pub fn counted<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    let (held, asked) = (HELD.get(), ASKED.get());
    MOST.set(held);
    let made = work();
    (made, (MOST.get() - held).max(0) as usize, ASKED.get() - asked)
}
