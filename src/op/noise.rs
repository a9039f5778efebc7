//! Uniform random numbers of each sample: coins, scores, probabilities. A pure function of the run's seed, the sample's
//! key and the purpose, made where the keys are, so that nothing random is drawn on the host inside a step.

use super::launch::{KernelSource, Launch, block_count, single_variant};
use super::sizes;
use crate::bridge::record::scope;
use crate::error::Result;
use crate::rng::{Philox, Purpose};
use tch::{Kind, Tensor};

/// keys int64 [3, B] (see [`SampleKey::stack`]) → fp32 [B, n] in [0, 1), 24 bits each, on the device of the keys.
///
/// [`SampleKey::stack`]: super::shuffle::SampleKey::stack
pub fn noise(seed: u64, keys: &Tensor, purpose: Purpose, n: i64) -> Result<Tensor> {
    let _scope = scope("noise");
    if keys.device().is_cuda() {
        return kernel(seed, keys, purpose, n);
    }
    Ok(formula(seed, keys, purpose, n))
}

/// The reference.
pub fn formula(seed: u64, keys: &Tensor, purpose: Purpose, n: i64) -> Tensor {
    let [_, batch] = sizes(keys);
    let parts = Vec::<i64>::try_from(keys.contiguous().view(-1)).expect("int64 sample keys");
    let mut values = Vec::with_capacity((batch * n) as usize);
    for row in 0..batch as usize {
        let [id, epoch, repeat] = [0, 1, 2].map(|part| parts[part * batch as usize + row]);
        let mut rng = Philox::new(seed, id as u64, epoch as u64, purpose, repeat as u32);
        values.extend((0..n).map(|_| (rng.next_u32() >> 8) as f32 / (1 << 24) as f32));
    }
    Tensor::from_slice(&values).view([batch, n]).to_device(keys.device())
}

/// Kernel source.
pub const SOURCE: KernelSource =
    KernelSource { name: "noise", embedded: include_str!("../../kernels/noise.cu"), variants: single_variant };

/// The same by the kernel.
pub fn kernel(seed: u64, keys: &Tensor, purpose: Purpose, n: i64) -> Result<Tensor> {
    let [_, batch] = sizes(keys);
    let out = Tensor::empty([batch, n], (Kind::Float, keys.device()));
    let launch = Launch {
        source: &SOURCE,
        variant: vec![],
        entry: "uniform_noise",
        grid: [block_count(batch * ((n + 3) / 4), 256), 1, 1],
        threads: 256,
        shared_bytes: 0,
    };
    let numbers = [batch, n, purpose as i64].map(|number| (number as i32).into());
    launch.run(&[&[(&keys.contiguous()).into(), (&out).into(), seed.into()], &numbers[..]].concat())?;
    Ok(out)
}
