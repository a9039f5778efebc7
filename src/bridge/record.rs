//! Names and times of the operations that libtorch runs, for traces and for tests of what a step must not do.

use super::check;
use crate::error::Result;
use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

unsafe extern "C" {
    fn occlude_record_start() -> bool;
    fn occlude_record_stop(visit: extern "C" fn(*mut c_void, *const c_char, u64, u64, u64), context: *mut c_void);
    fn occlude_scope_begin(name: *const c_char) -> *mut c_void;
    fn occlude_scope_end(scope: *mut c_void);
}

/// The span of an operation (with its overload name: `aten::add.Tensor`), of a node of a backward pass, or of a
/// [`scope`]. Spans of one thread nest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceSpan {
    pub name: String,
    /// Id that libtorch gave to the thread.
    pub thread: u64,
    /// Nanoseconds of the steady clock (CLOCK_MONOTONIC).
    pub start_ns: u64,
    pub end_ns: u64,
}

impl TraceSpan {
    /// Returns whether `other` ran on the same thread and entirely within this span.
    pub fn contains(&self, other: &TraceSpan) -> bool {
        self.thread == other.thread && self.start_ns <= other.start_ns && other.end_ns <= self.end_ns
    }
}

/// Records the operations of its thread and of the backward passes that the thread starts. The overhead is about a
/// microsecond per operation.
pub struct Recorder {
    /// The C++ side has one list of spans per process: a second recorder waits for the first.
    _lock: MutexGuard<'static, ()>,
    /// Must be started and stopped on one thread.
    _this_thread: PhantomData<*const ()>,
    running: bool,
}

static RECORDER_LOCK: Mutex<()> = Mutex::new(());

impl Recorder {
    /// Starts to record on this thread; waits until no other recorder is alive.
    pub fn start() -> Result<Recorder> {
        let lock = RECORDER_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the lock excludes other recorders.
        check(unsafe { occlude_record_start() }, "recording what libtorch runs")?;
        Ok(Recorder { _lock: lock, _this_thread: PhantomData, running: true })
    }

    /// Stops and returns the spans that began and ended since the start, in the order of their beginning.
    pub fn stop(mut self) -> Vec<TraceSpan> {
        self.take_spans()
    }

    fn take_spans(&mut self) -> Vec<TraceSpan> {
        let mut spans = Vec::new();
        if std::mem::take(&mut self.running) {
            // SAFETY: started on this thread; `push_span` is given the vector that lives through the call.
            unsafe { occlude_record_stop(push_span, std::ptr::from_mut(&mut spans).cast()) };
        }
        spans
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.take_spans();
    }
}

extern "C" fn push_span(spans: *mut c_void, name: *const c_char, thread: u64, start_ns: u64, end_ns: u64) {
    // SAFETY: the vector of `take_spans`, which nothing else touches meanwhile.
    let spans = unsafe { &mut *spans.cast::<Vec<TraceSpan>>() };
    // SAFETY: a C string that lives through the call.
    let name = unsafe { CStr::from_ptr(name) };
    spans.push(TraceSpan { name: name.to_string_lossy().into_owned(), thread, start_ns, end_ns });
}

/// A named span of this program, which ends when the value is dropped.
#[must_use = "the span ends where this is dropped"]
pub struct Scope {
    handle: *mut c_void,
}

/// Begins a named span, as `torch.profiler.record_function` does. Costs almost nothing while nothing records.
pub fn scope(name: &str) -> Scope {
    let name = CString::new(name).expect("a name without NUL");
    // SAFETY: a C string, which is copied.
    Scope { handle: unsafe { occlude_scope_begin(name.as_ptr()) } }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // SAFETY: made by occlude_scope_begin on this thread (it is not Send) and ended once; null is ignored.
        unsafe { occlude_scope_end(self.handle) }
    }
}
