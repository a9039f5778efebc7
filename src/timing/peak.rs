//! The peak FLOP/s of a device, the denominator of model FLOP utilization: the dense peak of its data sheet where that
//! is known, otherwise the best measured rate of several matrix products.

use super::device_timer::DeviceTimer;
use crate::bridge::cuda;
use crate::dist::World;
use crate::error::Result;
use tch::{Device, Kind};

/// Seconds for which the products of one size are timed when a training starts.
const TIME_BUDGET_S: f64 = 0.03;

/// Data-center GPUs by a part of their name (the first match counts), with dense peaks in TFLOP/s: bf16 with fp32
/// accumulation, and fp32 without TF32. Source: NVIDIA's data sheets of A100, H100, H200 and GH200.
const DATA_SHEETS: [(&str, f64, f64); 7] = [
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.5, 67.0),
    ("GH200", 989.5, 67.0),
    ("H100 PCIe", 756.5, 51.0),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.5, 67.0),
    ("A100", 312.0, 19.5),
];

/// Returns the peak FLOP/s of a device by its name, or `None` where its data sheet is not known.
pub fn data_sheet_flops(name: &str, kind: Kind) -> Option<f64> {
    let (_, bf16, fp32) = DATA_SHEETS.into_iter().find(|(part, ..)| is_model(name, part))?;
    match kind {
        Kind::BFloat16 => Some(bf16 * 1e12),
        Kind::Float => Some(fp32 * 1e12),
        _ => None,
    }
}

/// Returns whether `name` holds `part`, not followed by a digit: an A1000 is not an A100.
fn is_model(name: &str, part: &str) -> bool {
    name.split_once(part).is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// A peak rate and its source.
#[derive(Clone, Debug, PartialEq)]
pub struct Peak {
    /// FLOP/s of one rank's device.
    pub flops: f64,
    /// The origin of the number, as text for the log.
    pub source: String,
}

impl Peak {
    /// Returns the peak of this rank's device for matrix products in this dtype. Without a data sheet it is measured,
    /// which takes tenths of a second; all ranks of a host should measure at the same time, since they also compute at
    /// the same time.
    pub fn detect(world: &dyn World, kind: Kind) -> Result<Peak> {
        if let Device::Cuda(index) = world.device() {
            let name = cuda::device_properties(index)?.name;
            if let Some(flops) = data_sheet_flops(&name, kind) {
                return Ok(Peak { flops, source: format!("the data sheet of {name}") });
            }
        }
        let flops = DeviceTimer::new(world.device(), TIME_BUDGET_S)?.matmul_flops_per_s(kind)?;
        Ok(Peak { flops, source: "the best of several matrix products measured at the start".to_owned() })
    }

    /// Returns the samples per second that `ranks` such devices would reach at full utilization, for a model whose
    /// training step takes `flops` FLOP per sample.
    pub fn samples_per_s(&self, flops: f64, ranks: usize) -> f64 {
        self.flops * ranks as f64 / flops
    }
}
