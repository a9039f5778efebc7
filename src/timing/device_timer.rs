//! Times operations on one device: single operations, a plain copy, a large matrix product.

use crate::bridge::cuda::{Event, Graph, GraphPool, Priority, Stream, synchronize};
use crate::error::{Error, Result};
use crate::op::linear::linear;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Minimum number of repetitions of each operation.
const MIN_REPEATS: usize = 5;
/// Maximum number of repetitions of each operation.
const MAX_REPEATS: usize = 50;
/// Side of the matrices whose product is measured on a GPU.
const GPU_SIDE: i64 = 8192;
/// Sides of the matrices whose products are measured on a CPU, in this order.
const CPU_SIDES: [i64; 6] = [128, 256, 512, 1024, 2048, 4096];
/// Number of times that the sides are measured.
const CPU_ROUNDS: usize = 3;
/// A round ends after the first product of at least [`MIN_LAST_SIDE`] that takes more than these seconds.
const MAX_PRODUCT_S: f64 = 4e-3;
/// Minimum side after which a round may end.
const MIN_LAST_SIDE: i64 = 256;

/// Times operations on one device.
pub struct DeviceTimer {
    device: Device,
    /// Seconds after which an operation is no longer repeated, between [`MIN_REPEATS`] and [`MAX_REPEATS`].
    time_budget_s: f64,
    /// A tensor larger than any cache, written between two repetitions to flush them. Allocated on first use.
    flush: Option<Tensor>,
    /// The stream that is timed, with a start and an end event; `None` on a CPU.
    gpu: Option<(Stream, Event, Event)>,
}

impl DeviceTimer {
    /// Creates a timer that repeats an operation for about `time_budget_s` seconds.
    pub fn new(device: Device, time_budget_s: f64) -> Result<DeviceTimer> {
        let gpu = match device {
            Device::Cuda(index) => {
                Some((Stream::new(index, Priority::Normal)?, Event::with_timing()?, Event::with_timing()?))
            }
            _ => None,
        };
        Ok(DeviceTimer { device, time_budget_s, flush: None, gpu })
    }

    /// Measures the bandwidth of a plain copy in bytes per second, reads and writes added up.
    pub fn copy_bytes_per_s(&mut self) -> Result<f64> {
        let elements = if self.gpu.is_some() { 256 << 20 } else { 32 << 20 };
        let source = Tensor::f_zeros([elements], (Kind::Float, self.device))?;
        let mut destination = Tensor::f_zeros([elements], (Kind::Float, self.device))?;
        let seconds = self.median_seconds(&mut || {
            destination.copy_(&source);
            Ok(())
        })?;
        Ok(8.0 * elements as f64 / seconds)
    }

    /// Measures the bandwidth from pinned host memory to a GPU in bytes per second. Returns `None` on a CPU, where
    /// nothing is copied.
    pub fn upload_bytes_per_s(&mut self) -> Result<Option<f64>> {
        if self.gpu.is_none() {
            return Ok(None);
        }
        let bytes = 128 << 20;
        let device = self.device;
        let source = Tensor::f_zeros([bytes], (Kind::Uint8, Device::Cpu))?.f_pin_memory(device)?;
        let seconds = self.warm_seconds(&mut || {
            let _ = source.f_to_device_(device, Kind::Uint8, true, true)?;
            Ok(())
        })?;
        Ok(Some(bytes as f64 / median(seconds)))
    }

    /// Measures the FLOP/s of a matrix product of random values in this dtype, with the operation that models use.
    ///
    /// On a GPU it is the median over products of 8192³ for the whole time budget, so that the clock frequency is that
    /// of sustained work. On a CPU, where other processes disturb the measurement, it is the best rate of several
    /// sizes, each measured several times.
    pub fn matmul_flops_per_s(&mut self, kind: Kind) -> Result<f64> {
        if self.gpu.is_some() {
            return Ok(matmul_flops(GPU_SIDE) / median(self.matmul_seconds(GPU_SIDE, kind)?));
        }
        best_flops_per_s(&mut |side| self.matmul_seconds(side, kind))
    }

    /// Returns the seconds of each repetition of a product of matrices of this side.
    fn matmul_seconds(&mut self, side: i64, kind: Kind) -> Result<Vec<f64>> {
        let random = |shape: &[i64]| Ok::<_, Error>(Tensor::f_randn(shape, (Kind::Float, self.device))?.to_kind(kind));
        let x = random(&[side, side])?;
        let w = random(&[side, side])?;
        let bias = random(&[side])?;
        self.warm_seconds(&mut || linear(&x, &w, &bias).map(drop))
    }

    /// Returns the median of the seconds that `body` takes with cold caches. On a GPU `body` is captured as a CUDA
    /// graph, so that launch overhead does not count.
    pub fn median_seconds(&mut self, body: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let elements = if self.gpu.is_some() { 64 << 20 } else { 16 << 20 };
        let mut flush = match self.flush.take() {
            Some(flush) => flush,
            None => Tensor::f_zeros([elements], (Kind::Float, self.device))?,
        };
        let seconds = match self.capture(body)? {
            None => self.repeat(&mut || drop(flush.fill_(1.0)), body)?,
            Some(graph) => self.repeat(&mut || drop(flush.fill_(1.0)), &mut || graph.replay())?,
        };
        self.flush = Some(flush);
        Ok(median(seconds))
    }

    /// Returns the seconds of each repetition of `body`, eager and with warm caches.
    fn warm_seconds(&mut self, body: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let _guard = self.gpu.as_ref().map(|(stream, ..)| stream.set_current()).transpose()?;
        let warmup_runs = if self.gpu.is_some() { 3 } else { 1 };
        (0..warmup_runs).try_for_each(|_| body())?;
        self.repeat(&mut || (), body)
    }

    /// Runs `body` as warm-up and captures it as a graph. On a CPU it runs once, and the result is `None`.
    fn capture(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Option<Graph>> {
        let Some((stream, ..)) = &self.gpu else { return body().map(|()| None) };
        let guard = stream.set_current()?;
        (0..3).try_for_each(|_| body())?;
        drop(guard);
        Ok(Some(Graph::capture(stream, GraphPool::new()?, body)?.0))
    }

    /// Returns the seconds of each repetition of `body`; `prepare` runs before each one and is not timed.
    fn repeat(&mut self, prepare: &mut dyn FnMut(), body: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let mut seconds = Vec::new();
        let start = Instant::now();
        let _guard = self.gpu.as_ref().map(|(stream, ..)| stream.set_current()).transpose()?;
        while seconds.len() < MIN_REPEATS
            || (seconds.len() < MAX_REPEATS && start.elapsed().as_secs_f64() < self.time_budget_s)
        {
            prepare();
            seconds.push(match &mut self.gpu {
                None => {
                    let start = Instant::now();
                    body()?;
                    start.elapsed().as_secs_f64()
                }
                Some((stream, start, end)) => {
                    start.record(stream)?;
                    body()?;
                    end.record(stream)?;
                    synchronize(stream.device())?;
                    f64::from(end.elapsed_since(start)?) * 1e-3
                }
            });
        }
        Ok(seconds)
    }
}

/// Returns the best FLOP/s of matrix products; `measure` returns the seconds of some products of one side. Other
/// processes may disturb a whole call, so several sides are measured in several rounds. A round stops at a product that
/// takes milliseconds.
pub fn best_flops_per_s(measure: &mut dyn FnMut(i64) -> Result<Vec<f64>>) -> Result<f64> {
    let mut best = 0.0f64;
    for _ in 0..CPU_ROUNDS {
        for side in CPU_SIDES {
            let seconds = measure(side)?.into_iter().fold(f64::INFINITY, f64::min);
            best = best.max(matmul_flops(side) / seconds);
            if side >= MIN_LAST_SIDE && seconds > MAX_PRODUCT_S {
                break;
            }
        }
    }
    Ok(best)
}

/// Returns the FLOP of a product of square matrices.
fn matmul_flops(side: i64) -> f64 {
    2.0 * (side as f64).powi(3)
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
