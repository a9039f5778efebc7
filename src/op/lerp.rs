//! Moving average of one flat buffer toward another.

use super::launch::{KernelSource, Launch, block_count, single_variant};
use super::sizes;
use crate::error::Result;
use tch::Tensor;

/// The weight of the current values in the average.
#[derive(Clone, Copy)]
pub enum LerpWeight<'a> {
    /// A constant.
    Scalar(f64),
    /// fp32 `[1]` on the buffers' device, read when the kernel runs, so that a captured graph stays valid. With 0 the
    /// average does not change, whatever the other buffer holds.
    Device(&'a Tensor),
}

/// average += (current − average) · weight, in place. libtorch's own kernel is one pass over memory already.
pub fn lerp(average: &mut Tensor, current: &Tensor, weight: f64) {
    let _ = average.lerp_(current, weight);
}

/// The reference.
pub fn formula(average: &Tensor, current: &Tensor, weight: f64) -> Tensor {
    average + (current - average) * weight
}

/// Kernel source.
pub const SOURCE: KernelSource =
    KernelSource { name: "lerp", embedded: include_str!("../../kernels/lerp.cu"), variants: single_variant };

/// The same in place by the kernel, for 16-byte aligned fp32 `[L]`.
pub fn kernel(average: &Tensor, current: &Tensor, weight: LerpWeight) -> Result<()> {
    let [n] = sizes(average);
    let (device_weight, constant_weight) = match weight {
        LerpWeight::Scalar(weight) => (None, weight as f32),
        LerpWeight::Device(weight) => (Some(weight), 0.0),
    };
    let launch = Launch {
        source: &SOURCE,
        variant: vec![],
        entry: "lerp_flat",
        grid: [block_count(n, 1024), 1, 1],
        threads: 256,
        shared_bytes: 0,
    };
    launch.run(&[average.into(), current.into(), device_weight.into(), constant_weight.into(), n.into()])
}
