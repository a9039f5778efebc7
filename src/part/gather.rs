//! The rows of all ranks on every rank, with a way back for gradients.

use crate::bridge::{ForwardOutput, apply_function};
use crate::dist::{Channel, World};
use crate::error::Result;
use crate::op::sizes;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tch::Tensor;

/// A rank's end of it; one rank alone has nobody to ask.
#[derive(Clone, Default)]
pub struct AllGather {
    line: Option<Arc<FeatureChannel>>,
    rank: i64,
}

struct FeatureChannel {
    world_size: i64,
    /// One of its own: the gradients' buckets start on another one meanwhile. Every rank computes the same graph, and
    /// so calls the same collectives in the same order.
    channel: Mutex<Box<dyn Channel>>,
    deadline: Duration,
}

impl AllGather {
    /// Opens the channel; collective. A rank waits for the others for so long at a time.
    pub fn open(world: &Arc<dyn World>, deadline: Duration) -> Result<AllGather> {
        let world_size = world.size() as i64;
        let line = match world_size {
            1 => None,
            _ => {
                let channel = Mutex::new(world.open_channel("features")?);
                Some(Arc::new(FeatureChannel { world_size, channel, deadline }))
            }
        };
        Ok(AllGather { line, rank: world.rank() as i64 })
    }

    /// Checks that a step that gathers may be captured as a CUDA graph. With other ranks, backward would fork the
    /// captured stream from the autograd engine's thread and wait there; that has not been shown to work.
    pub fn capturable(&self) -> Result<(), &'static str> {
        match self.line {
            None => Ok(()),
            Some(_) => Err("the loss gathers features from all ranks, which has not been shown to work within a graph"),
        }
    }

    /// The place of this rank's first row among all, where each has `rows`.
    pub fn row_offset(&self, rows: i64) -> i64 {
        self.rank * rows
    }

    /// Returns W.
    pub fn world_size(&self) -> i64 {
        self.line.as_ref().map_or(1, |line| line.world_size)
    }

    /// x `[D]` → the sum over ranks `[D]`, in rank order. Backward sums over ranks too.
    pub fn sum(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.forward(&x.unsqueeze(0))?.sum_dim_intlist([0i64].as_slice(), false, x.kind()))
    }

    /// x [n, D], n the same on every rank → [W·n, D] in rank order. Backward sums over ranks what each has to say of
    /// this rank's rows (`all_gather` forward, `reduce_scatter` backward).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Some(line) = &self.line else { return Ok(x.shallow_clone()) };
        let [_, width] = sizes(x);
        let forward = |given: &[Tensor]| {
            let all = line.ask(|channel| channel.all_gather(&given[0].contiguous()))?; // [W, n, D]
            Ok(ForwardOutput { outputs: vec![all.view([-1, width])], saved: vec![] })
        };
        let back = line.clone();
        let outputs = apply_function(&[x], forward, move |_, gradients, _| {
            let own = back.ask(|channel| channel.reduce_scatter(&gradients[0].contiguous()))?;
            Ok(vec![Some(own)])
        })?;
        Ok(outputs.into_iter().next().expect("one output"))
    }
}

impl FeatureChannel {
    fn ask(&self, start: impl FnOnce(&mut dyn Channel) -> crate::dist::Pending) -> Result<Tensor> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        start(channel.as_mut()).wait(self.deadline)
    }
}
