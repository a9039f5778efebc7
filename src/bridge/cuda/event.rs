//! CUDA events.

use super::functions::RawEvent;
use super::{call, library};
use crate::error::Result;
use std::ptr::NonNull;

/// A CUDA event: a point in a stream. Until it is recorded it counts as completed.
pub struct Event(pub(super) NonNull<RawEvent>);

// SAFETY: owned by this value alone, and CUDA ties events to no thread.
unsafe impl Send for Event {}

impl Event {
    /// Creates an event without timing, which is cheaper.
    pub fn new() -> Result<Event> {
        Event::create(false)
    }

    /// Creates an event with timing, for [`Event::elapsed_since`].
    pub fn with_timing() -> Result<Event> {
        Event::create(true)
    }

    fn create(timing: bool) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for a pointer.
        call("an event", |functions| unsafe { (functions.event_create)(timing, &mut event) })?;
        Ok(Event(NonNull::new(event).expect("a call that succeeded writes its result")))
    }

    /// Returns whether all work before the event has completed.
    pub fn is_done(&self) -> Result<bool> {
        let mut done = false;
        // SAFETY: a live event, and a place for the answer.
        call("querying an event", |functions| unsafe { (functions.event_query)(self.0.as_ptr(), &mut done) })?;
        Ok(done)
    }

    /// Blocks the calling thread until the event has completed.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a live event.
        call("waiting for an event", |functions| unsafe { (functions.event_synchronize)(self.0.as_ptr()) })
    }

    /// Returns the device time in milliseconds between `earlier` and this event. Both must have timing and be done.
    pub fn elapsed_since(&self, earlier: &Event) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: two live events, and a place for the answer.
        call("the time between two events", |functions| unsafe {
            (functions.event_elapsed)(earlier.0.as_ptr(), self.0.as_ptr(), &mut milliseconds)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let library = library().expect("loaded, since it made this event");
        // SAFETY: made by event_create and not used again.
        unsafe { (library.functions.event_destroy)(self.0.as_ptr()) }
    }
}
