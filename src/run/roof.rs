//! How close every operation comes to what the machine allows: its bytes a second beside those of a plain copy, its
//! products beside none. On a GPU each is captured as a graph and timed by events, the caches flushed in between.

mod cases;

use crate::bridge::cuda::{Event, Graph, Pool, Priority, Stream, synchronize};
use crate::fault::{Fault, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// An operation at one shape.
pub struct Case {
    pub op: &'static str,
    /// What computes it: "ours", or a library's kernel.
    pub by: &'static str,
    pub shape: String,
    /// Bytes that it must move, and floating-point operations of its matrix products.
    pub bytes: f64,
    pub flops: f64,
    pub run: Box<dyn FnMut() -> Result<()>>,
}

/// Times every operation on a device and prints a table; with `out`, the same as JSON. Each time is the median of
/// many. A case that fails, as a library's kernel does where it takes no such shape, is printed with its reason.
pub fn roof(device: Device, out: Option<&Path>) -> Result<()> {
    let mut clock = Clock::new(device)?;
    let copy = clock.copy()?;
    println!("a plain copy moves {:.0} GB/s", copy / 1e9);
    println!(
        "{:<22} {:<10} {:<30} {:>10} {:>8} {:>8} {:>8}",
        "operation", "by", "shape", "µs", "GB/s", "of copy", "TFLOP/s"
    );
    let mut rows = Vec::new();
    for make in cases::all(device) {
        let mut case = make()?;
        let row = match clock.time(&mut *case.run) {
            Ok(seconds) => {
                let (speed, flops) = (case.bytes / seconds, case.flops / seconds / 1e12);
                let Case { op, by, shape, .. } = &case;
                println!(
                    "{op:<22} {by:<10} {shape:<30} {:>10.1} {:>8.0} {:>8.2} {flops:>8.1}",
                    seconds * 1e6,
                    speed / 1e9,
                    speed / copy
                );
                json!({"us": seconds * 1e6, "gb_per_s": speed / 1e9, "of_copy": speed / copy, "tflop_per_s": flops})
            }
            Err(fault) => {
                println!("{:<22} {:<10} {:<30} {}", case.op, case.by, case.shape, first_line(&fault));
                json!({"fault": first_line(&fault)})
            }
        };
        rows.push(json!({"op": case.op, "by": case.by, "shape": case.shape, "result": row}));
    }
    let Some(path) = out else { return Ok(()) };
    let all: Value = json!({"device": format!("{device:?}"), "copy_gb_per_s": copy / 1e9, "rows": rows});
    std::fs::write(path, format!("{all:#}\n")).map_err(|error| Fault::disk(path.display(), error))
}

fn first_line(fault: &Fault) -> String {
    fault.message.lines().next().unwrap_or_default().chars().take(90).collect()
}

/// How often each operation is timed, at least and at most; between, for as long as `PATIENCE` seconds last.
const TIMES: (usize, usize) = (5, 50);
const PATIENCE: f64 = 1.0;

/// Takes times on one device.
struct Clock {
    device: Device,
    /// Larger than any cache; written to between two times.
    flush: Tensor,
    on_gpu: Option<(Stream, Event, Event)>,
}

impl Clock {
    fn new(device: Device) -> Result<Clock> {
        let on_gpu = match device {
            Device::Cuda(index) => Some((Stream::new(index, Priority::Normal)?, Event::timed()?, Event::timed()?)),
            _ => None,
        };
        let flush = Tensor::f_zeros([if on_gpu.is_some() { 64 << 20 } else { 16 << 20 }], (Kind::Float, device))?;
        Ok(Clock { device, flush, on_gpu })
    }

    /// Bytes a second, read and written together.
    fn copy(&mut self) -> Result<f64> {
        let numbers = if self.on_gpu.is_some() { 256 << 20 } else { 32 << 20 };
        let from = Tensor::f_zeros([numbers], (Kind::Float, self.device))?;
        let mut to = Tensor::f_zeros([numbers], (Kind::Float, self.device))?;
        let seconds = self.time(&mut || {
            to.copy_(&from);
            Ok(())
        })?;
        Ok(8.0 * numbers as f64 / seconds)
    }

    /// The median of the seconds that `body` takes.
    fn time(&mut self, body: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let mut seconds = Vec::new();
        let begun = Instant::now();
        match &mut self.on_gpu {
            None => {
                body()?;
                while more(&seconds, begun) {
                    let _ = self.flush.fill_(1.0);
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
                while more(&seconds, begun) {
                    let _ = self.flush.fill_(1.0);
                    before.record(stream)?;
                    graph.replay()?;
                    after.record(stream)?;
                    synchronize(stream.device())?;
                    seconds.push(f64::from(after.since(before)?) * 1e-3);
                }
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }
}

fn more(seconds: &[f64], begun: Instant) -> bool {
    seconds.len() < TIMES.0 || (seconds.len() < TIMES.1 && begun.elapsed().as_secs_f64() < PATIENCE)
}
