//! Token orders drawn per sample: the one source of random masks.

use crate::rng::{Draw, Purpose};
use tch::{Device, Tensor};

/// A sample's place in the stream of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub id: u64,
    pub epoch: u64,
    pub repeat: u32,
}

/// 0..n in an order drawn for each sample → int64 [B, n].
pub fn shuffle(seed: u64, samples: &[Origin], n: i64, device: Device) -> Tensor {
    let mut orders: Vec<i64> = Vec::with_capacity(samples.len() * n as usize);
    for origin in samples {
        let order = Draw::new(seed, origin.id, origin.epoch, Purpose::Mask, origin.repeat).order(n as usize);
        orders.extend(order.into_iter().map(i64::from));
    }
    Tensor::from_slice(&orders).view([samples.len() as i64, n]).to_device(device)
}
