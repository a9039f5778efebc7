//! Values that a loss may read in one step beside the batch.

use crate::part::buffers::Buffers;
use crate::part::gather::AllGather;
use crate::part::params::Weights;
use tch::{Device, Kind, Tensor};

/// The state of a training that one forward pass reads. It grows without touching a method.
pub struct Step<'a> {
    pub weights: &'a Weights,
    /// The teacher's weights in the compute dtype, without gradients; there where the method has a teacher.
    pub teacher: Option<&'a Weights>,
    /// Centers, queues, running statistics as the steps before left them.
    pub buffers: Buffers,
    /// The method's scheduled values of this step: f64 `[n]` on the device, so that a captured graph reads new ones.
    pub scheduled: Tensor,
    /// Gathers rows of all ranks, with gradients.
    pub ranks: AllGather,
}

impl<'a> Step<'a> {
    /// Weights alone, for evaluation and pictures: no teacher, no other ranks.
    pub fn with_weights(weights: &'a Weights) -> Step<'a> {
        Step {
            weights,
            teacher: None,
            buffers: Buffers::default(),
            scheduled: Tensor::zeros([0], (Kind::Double, Device::Cpu)),
            ranks: AllGather::default(),
        }
    }

    /// The same with the buffers of a checkpoint.
    pub fn with_buffers(weights: &'a Weights, buffers: &Buffers) -> Step<'a> {
        Step { buffers: buffers.clone(), ..Step::with_weights(weights) }
    }
}
