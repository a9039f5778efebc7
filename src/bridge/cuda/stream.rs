//! CUDA streams: queues of work on a device.

use super::event::Event;
use super::table::RawStream;
use super::{call, current_device, use_device};
use crate::fault::Result;
use std::ffi::c_void;
use std::marker::PhantomData;
use tch::Tensor;

/// A stream. Copies name the same one; libtorch's streams live as long as the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub(super) RawStream);

// SAFETY: a name; CUDA's and libtorch's calls on streams may come from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// Which work the device prefers where there is more than it can do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    Normal,
    /// For copies and reductions beside the computation.
    High,
}

impl Stream {
    fn told(what: &str, ask: impl FnOnce(&super::Table, *mut RawStream) -> bool) -> Result<Stream> {
        let mut found = RawStream::NONE;
        call(what, |table| ask(table, &mut found))?;
        Ok(Stream(found))
    }

    /// The stream on which this thread's work on the device is queued.
    pub fn current(device: usize) -> Result<Stream> {
        // SAFETY: a structure to be written.
        Stream::told("the current stream", |table, out| unsafe { (table.stream_current)(device as i64, out) })
    }

    /// The next of libtorch's 32 streams of this priority, in turn: the 33rd is the first again.
    pub fn new(device: usize, priority: Priority) -> Result<Stream> {
        let urgent = priority == Priority::High;
        // SAFETY: a structure to be written.
        Stream::told("a stream", |table, out| unsafe { (table.stream_from_pool)(device as i64, urgent, out) })
    }

    /// A stream that somebody else made, for libtorch to work on.
    ///
    /// # Safety
    /// `raw` is a cudaStream_t of the device that outlives every use of the returned value.
    pub unsafe fn external(raw: *mut c_void, device: usize) -> Result<Stream> {
        // SAFETY: the caller's promise; a structure to be written.
        Stream::told("an external stream", |table, out| unsafe { (table.stream_external)(raw, device as i64, out) })
    }

    /// cudaStream_t, for launches of our own. Null is the default stream.
    pub fn raw(&self) -> *mut c_void {
        self.0.raw
    }

    pub fn device(&self) -> usize {
        self.0.device as usize
    }

    /// Makes it this thread's current stream, and its device the current one, until the returned value is dropped.
    pub fn enter(&self) -> Result<Entered> {
        let entered =
            Entered { stream: Stream::current(self.device())?, device: current_device()?, _this_thread: PhantomData };
        use_device(self.device())?;
        self.make_current()?;
        Ok(entered)
    }

    fn make_current(&self) -> Result<()> {
        // SAFETY: a live structure.
        call("making a stream current", |table| unsafe { (table.stream_make_current)(&self.0) })
    }

    /// What is queued from now on waits for the event; the calling thread does not.
    pub fn wait(&self, event: &Event) -> Result<()> {
        event.block(self)
    }

    /// Whether what is queued becomes part of a graph instead of being computed.
    pub fn is_capturing(&self) -> Result<bool> {
        let mut capturing = false;
        // SAFETY: a live structure, and a place for the answer.
        call("asking a stream", |table| unsafe { (table.stream_capturing)(&self.0, &mut capturing) })?;
        Ok(capturing)
    }

    /// The calling thread waits for everything that is queued.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a live structure.
        call("waiting for a stream", |table| unsafe { (table.stream_synchronize)(&self.0) })
    }
}

/// While it lives, a stream is its thread's current one; afterwards stream and device are those from before.
#[must_use = "the stream is current only while this lives"]
pub struct Entered {
    stream: Stream,
    device: usize,
    /// What is current is a matter of one thread.
    _this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // Both were current before: libtorch has no reason to refuse them.
        if let Err(fault) = self.stream.make_current().and_then(|()| use_device(self.device)) {
            tracing::error!("{fault}");
        }
    }
}

/// Tells the allocator that the tensor's memory is used on a stream other than the one it was made on, so that it is
/// not given to another tensor before what is queued there now is done.
pub fn record_stream(tensor: &Tensor, stream: &Stream) -> Result<()> {
    // SAFETY: a live handle, and a live structure.
    call("record_stream", |table| unsafe { (table.record_stream)(tensor.as_ptr(), &stream.0) })
}
