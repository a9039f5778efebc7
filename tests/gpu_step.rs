//! A training on a CUDA device beside the same on the CPU.

use crate::step::{BATCH, Path};
use crate::support::{Outcome, skipped, trial};
use libtest_mimic::Trial;
use occlude::device::solo::Solo;
use std::sync::Arc;
use tch::{Cuda, Device};

pub fn trials() -> Vec<Trial> {
    let name = "gpu_step::a_training_on_a_device_takes_the_path_of_the_cpu";
    vec![match Cuda::is_available() {
        true => trial(name, a_training_on_a_device_takes_the_path_of_the_cpu),
        false => skipped(name, "no CUDA device here"),
    }]
}

fn a_training_on_a_device_takes_the_path_of_the_cpu() -> Outcome {
    let device = Arc::new(Solo::new(Device::cuda_if_available()));
    for micro in [BATCH, 3] {
        Path::of(device.clone(), 30, BATCH, micro).agrees(&Path::solo(30, BATCH), "on a GPU");
    }
    Ok(())
}
