//! Memory of a training by purpose.

use crate::bridge::cuda;
use crate::error::Result;
use crate::optim::flat::FlatParams;
use crate::optim::update::Updater;
use serde::Serialize;
use tch::{Device, Tensor};

/// Memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MemoryUse {
    /// Master weights, and the weights in the model's dtype.
    pub weights: u64,
    /// Gradients; with a sharded optimizer also this rank's shard of the reduced gradients.
    pub gradients: u64,
    /// AdamW's two moments, and the moving average of the weights.
    pub moments: u64,
    /// The maximum that steps need in addition: activations and temporaries. On a CPU it is the growth of the process
    /// since the first step.
    pub activations: u64,
    /// Memory that libtorch's caching allocator holds and no tensor uses; 0 on a CPU.
    pub pool: u64,
    /// The overall maximum: reserved memory on a GPU, resident memory on a CPU.
    pub peak: u64,
    /// The maximum allocated by tensors on a GPU; 0 on a CPU.
    pub peak_tensors: u64,
}

/// Bytes in use before the first step.
pub struct MemoryBaseline(u64);

impl MemoryBaseline {
    /// Records the memory in use and resets the peak statistics of a GPU.
    pub fn record(device: Device) -> Result<MemoryBaseline> {
        match device {
            Device::Cuda(index) => {
                cuda::empty_cache()?;
                cuda::reset_peak_memory_stats(index)?;
                Ok(MemoryBaseline(cuda::memory_stats(index)?.allocated))
            }
            _ => Ok(MemoryBaseline(process_memory("VmRSS"))),
        }
    }

    /// Returns the memory of the steps since the baseline.
    pub fn measure(&self, flat: &FlatParams, updater: &Updater) -> Result<MemoryUse> {
        let shares_master = flat.compute.data_ptr() == flat.master.data_ptr();
        let compute = if shares_master { 0 } else { tensor_bytes(&flat.compute) };
        let reduced_grad = if flat.sharding.is_some() { tensor_bytes(&flat.reduced_grad) } else { 0 };
        let ema = updater.ema.as_ref().map_or(0, tensor_bytes);
        let memory = MemoryUse {
            weights: tensor_bytes(&flat.master) + compute,
            gradients: tensor_bytes(&flat.grad) + reduced_grad,
            moments: tensor_bytes(&flat.exp_avg) + tensor_bytes(&flat.exp_avg_sq) + ema,
            ..MemoryUse::default()
        };
        Ok(match flat.master.device() {
            Device::Cuda(index) => {
                let stats = cuda::memory_stats(index)?;
                let activations = stats.peak_allocated.saturating_sub(self.0);
                let pool = stats.peak_reserved.saturating_sub(stats.peak_allocated);
                MemoryUse { activations, pool, peak: stats.peak_reserved, peak_tensors: stats.peak_allocated, ..memory }
            }
            _ => {
                let peak = process_memory("VmHWM");
                MemoryUse { activations: peak.saturating_sub(self.0), peak, ..memory }
            }
        })
    }
}

fn tensor_bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

/// Returns a field of `/proc/self/status` in bytes, or 0 where the system has no such file.
fn process_memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.split_whitespace().next());
    value.and_then(|kilobytes| kilobytes.parse::<u64>().ok()).map_or(0, |kilobytes| kilobytes * 1024)
}
