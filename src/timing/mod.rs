//! Measuring time: clocks, timestamps of a device, and the peak rate that utilization is a fraction of.

pub mod timestamp;
pub mod device_timer;
pub mod peak;
