//! Buffers: named fp32 tensors of a method that no gradient reaches and every checkpoint holds: centers, queues,
//! running statistics. They move once a step, after an update that all ranks accepted, and are equal on all ranks.

use crate::error::Result;
use crate::part::params::{Init, ParamSpec};
use std::ops::Index;
use tch::{Device, Kind, Tensor, no_grad};

/// A buffer's index among its method's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(usize);

impl BufferId {
    /// Returns its place among the declarations.
    pub fn index(self) -> usize {
        self.0
    }
}

/// Declarations of a method's buffers.
#[derive(Clone, Debug, Default)]
pub struct BufferSpecs(Vec<ParamSpec>);

impl BufferSpecs {
    /// Declares a buffer; its first values depend on the run's seed and its name.
    pub fn add(&mut self, name: impl Into<String>, shape: &[i64], init: Init) -> BufferId {
        self.0.push(ParamSpec { name: name.into(), shape: shape.to_vec(), init, weight_decay: false });
        BufferId(self.0.len() - 1)
    }

    /// Lists the declarations, in the order of their [`BufferId`]s.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.0
    }
}

/// The values of a method's buffers on this rank's device.
#[derive(Debug, Default)]
pub struct Buffers {
    pub specs: Vec<ParamSpec>,
    values: Vec<Tensor>,
}

impl Clone for Buffers {
    /// Shares the storage.
    fn clone(&self) -> Self {
        Buffers { specs: self.specs.clone(), values: self.values.iter().map(Tensor::shallow_clone).collect() }
    }
}

impl Buffers {
    /// Makes the initial values on a device.
    pub fn new(specs: &BufferSpecs, seed: u64, device: Device) -> Buffers {
        let value = |spec: &ParamSpec| {
            Tensor::from_slice(&spec.initial_values(seed)).view(spec.shape.as_slice()).to_device(device)
        };
        Buffers { specs: specs.0.clone(), values: specs.0.iter().map(value).collect() }
    }

    /// Returns whether the method has no buffers.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Each buffer with its name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.specs.iter().map(|spec| spec.name.as_str()).zip(&self.values)
    }

    /// Returns the values of a buffer by its place among the declarations.
    pub fn value(&self, index: usize) -> &Tensor {
        &self.values[index]
    }

    /// Sets a buffer's values.
    pub fn set(&self, index: usize, value: &Tensor) {
        no_grad(|| self.values[index].shallow_clone().copy_(value));
    }

    /// Moves a buffer towards a mean over the global batch where `accept` (bool `[1]`) is true.
    pub fn move_to_mean(&self, buffer: BufferId, mean: &Tensor, momentum: f64, accept: &Tensor) {
        no_grad(|| {
            let old = &self[buffer];
            self.replace(buffer, &(old * momentum + mean.to_kind(Kind::Float) * (1.0 - momentum)), accept);
        });
    }

    /// Appends rows [n, ..] of the global batch to a queue where `accept` (bool `[1]`) is true; the oldest n leave.
    pub fn enqueue(&self, buffer: BufferId, rows: &Tensor, accept: &Tensor) -> Result<()> {
        let old = &self[buffer];
        let capacity = old.size()[0];
        let all = Tensor::f_cat(&[old, &rows.to_kind(Kind::Float)], 0)?;
        let newest = all.f_narrow(0, all.size()[0] - capacity, capacity)?;
        no_grad(|| self.replace(buffer, &newest, accept));
        Ok(())
    }

    fn replace(&self, buffer: BufferId, new: &Tensor, accept: &Tensor) {
        let old = &self[buffer];
        old.shallow_clone().copy_(&new.where_self(accept, old));
    }
}

impl Index<BufferId> for Buffers {
    type Output = Tensor;
    fn index(&self, buffer: BufferId) -> &Tensor {
        &self.values[buffer.0]
    }
}
