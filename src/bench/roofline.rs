//! The roofline model: lower bounds of the time of a step's stages, where each kernel is limited by the device's FLOP/s
//! or by its memory bandwidth.

use crate::error::Result;
use crate::optim::flat::FlatParams;
use crate::part::cost::{Execution, KernelCost, ModelCost};
use crate::timing::device_timer::DeviceTimer;
use tch::{Device, Kind, Tensor};

/// Seconds for which each rate is measured.
const TIME_BUDGET_S: f64 = 0.4;

/// Measured peak rates of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRates {
    /// FLOP/s of a large matrix product in the model's dtype; on a CPU the best of several.
    pub matmul_flops_per_s: f64,
    /// Bytes per second of a plain copy, reads and writes added up.
    pub copy_bytes_per_s: f64,
    /// Bytes per second from pinned host memory; `None` on a CPU.
    pub upload_bytes_per_s: Option<f64>,
}

impl DeviceRates {
    /// Measures the rates of a device.
    pub fn measure(device: Device, kind: Kind) -> Result<DeviceRates> {
        let mut timer = DeviceTimer::new(device, TIME_BUDGET_S)?;
        Ok(DeviceRates {
            matmul_flops_per_s: timer.matmul_flops_per_s(kind)?,
            copy_bytes_per_s: timer.copy_bytes_per_s()?,
            upload_bytes_per_s: timer.upload_bytes_per_s()?,
        })
    }

    /// Returns the minimum time of one kernel in seconds.
    fn min_seconds(&self, kernel: &KernelCost) -> f64 {
        (kernel.flops / self.matmul_flops_per_s).max(kernel.bytes / self.copy_bytes_per_s)
    }
}

/// Minimum seconds of a step's stages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Roofline {
    pub forward: f64,
    pub backward: f64,
    pub update: f64,
}

impl Roofline {
    /// Computes the bounds of a step with micro-batches of the given sizes.
    pub fn new(cost: &ModelCost, micro_batches: &[i64], flat: &FlatParams, rates: &DeviceRates) -> Roofline {
        let sizes = BufferSizes::new(flat);
        let mut roofline = Roofline { update: sizes.update_bytes() / rates.copy_bytes_per_s, ..Roofline::default() };
        for &batch in micro_batches {
            let execution =
                Execution { batch, element_bytes: sizes.compute_bytes, fused: flat.master.device().is_cuda() };
            let [forward, backward] = cost
                .kernel_costs(&execution)
                .map(|kernels| kernels.iter().map(|kernel| rates.min_seconds(kernel)).sum::<f64>());
            roofline.forward += forward;
            roofline.backward += backward + sizes.accumulation_bytes() / rates.copy_bytes_per_s;
        }
        roofline
    }

    /// Returns the minimum seconds of all stages together.
    pub fn total(&self) -> f64 {
        self.forward + self.backward + self.update
    }
}

/// Sizes of the flat parameter buffers.
pub struct BufferSizes {
    /// Elements of the full gradient buffer.
    elements: i64,
    /// Elements that this rank updates.
    shard_elements: i64,
    /// Bytes of one element of the compute weights.
    compute_bytes: i64,
    /// Bytes of one element of the gradient.
    grad_bytes: i64,
    /// True if the model computes with the master weights themselves.
    computes_in_master: bool,
}

impl BufferSizes {
    /// Reads the sizes of `flat`.
    pub fn new(flat: &FlatParams) -> BufferSizes {
        let element_bytes = |tensor: &Tensor| tensor.kind().elt_size_in_bytes() as i64;
        BufferSizes {
            elements: flat.grad.numel() as i64,
            shard_elements: flat.master.numel() as i64,
            compute_bytes: element_bytes(&flat.compute),
            grad_bytes: element_bytes(&flat.grad),
            computes_in_master: flat.compute.kind() == flat.master.kind(),
        }
    }

    /// Returns the bytes moved when one backward pass is added into the gradients.
    fn accumulation_bytes(&self) -> f64 {
        (self.elements * (self.compute_bytes + 2 * self.grad_bytes)) as f64
    }

    /// Returns the bytes moved by zeroing the gradients, computing their norm, and AdamW. Per element of the shard: the
    /// gradient is read twice, master weight and both moments are read and written, the compute weight is written.
    pub fn update_bytes(&self) -> f64 {
        let compute = if self.computes_in_master { 0 } else { self.compute_bytes };
        (self.elements * self.grad_bytes + self.shard_elements * (2 * self.grad_bytes + 24 + compute)) as f64
    }
}
