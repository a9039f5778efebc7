//! Takes times on one device: of operations one by one, of a plain copy, of a large matrix product.

use crate::bridge::cuda::{Event, Graph, Pool, Priority, Stream, synchronize};
use crate::fault::{Fault, Result};
use crate::op::linear::linear;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// How often each operation is timed, at least and at most.
const TIMES: (usize, usize) = (5, 50);

pub struct Clock {
    device: Device,
    /// For how many seconds an operation is timed again, between the least and the most.
    patience: f64,
    /// Larger than any cache; written to between two times. Made when it is first wanted.
    flush: Option<Tensor>,
    on_gpu: Option<(Stream, Event, Event)>,
}

impl Clock {
    pub fn new(device: Device, patience: f64) -> Result<Clock> {
        let on_gpu = match device {
            Device::Cuda(index) => Some((Stream::new(index, Priority::Normal)?, Event::timed()?, Event::timed()?)),
            _ => None,
        };
        Ok(Clock { device, patience, flush: None, on_gpu })
    }

    /// Bytes a second of a plain copy, read and written together.
    pub fn copy(&mut self) -> Result<f64> {
        let numbers = if self.on_gpu.is_some() { 256 << 20 } else { 32 << 20 };
        let from = Tensor::f_zeros([numbers], (Kind::Float, self.device))?;
        let mut to = Tensor::f_zeros([numbers], (Kind::Float, self.device))?;
        let seconds = self.time(&mut || {
            to.copy_(&from);
            Ok(())
        })?;
        Ok(8.0 * numbers as f64 / seconds)
    }

    /// Bytes a second from pinned memory to a GPU; none on a CPU, where nothing is copied.
    pub fn upload(&mut self) -> Result<Option<f64>> {
        if self.on_gpu.is_none() {
            return Ok(None);
        }
        let (bytes, device) = (128 << 20, self.device);
        let from = Tensor::f_zeros([bytes], (Kind::Uint8, Device::Cpu))?.f_pin_memory(device)?;
        let seconds = self.times(&mut || {
            let _ = from.f_to_device_(device, Kind::Uint8, true, true)?;
            Ok(())
        })?;
        Ok(Some(bytes as f64 / median(seconds)))
    }

    /// Floating-point operations a second of a matrix product of this dtype, on random values, by the operation that
    /// models use. On a GPU the median over 8192³, as long as patience lasts, so that its clock is that of long work. On a
    /// CPU, whose neighbours come and go, the best at a size that takes milliseconds.
    pub fn product(&mut self, kind: Kind) -> Result<f64> {
        let gpu = self.on_gpu.is_some();
        let (mut side, most) = if gpu { (8192, 8192) } else { (128, 4096) };
        loop {
            let random =
                |shape: &[i64]| Ok::<_, Fault>(Tensor::f_randn(shape, (Kind::Float, self.device))?.to_kind(kind));
            let (x, w, bias) = (random(&[side, side])?, random(&[side, side])?, random(&[side])?);
            let seconds = self.times(&mut || linear(&x, &w, &bias).map(drop))?;
            let least = seconds.iter().copied().fold(f64::INFINITY, f64::min);
            let seconds = if gpu { median(seconds) } else { least };
            if side >= most || seconds > 4e-3 {
                return Ok(2.0 * (side as f64).powi(3) / seconds);
            }
            side *= 2;
        }
    }

    /// The median of the seconds that `body` takes, with nothing of it in a cache; captured as a graph on a GPU.
    pub fn time(&mut self, body: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let numbers = if self.on_gpu.is_some() { 64 << 20 } else { 16 << 20 };
        let mut flush = match self.flush.take() {
            Some(flush) => flush,
            None => Tensor::f_zeros([numbers], (Kind::Float, self.device))?,
        };
        let seconds = match self.graph(body)? {
            None => self.between(&mut || drop(flush.fill_(1.0)), body)?,
            Some(graph) => self.between(&mut || drop(flush.fill_(1.0)), &mut || graph.replay())?,
        };
        self.flush = Some(flush);
        Ok(median(seconds))
    }

    /// The seconds that `body` takes, again and again, as it is.
    fn times(&mut self, body: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let _entered = self.on_gpu.as_ref().map(|(stream, ..)| stream.enter()).transpose()?;
        (0..if self.on_gpu.is_some() { 3 } else { 1 }).try_for_each(|_| body())?;
        self.between(&mut || (), body)
    }

    /// `body` captured after it has run; none on a CPU, where it has run once.
    fn graph(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Option<Graph>> {
        let Some((stream, ..)) = &self.on_gpu else { return body().map(|()| None) };
        let entered = stream.enter()?;
        (0..3).try_for_each(|_| body())?;
        drop(entered);
        Ok(Some(Graph::capture(stream, Pool::new()?, body)?.0))
    }

    /// The seconds of every `body`, with `before` in front of each, which is not timed.
    fn between(&mut self, before: &mut dyn FnMut(), body: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let (mut seconds, begun) = (Vec::new(), Instant::now());
        let _entered = self.on_gpu.as_ref().map(|(stream, ..)| stream.enter()).transpose()?;
        while seconds.len() < TIMES.0 || (seconds.len() < TIMES.1 && begun.elapsed().as_secs_f64() < self.patience) {
            before();
            seconds.push(match &mut self.on_gpu {
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
                    f64::from(end.since(start)?) * 1e-3
                }
            });
        }
        Ok(seconds)
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
