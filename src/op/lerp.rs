//! The moving average of one flat buffer towards another.

use tch::Tensor;

/// average += (current − average) · share, in place.
pub fn lerp(average: &mut Tensor, current: &Tensor, share: f64) {
    let _ = average.lerp_(current, share);
}
