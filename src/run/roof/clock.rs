//! Takes times on one device: of operations one by one, of a plain copy, of a large matrix product.

use crate::bridge::cuda::{Event, Graph, Pool, Priority, Stream, synchronize};
use crate::fault::Result;
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
        let bytes = 128 << 20;
        let from = Tensor::f_zeros([bytes], (Kind::Uint8, Device::Cpu))?.f_pin_memory(self.device)?;
        let mut to = Tensor::f_zeros([bytes], (Kind::Uint8, self.device))?;
        let seconds = self.time(&mut || {
            to.copy_(&from);
            Ok(())
        })?;
        Ok(Some(bytes as f64 / seconds))
    }

    /// Floating-point operations a second of a matrix product of this dtype, on random values, by the operation that
    /// models use. On a GPU the median over 8192³, as long as patience lasts, so that its clock is that of long work. On a
    /// CPU, whose neighbours come and go, the best at a size that takes milliseconds.
    pub fn product(&mut self, kind: Kind) -> Result<f64> {
        let gpu = self.on_gpu.is_some();
        let (mut side, most) = if gpu { (8192, 8192) } else { (128, 4096) };
        loop {
            let random = |shape: &[i64]| {
                Ok::<_, tch::TchError>(Tensor::f_randn(shape, (Kind::Float, self.device))?.to_kind(kind))
            };
            let (x, w, bias) = (random(&[side, side])?, random(&[side, side])?, random(&[side])?);
            let mut seconds = self.times(false, &mut || linear(&x, &w, &bias).map(drop))?;
            seconds.sort_by(f64::total_cmp);
            let seconds = if gpu { seconds[seconds.len() / 2] } else { seconds[0] };
            if side >= most || seconds > 4e-3 {
                return Ok(2.0 * (side as f64).powi(3) / seconds);
            }
            side *= 2;
        }
    }

    /// The median of the seconds that `body` takes, with nothing of it in a cache.
    pub fn time(&mut self, body: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let mut seconds = self.times(true, body)?;
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }

    fn times(&mut self, flush: bool, body: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        if flush && self.flush.is_none() {
            let numbers = if self.on_gpu.is_some() { 64 << 20 } else { 16 << 20 };
            self.flush = Some(Tensor::f_zeros([numbers], (Kind::Float, self.device))?);
        }
        let mut flush = self.flush.as_mut().filter(|_| flush);
        let mut seconds = Vec::new();
        let begun = Instant::now();
        let patience = self.patience;
        let more = |seconds: &[f64]| {
            seconds.len() < TIMES.0 || (seconds.len() < TIMES.1 && begun.elapsed().as_secs_f64() < patience)
        };
        match &mut self.on_gpu {
            None => {
                body()?;
                while more(&seconds) {
                    flush.iter_mut().for_each(|flush| drop(flush.fill_(1.0)));
                    let start = Instant::now();
                    body()?;
                    seconds.push(start.elapsed().as_secs_f64());
                }
            }
            Some((stream, before, after)) => {
                let entered = stream.enter()?;
                (0..3).try_for_each(|_| body())?;
                drop(entered);
                let (graph, ()) = Graph::capture(stream, Pool::new()?, body)?;
                let _entered = stream.enter()?;
                while more(&seconds) {
                    flush.iter_mut().for_each(|flush| drop(flush.fill_(1.0)));
                    before.record(stream)?;
                    graph.replay()?;
                    after.record(stream)?;
                    synchronize(stream.device())?;
                    seconds.push(f64::from(after.since(before)?) * 1e-3);
                }
            }
        }
        Ok(seconds)
    }
}
