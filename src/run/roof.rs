//! How close every operation comes to what the machine allows: its bytes a second beside those of a plain copy, its
//! products beside none. On a GPU each is captured as a graph and timed by events, the caches flushed in between.

mod cases;
pub mod clock; // takes times on one device
pub mod peak; // what a device computes at most

use crate::fault::{Fault, Result};
use clock::Clock;
use serde_json::{Value, json};
use std::path::Path;
use tch::Device;

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

/// For how many seconds each operation is timed again and again.
const PATIENCE: f64 = 1.0;

/// Times every operation on a device and prints a table; with `out`, the same as JSON. Each time is the median of
/// many. A case that fails, as a library's kernel does where it takes no such shape, is printed with its reason.
pub fn roof(device: Device, out: Option<&Path>) -> Result<()> {
    let mut clock = Clock::new(device, PATIENCE)?;
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
