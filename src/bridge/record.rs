//! What libtorch runs, by name and time: for tests that say what a step must not do, and for traces.

use super::checked;
use crate::fault::Result;
use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

unsafe extern "C" {
    fn occlude_record_start() -> bool;
    fn occlude_record_stop(each: extern "C" fn(*mut c_void, *const c_char, u64, u64, u64), context: *mut c_void);
    fn occlude_scope_begin(name: *const c_char) -> *mut c_void;
    fn occlude_scope_end(scope: *mut c_void);
}

/// An operation (`aten::add.Tensor`: with its overload where it has one), a node of a backward pass, or a [`scope`] of
/// our own. Spans of a thread nest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub name: String,
    /// libtorch's number for the thread that ran it.
    pub thread: u64,
    /// Nanoseconds of the steady clock (CLOCK_MONOTONIC).
    pub start_ns: u64,
    pub end_ns: u64,
}

impl Span {
    /// Whether all of `other` ran inside this.
    pub fn holds(&self, other: &Span) -> bool {
        self.thread == other.thread && self.start_ns <= other.start_ns && other.end_ns <= self.end_ns
    }
}

/// Notes what its thread runs, and the backward passes that the thread starts, on whatever thread they run. It costs
/// about a microsecond an operation.
pub struct Recorder {
    /// There is one notebook in a process: whoever comes second waits.
    _turn: MutexGuard<'static, ()>,
    /// Started and stopped on one thread.
    _this_thread: PhantomData<*const ()>,
    running: bool,
}

static TURN: Mutex<()> = Mutex::new(());

impl Recorder {
    pub fn start() -> Result<Recorder> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody else records, by the lock.
        checked(unsafe { occlude_record_start() }, "recording what libtorch runs")?;
        Ok(Recorder { _turn: turn, _this_thread: PhantomData, running: true })
    }

    /// What has begun and ended since the start, in the order in which it began.
    pub fn stop(mut self) -> Vec<Span> {
        self.end()
    }

    fn end(&mut self) -> Vec<Span> {
        let mut spans = Vec::new();
        if std::mem::take(&mut self.running) {
            // SAFETY: started on this thread; `note` is given the vector that lives through the call.
            unsafe { occlude_record_stop(note, std::ptr::from_mut(&mut spans).cast()) };
        }
        spans
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.end();
    }
}

extern "C" fn note(spans: *mut c_void, name: *const c_char, thread: u64, start_ns: u64, end_ns: u64) {
    // SAFETY: the vector that `end` gave, which nobody else touches meanwhile, and a C string that lives through the call.
    let (spans, name) = unsafe { (&mut *spans.cast::<Vec<Span>>(), CStr::from_ptr(name)) };
    spans.push(Span { name: name.to_string_lossy().into_owned(), thread, start_ns, end_ns });
}

/// A span of our own, from [`scope`] to where it is dropped.
#[must_use = "the span ends where this is dropped"]
pub struct Scope {
    handle: *mut c_void,
}

/// Begins a span. Costs next to nothing where nobody records.
pub fn scope(name: &str) -> Scope {
    let name = CString::new(name).expect("a name without NUL");
    // SAFETY: a C string, which is copied.
    Scope { handle: unsafe { occlude_scope_begin(name.as_ptr()) } }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // SAFETY: made by occlude_scope_begin on this thread (it is not Send) and ended once; null is nothing.
        unsafe { occlude_scope_end(self.handle) }
    }
}
