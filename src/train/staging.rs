//! Staging buffers on a GPU: a step's samples are copied into them on a stream of its own, while the step before is
//! computed.

use crate::bridge::copy_non_blocking;
use crate::bridge::cuda::{Event, Priority, Stream};
use crate::error::Result;
use tch::{Device, Tensor};

/// Buffers for one step's tensors, one set for each set of shapes. They are filled, then read by what is queued on the
/// compute stream, and [released](InputStaging::release) for the next step's copy, which may run while that stream is
/// busy with the rest.
pub struct InputStaging {
    compute_stream: Stream,
    copy_stream: Stream,
    buffers: Vec<Vec<Tensor>>,
    /// Recorded when a copy is done.
    uploaded: Event,
    /// Recorded when the compute stream has read the buffers.
    consumed: Event,
}

impl InputStaging {
    /// For work that is queued on `compute_stream`.
    pub fn new(compute_stream: Stream) -> Result<InputStaging> {
        let copy_stream = Stream::new(compute_stream.device(), Priority::High)?;
        let buffers = Vec::new();
        Ok(InputStaging { compute_stream, copy_stream, buffers, uploaded: Event::new()?, consumed: Event::new()? })
    }

    /// Copies tensors from the CPU, of one of a few sets of shapes; what is queued on the compute stream from now on
    /// finds them in the returned ones. Tensors that are on the GPU stay where they are.
    pub fn upload(&mut self, tensors: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let device = Device::Cuda(self.compute_stream.device());
        let index = self.buffers_for(&tensors, device)?;
        let current = self.copy_stream.set_current()?;
        self.copy_stream.wait(&self.consumed)?;
        let mut uploaded = tensors;
        for (tensor, buffer) in uploaded.iter_mut().zip(&self.buffers[index]) {
            if tensor.device() != Device::Cpu {
                continue;
            }
            if tensor.numel() > 0 {
                // libtorch caches pinned memory.
                copy_non_blocking(buffer, &tensor.f_pin_memory(device)?)?;
            }
            *tensor = buffer.shallow_clone();
        }
        self.uploaded.record(&self.copy_stream)?;
        drop(current);
        self.compute_stream.wait(&self.uploaded)?;
        Ok(uploaded)
    }

    /// Returns the index of the buffers for tensors of these shapes.
    fn buffers_for(&mut self, tensors: &[Tensor], device: Device) -> Result<usize> {
        let fits = |buffers: &Vec<Tensor>| buffers.iter().zip(tensors).all(|(a, b)| a.size() == b.size());
        if let Some(index) = self.buffers.iter().position(fits) {
            return Ok(index);
        }
        let buffer = |like: &Tensor| match like.device() {
            Device::Cpu => Tensor::empty(like.size().as_slice(), (like.kind(), device)),
            _ => like.shallow_clone(),
        };
        self.buffers.push(tensors.iter().map(buffer).collect());
        // The memory may still be in use by what was queued before.
        self.release()?;
        Ok(self.buffers.len() - 1)
    }

    /// Marks the buffers as read, once everything that reads them has been queued.
    pub fn release(&mut self) -> Result<()> {
        self.consumed.record(&self.compute_stream)
    }
}
