//! `occlude bench op`: how close every operation comes to the limits of the device. Its bandwidth is compared with that
//! of a plain copy; its FLOP/s are printed. On a GPU each operation is captured as a CUDA graph and timed with events,
//! and the caches are flushed before each run.

use super::cases::{self, Case};
use crate::error::{Error, Result};
use crate::timing::device_timer::DeviceTimer;
use serde_json::{Value, json};
use std::path::Path;
use tch::Device;

/// Seconds for which each operation is repeated.
const TIME_BUDGET_S: f64 = 1.0;

/// Times every operation on a device and prints a table of medians; with `out`, also writes it as JSON. A case that
/// fails, such as a library's kernel that does not support the shape, is printed with the reason.
pub fn bench_ops(device: Device, out: Option<&Path>) -> Result<()> {
    let mut timer = DeviceTimer::new(device, TIME_BUDGET_S)?;
    let copy = timer.copy_bytes_per_s()?;
    println!("a plain copy moves {:.0} GB/s", copy / 1e9);
    println!(
        "{:<22} {:<10} {:<30} {:>10} {:>8} {:>8} {:>8}",
        "operation", "by", "shape", "µs", "GB/s", "of copy", "TFLOP/s"
    );
    let mut rows = Vec::new();
    for build in cases::all_cases(device) {
        let mut case = build()?;
        let result = timer.median_seconds(&mut *case.run);
        let Case { op, implementation, shape, .. } = &case;
        let result = match result {
            Ok(seconds) => {
                let rate = case.bytes / seconds;
                let tflops = case.flops / seconds / 1e12;
                println!(
                    "{op:<22} {implementation:<10} {shape:<30} {:>10.1} {:>8.0} {:>8.2} {tflops:>8.1}",
                    seconds * 1e6,
                    rate / 1e9,
                    rate / copy
                );
                json!({"us": seconds * 1e6, "gb_per_s": rate / 1e9, "of_copy": rate / copy, "tflop_per_s": tflops})
            }
            Err(error) => {
                println!("{op:<22} {implementation:<10} {shape:<30} {}", first_line(&error));
                json!({"error": first_line(&error)})
            }
        };
        rows.push(json!({"op": op, "implementation": implementation, "shape": shape, "result": result}));
    }
    let Some(path) = out else { return Ok(()) };
    let all: Value = json!({"device": format!("{device:?}"), "copy_gb_per_s": copy / 1e9, "rows": rows});
    std::fs::write(path, format!("{all:#}\n")).map_err(|error| Error::disk(path.display(), error))
}

/// Returns the first line of a message, at most 90 characters.
fn first_line(error: &Error) -> String {
    error.message.lines().next().unwrap_or_default().chars().take(90).collect()
}
