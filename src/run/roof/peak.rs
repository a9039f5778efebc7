//! What a device computes at most, which model FLOP utilisation is a share of: the dense peak of its data sheet where that
//! is known, else the rate of a large matrix product measured here.

use super::clock::Clock;
use crate::bridge::cuda;
use crate::device::World;
use crate::fault::Result;
use tch::{Device, Kind};

/// For how long the product is timed at a training's start.
const PATIENCE: f64 = 0.03;

/// Data-centre GPUs by a part of their name, the first that fits: dense peaks in TFLOP/s of bf16 with fp32 sums, and of
/// fp32 without TF32 (NVIDIA's data sheets of A100, H100, H200 and GH200).
const SHEETS: [(&str, f64, f64); 7] = [
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.5, 67.0),
    ("GH200", 989.5, 67.0),
    ("H100 PCIe", 756.5, 51.0),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.5, 67.0),
    ("A100", 312.0, 19.5),
];

/// Floating-point operations a second of a device of this name, by its data sheet.
pub fn data_sheet(name: &str, kind: Kind) -> Option<f64> {
    // An A1000 is no A100.
    let fits =
        |part: &str| name.split_once(part).is_some_and(|(_, rest)| !rest.starts_with(|c: char| c.is_ascii_digit()));
    let (_, bf16, fp32) = SHEETS.into_iter().find(|(part, ..)| fits(part))?;
    match kind {
        Kind::BFloat16 => Some(bf16 * 1e12),
        Kind::Float => Some(fp32 * 1e12),
        _ => None,
    }
}

/// A peak, and where it is from.
#[derive(Clone, Debug, PartialEq)]
pub struct Peak {
    /// Floating-point operations a second of one rank's device.
    pub flops: f64,
    pub source: String,
}

impl Peak {
    /// Of this rank's device for products of this dtype. Without a data sheet it takes tenths of a second, and every rank
    /// of a host should ask at the same time, as they will compute.
    pub fn here(world: &dyn World, kind: Kind) -> Result<Peak> {
        if let Device::Cuda(index) = world.device() {
            let name = cuda::device(index)?.name;
            if let Some(flops) = data_sheet(&name, kind) {
                return Ok(Peak { flops, source: format!("the data sheet of {name}") });
            }
        }
        let flops = Clock::new(world.device(), PATIENCE)?.product(kind)?;
        Ok(Peak { flops, source: "a matrix product measured at the start".to_owned() })
    }

    /// Samples a second over `ranks` such devices at which a model of `flops` for each sample's step would use them whole.
    pub fn samples_per_s(&self, flops: f64, ranks: usize) -> f64 {
        self.flops * ranks as f64 / flops
    }
}
