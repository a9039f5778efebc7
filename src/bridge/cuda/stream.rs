//! CUDA streams.

use super::event::Event;
use super::functions::{CudaFns, RawStream};
use super::{call, current_device, set_device};
use crate::error::Result;
use std::ffi::c_void;
use std::marker::PhantomData;
use tch::Tensor;

/// A handle of a CUDA stream. Copies refer to the same stream; libtorch's streams live as long as the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub(super) RawStream);

// SAFETY: a handle; CUDA's and libtorch's calls on streams may come from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// Scheduling priority of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    Normal,
    /// For copies and reductions that overlap with the computation.
    High,
}

impl Stream {
    fn from_call(what: &str, body: impl FnOnce(&CudaFns, *mut RawStream) -> bool) -> Result<Stream> {
        let mut stream = RawStream::NULL;
        call(what, |functions| body(functions, &mut stream))?;
        Ok(Stream(stream))
    }

    /// Returns the current stream of this thread on a device.
    pub fn current(device: usize) -> Result<Stream> {
        // SAFETY: a structure to be written.
        Stream::from_call("the current stream", |functions, out| unsafe {
            (functions.stream_current)(device as i64, out)
        })
    }

    /// Returns the next stream of libtorch's pool of 32 streams per priority (round-robin: the 33rd is the first
    /// again).
    pub fn new(device: usize, priority: Priority) -> Result<Stream> {
        let high = priority == Priority::High;
        // SAFETY: a structure to be written.
        Stream::from_call("a stream", |functions, out| unsafe {
            (functions.stream_from_pool)(device as i64, high, out)
        })
    }

    /// Wraps a stream that was made elsewhere for use by libtorch.
    ///
    /// # Safety
    /// `raw` is a cudaStream_t of the device that outlives every use of the returned value.
    pub unsafe fn from_external(raw: *mut c_void, device: usize) -> Result<Stream> {
        // SAFETY: the caller's promise; a structure to be written.
        Stream::from_call("an external stream", |functions, out| unsafe {
            (functions.stream_external)(raw, device as i64, out)
        })
    }

    /// Returns the cudaStream_t for kernel launches. Null is the default stream.
    pub fn raw(&self) -> *mut c_void {
        self.0.raw
    }

    /// Returns the index of the stream's device.
    pub fn device(&self) -> usize {
        self.0.device as usize
    }

    /// Makes this the current stream of the thread, and its device the current device, until the guard is dropped.
    pub fn set_current(&self) -> Result<StreamGuard> {
        let guard = StreamGuard {
            stream: Stream::current(self.device())?,
            device: current_device()?,
            _this_thread: PhantomData,
        };
        set_device(self.device())?;
        self.make_current()?;
        Ok(guard)
    }

    fn make_current(&self) -> Result<()> {
        // SAFETY: a live structure.
        call("making a stream current", |functions| unsafe { (functions.stream_set_current)(&self.0) })
    }

    /// Makes work that is queued from now on wait for the event. Does not block the calling thread.
    pub fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: a live event; CUDA only reads it here.
        call("waiting for an event", |functions| unsafe { (functions.event_block)(event.0.as_ptr(), &self.0) })
    }

    /// Returns whether work on this stream is being captured into a graph.
    pub fn is_capturing(&self) -> Result<bool> {
        let mut capturing = false;
        // SAFETY: a live structure, and a place for the answer.
        call("querying a stream", |functions| unsafe { (functions.stream_is_capturing)(&self.0, &mut capturing) })?;
        Ok(capturing)
    }

    /// Blocks the calling thread until all queued work has completed.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a live structure.
        call("waiting for a stream", |functions| unsafe { (functions.stream_synchronize)(&self.0) })
    }
}

impl Event {
    /// Records the event behind the work that is queued on the stream by now; replaces an earlier recording.
    pub fn record(&mut self, stream: &Stream) -> Result<()> {
        // SAFETY: a live event that nothing else uses meanwhile.
        call("recording an event", |functions| unsafe { (functions.event_record)(self.0.as_ptr(), &stream.0) })
    }
}

/// A guard that restores the previous current stream and device when it is dropped.
#[must_use = "the stream is current only while this lives"]
pub struct StreamGuard {
    stream: Stream,
    device: usize,
    /// The current stream is per thread.
    _this_thread: PhantomData<*const ()>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        // Both were current before, so libtorch has no reason to refuse them.
        if let Err(error) = self.stream.make_current().and_then(|()| set_device(self.device)) {
            tracing::error!("{error}");
        }
    }
}

/// Tells the caching allocator that the tensor is used on a stream other than the one it was allocated on, so that its
/// memory is not reused before the work that is queued there now is done.
pub fn record_stream(tensor: &Tensor, stream: &Stream) -> Result<()> {
    // SAFETY: a live handle, and a live structure.
    call("record_stream", |functions| unsafe { (functions.record_stream)(tensor.as_ptr(), &stream.0) })
}
