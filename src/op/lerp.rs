//! The moving average of one flat buffer towards another.

use super::launch::{Launch, Source, blocks, plain};
use super::sizes;
use crate::fault::Result;
use tch::Tensor;

/// How far the average moves.
#[derive(Clone, Copy)]
pub enum Share<'a> {
    Number(f64),
    /// fp32 [1] on the buffers' device, read when the kernel runs: a recorded graph of launches stays right, and a 0
    /// leaves the average as it is, whatever the other buffer holds.
    Value(&'a Tensor),
}

/// average += (current − average) · share, in place. libtorch's own kernel is one pass over memory already.
pub fn lerp(average: &mut Tensor, current: &Tensor, share: f64) {
    let _ = average.lerp_(current, share);
}

/// The reference.
pub fn formula(average: &Tensor, current: &Tensor, share: f64) -> Tensor {
    average + (current - average) * share
}

pub const SOURCE: Source = Source { name: "lerp", built_in: include_str!("../../kernels/lerp.cu"), variants: plain };

/// The same in place by our kernel, fp32 [L] each on 16-byte boundaries.
pub fn kernel(average: &Tensor, current: &Tensor, share: Share) -> Result<()> {
    let [n] = sizes(average);
    let (value, number) = match share {
        Share::Number(number) => (None, number as f32),
        Share::Value(value) => (Some(value), 0.0),
    };
    let launch = Launch {
        source: &SOURCE,
        variant: vec![],
        entry: "lerp_flat",
        grid: [blocks(n, 1024), 1, 1],
        threads: 256,
        shared: 0,
    };
    launch.run(&[average.into(), current.into(), value.into(), number.into(), n.into()])
}
