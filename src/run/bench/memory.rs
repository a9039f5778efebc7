//! What a training holds in memory, by part.

use crate::bridge::cuda;
use crate::fault::Result;
use crate::optim::{flat::Flat, update::Updater};
use serde::Serialize;
use tch::{Device, Tensor};

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Master weights, and those in the dtype of the model.
    pub weights: u64,
    /// And, of a sharded optimizer, this rank's part of their sums.
    pub gradients: u64,
    /// AdamW's two, and the moving average of the weights.
    pub moments: u64,
    /// What steps need beyond the above at most: activations and what is made on the way. On a CPU it is the growth of
    /// the process since the steps began.
    pub activations: u64,
    /// What libtorch holds for later and no tensor uses; none on a CPU.
    pub pool: u64,
    /// The most of all: reserved on a GPU, resident on a CPU.
    pub peak: u64,
    /// The most that tensors used on a GPU; 0 on a CPU.
    pub peak_tensors: u64,
}

/// Where memory stood before the first step.
pub struct Before(u64);

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

impl Before {
    /// Forgets earlier peaks of a GPU.
    pub fn steps(device: Device) -> Result<Before> {
        match device {
            Device::Cuda(index) => {
                cuda::empty_cache()?;
                cuda::reset_peak(index)?;
                Ok(Before(cuda::memory(index)?.allocated))
            }
            _ => Ok(Before(resident("VmRSS"))),
        }
    }

    /// After steps.
    pub fn after(&self, flat: &Flat, updater: &Updater) -> Result<Memory> {
        let own = if flat.compute.data_ptr() == flat.master.data_ptr() { 0 } else { bytes(&flat.compute) };
        let summed = if flat.shards.is_some() { bytes(&flat.summed) } else { 0 };
        let memory = Memory {
            weights: bytes(&flat.master) + own,
            gradients: bytes(&flat.gradient) + summed,
            moments: bytes(&flat.first) + bytes(&flat.second) + updater.average.as_ref().map_or(0, bytes),
            ..Memory::default()
        };
        Ok(match flat.master.device() {
            Device::Cuda(index) => {
                let now = cuda::memory(index)?;
                let activations = now.peak_allocated.saturating_sub(self.0);
                let pool = now.peak_reserved.saturating_sub(now.peak_allocated);
                Memory { activations, pool, peak: now.peak_reserved, peak_tensors: now.peak_allocated, ..memory }
            }
            _ => {
                let peak = resident("VmHWM");
                Memory { activations: peak.saturating_sub(self.0), peak, ..memory }
            }
        })
    }
}

/// A line of /proc/self/status in bytes; 0 where there is none.
fn resident(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':')?.split_whitespace().next());
    found.and_then(|kilobytes| kilobytes.parse::<u64>().ok()).map_or(0, |kilobytes| kilobytes * 1024)
}
