//! CUDA events: marks in a stream that others wait for.

use super::stream::Stream;
use super::table::RawEvent;
use super::{call, half};
use crate::fault::Result;
use std::ptr::NonNull;

/// A mark in a stream; until it is recorded, it is nowhere and waited for by nobody.
pub struct Event(NonNull<RawEvent>);

// SAFETY: owned by this value alone, and CUDA ties events to no thread.
unsafe impl Send for Event {}

impl Event {
    /// An event for ordering alone, which is cheaper than one that takes the time.
    pub fn new() -> Result<Event> {
        Event::create(false)
    }

    /// An event for [`Event::since`].
    pub fn timed() -> Result<Event> {
        Event::create(true)
    }

    fn create(timed: bool) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for a pointer.
        call("an event", |table| unsafe { (table.event_create)(timed, &mut event) })?;
        Ok(Event(NonNull::new(event).expect("a call that succeeded writes its result")))
    }

    /// Marks what is queued on the stream by now; an earlier mark is forgotten.
    pub fn record(&mut self, stream: &Stream) -> Result<()> {
        // SAFETY: a live event that nobody else uses meanwhile.
        call("recording an event", |table| unsafe { (table.event_record)(self.0.as_ptr(), &stream.0) })
    }

    /// What is queued on the stream from now on waits for the mark.
    pub(super) fn block(&self, stream: &Stream) -> Result<()> {
        // SAFETY: a live event; CUDA only reads it here.
        call("waiting for an event", |table| unsafe { (table.event_block)(self.0.as_ptr(), &stream.0) })
    }

    /// Whether everything before the mark is done; so it is where there is none.
    pub fn is_done(&self) -> Result<bool> {
        let mut done = false;
        // SAFETY: a live event, and a place for the answer.
        call("asking an event", |table| unsafe { (table.event_query)(self.0.as_ptr(), &mut done) })?;
        Ok(done)
    }

    /// The calling thread waits for the mark.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a live event.
        call("waiting for an event", |table| unsafe { (table.event_synchronize)(self.0.as_ptr()) })
    }

    /// Milliseconds of the device between two timed marks that are both done.
    pub fn since(&self, earlier: &Event) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: two live events, and a place for the answer.
        call("the time between two events", |table| unsafe {
            (table.event_elapsed)(earlier.0.as_ptr(), self.0.as_ptr(), &mut milliseconds)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let half = half().expect("open, since it made this event");
        // SAFETY: made by event_create and not used again.
        unsafe { (half.table.event_destroy)(self.0.as_ptr()) }
    }
}
