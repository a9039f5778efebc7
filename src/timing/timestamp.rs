//! Timestamps: events on a GPU's stream, or the host's monotonic clock on a CPU.

use crate::bridge::cuda::{Event, Stream, synchronize};
use crate::error::Result;
use std::time::Instant;
use tch::Device;

/// A moment of a device's own time.
pub enum Timestamp {
    /// The host's monotonic clock, for work on a CPU.
    Host(Instant),
    /// An event on a CUDA stream.
    Device(Event),
}

impl Timestamp {
    /// Records the moment at which a device finishes what its current stream has been given so far.
    pub fn now(device: Device) -> Result<Timestamp> {
        let Device::Cuda(index) = device else { return Ok(Timestamp::Host(Instant::now())) };
        let mut event = Event::with_timing()?;
        event.record(&Stream::current(index)?)?;
        Ok(Timestamp::Device(event))
    }

    /// Returns the seconds since an earlier timestamp of the same device. The device must have reached both: call
    /// [`synchronize_device`] first.
    pub fn seconds_since(&self, earlier: &Timestamp) -> Result<f64> {
        match (self, earlier) {
            (Timestamp::Host(end), Timestamp::Host(start)) => Ok((*end - *start).as_secs_f64()),
            (Timestamp::Device(end), Timestamp::Device(start)) => Ok(f64::from(end.elapsed_since(start)?) * 1e-3),
            _ => unreachable!("timestamps of one device"),
        }
    }
}

/// Waits until a device has finished all queued work; returns at once for a CPU.
pub fn synchronize_device(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => synchronize(index),
        _ => Ok(()),
    }
}
