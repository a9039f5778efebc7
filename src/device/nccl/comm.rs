//! A communicator, and what its collectives have in hand.

use super::library::{Handle, Id, Library};
use crate::bridge::cuda::{Stream, record_stream};
use crate::fault::Result;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use tch::Tensor;

/// A communicator. It is given up rather than closed at its end, for closing waits for ranks that may be gone.
pub struct Comm {
    handle: Mutex<Handle>,
    gone: AtomicBool,
    /// A graph has work of it.
    captured: AtomicBool,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time; the lock sees to that.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Comm {
    /// Collective; every rank gives the same id.
    pub fn open(id: Id, rank: usize, size: usize) -> Result<Comm> {
        let (library, mut handle) = (Library::get()?, std::ptr::null_mut());
        // SAFETY: a place for a handle; every rank calls this with the same id.
        let code = unsafe { (library.comm_init_rank)(&mut handle, size as c_int, id, rank as c_int) };
        library.checked(code, "a communicator")?;
        Ok(Comm { handle: Mutex::new(handle), gone: AtomicBool::new(false), captured: AtomicBool::new(false) })
    }

    /// Does something with the handle, while nobody else does.
    pub fn with<T>(&self, act: impl FnOnce(Handle) -> T) -> T {
        act(*self.handle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What has gone wrong since it was opened, if anything.
    pub fn trouble(&self) -> Option<String> {
        let library = Library::get().ok()?;
        // SAFETY: alive until it is given up.
        self.with(|handle| if self.gone() { None } else { unsafe { library.trouble(handle) } })
    }

    /// Whether it was given up.
    pub fn gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    /// Work of it becomes part of a graph.
    pub fn capture(&self) {
        self.captured.store(true, Ordering::SeqCst);
    }

    /// Whether a graph has work of it.
    pub fn captured(&self) -> bool {
        self.captured.load(Ordering::SeqCst)
    }

    /// Ends everything under way on this rank; once. A communicator that has been captured is left to the end of the
    /// process instead, which is to be near: NCCL would wait until the last graph with work of it is gone.
    pub fn abort(&self) {
        let first = !self.gone.swap(true, Ordering::SeqCst);
        if let (Ok(library), true) = (Library::get(), first && !self.captured()) {
            // SAFETY: alive until now, and not used again.
            self.with(|handle| unsafe { (library.comm_abort)(handle) });
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.abort();
    }
}

/// What a collective reads and writes, which stays where it is until the stream that the tensors belong to has been
/// joined with the communicator's. If it never is, their memory waits for the latter by itself.
pub struct Held {
    pub tensors: Vec<Tensor>,
    /// The communicator's.
    pub stream: Stream,
    pub joined: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        for tensor in self.tensors.iter().filter(|_| !self.joined) {
            if let Err(fault) = record_stream(tensor, &self.stream) {
                tracing::error!("{fault}");
            }
        }
    }
}
