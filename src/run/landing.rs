//! Where a step's samples arrive on a GPU, on a stream of their own, while the step before is computed.

use crate::bridge::copy;
use crate::bridge::cuda::{Event, Priority, Stream};
use crate::fault::Result;
use tch::{Device, Tensor};

/// A place for one step's tensors, one for each shape that they come in. They are brought, taken from there by what is queued on the stream that computes, and
/// the place is [freed](Landing::free) for the next step's, which may come while that stream is busy with the rest.
pub struct Landing {
    /// The stream that computes, and the one that copies.
    stream: Stream,
    copies: Stream,
    places: Vec<Vec<Tensor>>,
    /// When all is here, and when all has been taken.
    arrived: Event,
    taken: Event,
}

impl Landing {
    /// For what is queued on `stream`.
    pub fn new(stream: Stream) -> Result<Landing> {
        let copies = Stream::new(stream.device(), Priority::High)?;
        Ok(Landing { stream, copies, places: Vec::new(), arrived: Event::new()?, taken: Event::new()? })
    }

    /// Copies a step's tensors, of one of a few sets of shapes, from the CPU; what is queued on the stream from now on
    /// finds them in what is returned. Those that are on the GPU stay where they are.
    pub fn bring(&mut self, load: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let device = Device::Cuda(self.stream.device());
        let alike = |place: &Vec<Tensor>| place.iter().zip(&load).all(|(place, like)| place.size() == like.size());
        let mut at = self.places.iter().position(alike);
        if at.is_none() {
            let place = |like: &Tensor| match like.device() {
                Device::Cpu => Tensor::empty(like.size().as_slice(), (like.kind(), device)),
                _ => like.shallow_clone(),
            };
            at = Some(self.places.len());
            self.places.push(load.iter().map(place).collect());
            // The memory may still be in use by what was queued before.
            self.free()?;
        }
        let place = &self.places[at.expect("made above")];
        let copying = self.copies.enter()?;
        self.copies.wait(&self.taken)?;
        let mut here = load;
        for (here, place) in here.iter_mut().zip(place) {
            if here.device() == Device::Cpu {
                if here.numel() > 0 {
                    // libtorch keeps pinned memory for the next time.
                    copy(place, &here.f_pin_memory(device)?)?;
                }
                *here = place.shallow_clone();
            }
        }
        self.arrived.record(&self.copies)?;
        drop(copying);
        self.stream.wait(&self.arrived)?;
        Ok(here)
    }

    /// Once all that takes the tensors from here has been queued.
    pub fn free(&mut self) -> Result<()> {
        self.taken.record(&self.stream)
    }
}
