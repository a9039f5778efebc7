//! Points in time: of a GPU's stream, where there is one, else of the monotonic clock.

use crate::bridge::cuda::{Event, Stream, synchronize};
use crate::fault::Result;
use std::time::Instant;
use tch::Device;

pub enum Point {
    Host(Instant),
    Device(Event),
}

impl Point {
    /// Now: behind what the device's current stream has been given by now.
    pub fn now(device: Device) -> Result<Point> {
        let Device::Cuda(index) = device else { return Ok(Point::Host(Instant::now())) };
        let mut event = Event::timed()?;
        event.record(&Stream::current(index)?)?;
        Ok(Point::Device(event))
    }

    /// Seconds from an earlier point of the same device; both must be over, see [`rest`].
    pub fn since(&self, earlier: &Point) -> Result<f64> {
        match (self, earlier) {
            (Point::Host(now), Point::Host(then)) => Ok((*now - *then).as_secs_f64()),
            (Point::Device(now), Point::Device(then)) => Ok(f64::from(now.since(then)?) * 1e-3),
            _ => unreachable!("points of one device"),
        }
    }
}

/// Waits until a device has nothing left to do.
pub fn rest(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => synchronize(index),
        _ => Ok(()),
    }
}
