//! Communicators, and the tensors of their collectives in flight.

use super::library::{CommHandle, NcclLibrary, UniqueId};
use crate::bridge::cuda::{Stream, record_stream};
use crate::error::Result;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use tch::Tensor;

/// A communicator. It is aborted, not destroyed, when it is dropped, because destroying waits for ranks that may be
/// lost.
pub struct Comm {
    handle: Mutex<CommHandle>,
    aborted: AtomicBool,
    /// A CUDA graph contains collectives of this communicator.
    captured: AtomicBool,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time, which the lock ensures.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Comm {
    /// Creates a communicator; collective. Every rank must pass the same id.
    pub fn open(id: UniqueId, rank: usize, size: usize) -> Result<Comm> {
        let library = NcclLibrary::get()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for a handle; every rank calls this with the same id.
        let status = unsafe { (library.comm_init_rank)(&mut handle, size as c_int, id, rank as c_int) };
        library.check(status, "a communicator")?;
        Ok(Comm { handle: Mutex::new(handle), aborted: AtomicBool::new(false), captured: AtomicBool::new(false) })
    }

    /// Runs `body` with exclusive use of the handle.
    pub fn with_handle<T>(&self, body: impl FnOnce(CommHandle) -> T) -> T {
        body(*self.handle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the asynchronous error of the communicator, if there is one.
    pub fn async_error(&self) -> Option<String> {
        let library = NcclLibrary::get().ok()?;
        // SAFETY: alive until it is aborted.
        self.with_handle(|handle| if self.is_aborted() { None } else { unsafe { library.async_error(handle) } })
    }

    /// Returns whether the communicator was aborted.
    pub fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::SeqCst)
    }

    /// Records that a CUDA graph contains collectives of this communicator.
    pub fn mark_captured(&self) {
        self.captured.store(true, Ordering::SeqCst);
    }

    /// Returns whether a CUDA graph contains collectives of this communicator.
    pub fn is_captured(&self) -> bool {
        self.captured.load(Ordering::SeqCst)
    }

    /// Aborts all collectives in flight on this rank. A captured communicator is only marked, because NCCL would wait
    /// for the destruction of the last graph that contains it; the process must then end soon.
    pub fn abort(&self) {
        let already_aborted = self.aborted.swap(true, Ordering::SeqCst);
        if already_aborted || self.is_captured() {
            return;
        }
        if let Ok(library) = NcclLibrary::get() {
            // SAFETY: alive until now, and not used again.
            self.with_handle(|handle| unsafe { (library.comm_abort)(handle) });
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Keeps the tensors of a collective alive until the stream that they belong to waits for the communicator's stream. If
/// it never does, the allocator keeps their memory until the communicator's stream has finished.
pub struct InFlightTensors {
    pub tensors: Vec<Tensor>,
    /// Stream of the communicator.
    pub stream: Stream,
    /// True once the stream of the tensors waits for `stream`.
    pub joined: bool,
}

impl Drop for InFlightTensors {
    fn drop(&mut self) {
        if self.joined {
            return;
        }
        for tensor in &self.tensors {
            if let Err(error) = record_stream(tensor, &self.stream) {
                tracing::error!("{error}");
            }
        }
    }
}
