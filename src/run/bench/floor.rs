//! The roofline: how long a step's operations take at least on a device, each as fast as its products or its bytes allow.

use crate::fault::Result;
use crate::optim::flat::Flat;
use crate::part::work::{How, Load, Work};
use crate::run::roof::clock::Clock;
use tch::{Device, Kind, Tensor};

/// For how many seconds each rate is measured.
const PATIENCE: f64 = 0.4;

/// What a device was measured to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Floating-point operations a second of a large matrix product in the model's dtype.
    pub product: f64,
    /// Bytes a second of a plain copy, read and written together.
    pub copy: f64,
    /// Bytes a second from pinned memory; none on a CPU.
    pub upload: Option<f64>,
}

impl Rates {
    pub fn measured(device: Device, kind: Kind) -> Result<Rates> {
        let mut clock = Clock::new(device, PATIENCE)?;
        Ok(Rates { product: clock.product(kind)?, copy: clock.copy()?, upload: clock.upload()? })
    }

    /// The least seconds that one kernel takes.
    fn seconds(&self, load: &Load) -> f64 {
        (load.flops / self.product).max(load.bytes / self.copy)
    }
}

/// The least seconds of a step's stages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Floor {
    pub forward: f64,
    pub backward: f64,
    pub update: f64,
}

impl Floor {
    /// Of micro-batches of these sizes.
    pub fn of(work: &Work, micro: &[i64], flat: &Flat, rates: &Rates) -> Floor {
        let sizes = Sizes::of(flat);
        let mut floor = Floor { update: sizes.update() / rates.copy, ..Floor::default() };
        for &batch in micro {
            let how = How { batch, element: sizes.compute, fused: flat.master.device().is_cuda() };
            let [forward, backward] =
                work.kernels(&how).map(|loads| loads.iter().map(|load| rates.seconds(load)).sum::<f64>());
            floor.forward += forward;
            floor.backward += backward + sizes.accumulation() / rates.copy;
        }
        floor
    }

    pub fn step(&self) -> f64 {
        self.forward + self.backward + self.update
    }
}

/// What the flat buffers hold: elements, and the bytes of one in each.
pub struct Sizes {
    elements: i64,
    /// Of these, what this rank updates.
    kept: i64,
    compute: i64,
    gradient: i64,
    /// Whether computing goes on the master weights themselves.
    shared: bool,
}

impl Sizes {
    pub fn of(flat: &Flat) -> Sizes {
        let width = |tensor: &Tensor| tensor.kind().elt_size_in_bytes() as i64;
        Sizes {
            elements: flat.gradient.numel() as i64,
            kept: flat.master.numel() as i64,
            compute: width(&flat.compute),
            gradient: width(&flat.gradient),
            shared: flat.compute.kind() == flat.master.kind(),
        }
    }

    /// Bytes of adding one backward pass into the gradients.
    fn accumulation(&self) -> f64 {
        (self.elements * (self.compute + 2 * self.gradient)) as f64
    }

    /// Bytes of zeroing the gradients, of their norm and of AdamW: gradient in, master weight and both moments in and out,
    /// the weight to compute with out.
    pub fn update(&self) -> f64 {
        let compute = if self.shared { 0 } else { self.compute };
        (self.elements * self.gradient + self.kept * (2 * self.gradient + 24 + compute)) as f64
    }
}
