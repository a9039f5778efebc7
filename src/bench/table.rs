//! The table of `occlude bench step`, and the same as JSON.

use super::memory::MemoryUse;
use super::roofline::{BufferSizes, DeviceRates, Roofline};
use super::stages::StepStage;
use crate::config::Config;
use crate::error::Result;
use crate::part::cost::ModelCost;
use crate::train::step::Stepper;
use serde_json::{Value, json};

/// Measured times of the steps.
#[derive(Default)]
pub struct StepTimings {
    /// Seconds of each of the trainer's steps.
    pub step_seconds: Vec<f64>,
    /// Seconds that each of them waited for data.
    pub data_wait_seconds: Vec<f64>,
    /// Seconds of the stages of each step that was run stage by stage.
    pub stage_seconds: Vec<[f64; 5]>,
    /// Bytes of the input of one step.
    pub input_bytes: usize,
}

/// The device and the model's properties on it.
pub struct BenchEnvironment {
    /// The device's name.
    pub name: String,
    pub ranks: usize,
    pub rates: DeviceRates,
    /// Peak FLOP/s by the data sheet, where it is known.
    pub data_sheet_flops: Option<f64>,
    pub roofline: Roofline,
    pub memory: MemoryUse,
}

/// A row of the table.
struct StageRow {
    part: &'static str,
    seconds: f64,
    work: StageWork,
    /// Minimum seconds by the roofline.
    min_seconds: Option<f64>,
}

impl StageRow {
    /// Creates a row without a known amount of work.
    fn without_work(part: &'static str, seconds: f64) -> StageRow {
        StageRow { part, seconds, work: StageWork::Unknown, min_seconds: None }
    }
}

/// The amount of work of a stage.
enum StageWork {
    Flops(f64),
    Bytes(f64),
    Unknown,
}

/// Returns the `q` quantile of the values, `q` from 0 to 1, by the nearest value; NaN where there are none.
fn quantile(values: impl Iterator<Item = f64>, q: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(((values.len().max(1) - 1) as f64 * q).round() as usize).copied().unwrap_or(f64::NAN)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// Prints the table and returns its JSON. `local_samples` is this rank's number of samples in a step; `no_data_reason`
/// says why random samples were used instead of the config's data.
pub fn print_table(
    config: &Config,
    stepper: &Stepper,
    environment: &BenchEnvironment,
    timings: &StepTimings,
    local_samples: i64,
    no_data_reason: Option<String>,
) -> Result<Value> {
    let BenchEnvironment { rates, data_sheet_flops, roofline, memory, .. } = environment;
    let batch = config.train.global_batch;
    let seconds = median(timings.step_seconds.iter().copied());
    let cost = stepper.method.cost(&stepper.method.model().patchify().grid, batch);
    print_header(config, environment, no_data_reason.as_deref());

    println!("{:<12}{:>11}{:>8}{:>16}{:>13}{:>10}", "part", "ms", "share", "achieved", "roofline ms", "reached");
    let rows = stage_rows(&cost, stepper, environment, timings, local_samples);
    let parts: Vec<Value> = rows.iter().map(|row| row.print(seconds)).collect();

    let flops = cost.training_flops();
    let rate = batch as f64 / seconds;
    let used = flops * rate / environment.ranks as f64;
    let mfu_of_matmul = used / rates.matmul_flops_per_s;
    let mfu_of_data_sheet = data_sheet_flops.map(|peak| used / peak);
    let best_rate = local_samples as f64 * environment.ranks as f64 / roofline.total();
    let of_data_sheet =
        mfu_of_data_sheet.map_or(String::new(), |mfu| format!(", {:.1} % of the data sheet's", 100.0 * mfu));
    println!(
        "\n{rate:.1} samples/s; model FLOP utilization {:.1} % of the measured product{of_data_sheet}",
        100.0 * mfu_of_matmul
    );
    println!(
        "{:.0} % of the roofline's {best_rate:.1} samples/s (forward, backward, optimizer)",
        100.0 * rate / best_rate
    );
    println!("{}", format_memory(memory));
    let quartiles = [0.25, 0.75].map(|q| 1e3 * quantile(timings.step_seconds.iter().copied(), q));
    Ok(json!({
        "ms": seconds * 1e3, "ms_quartiles": quartiles, "steps": timings.step_seconds.len(), "samples_per_s": rate,
        "parameters": stepper.method.model().params().parameter_count(), "threads": tch::get_num_threads(),
        "device": environment.name, "ranks": environment.ranks, "dtype": dtype_name(config), "global_batch": batch,
        "parts": parts, "input": if no_data_reason.is_some() { "noise" } else { "data" },
        "data_wait": median(timings.data_wait_seconds.iter().copied()) / seconds,
        "flop_per_sample": flops, "mfu_of_matmul": mfu_of_matmul, "mfu_of_data_sheet": mfu_of_data_sheet,
        "matmul_flop_per_s": rates.matmul_flops_per_s, "data_sheet_flop_per_s": data_sheet_flops,
        "copy_bytes_per_s": rates.copy_bytes_per_s, "roofline_samples_per_s": best_rate,
        "of_roofline": rate / best_rate, "memory": memory,
    }))
}

/// Prints what was measured, with which input, and the rates of the device.
fn print_header(config: &Config, environment: &BenchEnvironment, no_data_reason: Option<&str>) {
    let BenchEnvironment { name, ranks, rates, data_sheet_flops, .. } = environment;
    let dtype = dtype_name(config);
    let batch = config.train.global_batch;
    let ranks = if *ranks > 1 { format!(" and {ranks} ranks") } else { String::new() };
    println!("{}: {batch} samples a step in {dtype} on {name}{ranks}", config.about.title);
    let input = match no_data_reason {
        Some(reason) => format!("noise, since the data do not open: {}", first_line(reason)),
        None => "the config's data".to_owned(),
    };
    println!("input: {input}");
    let data_sheet =
        data_sheet_flops.map_or(String::new(), |peak| format!(" ({} by the data sheet)", format_flops(peak)));
    let upload =
        rates.upload_bytes_per_s.map_or(String::new(), |rate| format!(", to the device {:.0} GB/s", rate / 1e9));
    println!(
        "measured: matrix product {}{data_sheet}, copy {:.0} GB/s{upload}\n",
        format_flops(rates.matmul_flops_per_s),
        rates.copy_bytes_per_s / 1e9
    );
}

/// Returns the rows of all stages, of the unexplained rest, and of the whole step.
fn stage_rows(
    cost: &ModelCost,
    stepper: &Stepper,
    environment: &BenchEnvironment,
    timings: &StepTimings,
    local_samples: i64,
) -> Vec<StageRow> {
    let BenchEnvironment { rates, roofline, .. } = environment;
    let [forward_flops, backward_flops] = cost.flops().map(|flops| flops * local_samples as f64);
    let update_bytes = BufferSizes::new(&stepper.flat).update_bytes();
    let data_wait = median(timings.data_wait_seconds.iter().copied());
    let mut rows = vec![StageRow::without_work("data wait", data_wait)];
    for stage in StepStage::ALL {
        let seconds = median(timings.stage_seconds.iter().map(|seconds| seconds[stage as usize]));
        let (part, work, min_seconds) = match stage {
            StepStage::Copy => match rates.upload_bytes_per_s {
                Some(rate) => {
                    let bytes = timings.input_bytes as f64;
                    ("copy", StageWork::Bytes(bytes), Some(bytes / rate))
                }
                None => ("copy", StageWork::Unknown, None),
            },
            StepStage::Forward => ("forward", StageWork::Flops(forward_flops), Some(roofline.forward)),
            StepStage::Backward => ("backward", StageWork::Flops(backward_flops), Some(roofline.backward)),
            StepStage::Reduce => ("reduction", StageWork::Unknown, None),
            StepStage::Update => ("optimizer", StageWork::Bytes(update_bytes), Some(roofline.update)),
        };
        rows.push(StageRow { part, seconds, work, min_seconds });
    }
    let step = median(timings.step_seconds.iter().copied());
    let rest = step - rows.iter().map(|row| row.seconds).sum::<f64>();
    rows.push(StageRow::without_work("the rest", rest));
    let work = StageWork::Flops(forward_flops + backward_flops);
    rows.push(StageRow { part: "step", seconds: step, work, min_seconds: Some(roofline.total()) });
    rows
}

impl StageRow {
    /// Prints the row and returns its JSON. `step_seconds` is the time of a whole step.
    fn print(&self, step_seconds: f64) -> Value {
        let StageRow { part, seconds, work, min_seconds } = self;
        let (achieved, key, value) = match work {
            StageWork::Flops(flops) => (format_flops(flops / seconds), "flop_per_s", Some(flops / seconds)),
            StageWork::Bytes(bytes) => {
                (format!("{:.1} GB/s", bytes / seconds / 1e9), "bytes_per_s", Some(bytes / seconds))
            }
            StageWork::Unknown => ("–".to_owned(), "bytes_per_s", None),
        };
        let dash = || "–".to_owned();
        println!(
            "{part:<12}{:>11.3}{:>6.1} %{achieved:>16}{:>13}{:>10}",
            seconds * 1e3,
            100.0 * seconds / step_seconds,
            min_seconds.map_or_else(dash, |min| format!("{:.3}", min * 1e3)),
            min_seconds.map_or_else(dash, |min| format!("{:.0} %", 100.0 * min / seconds)),
        );
        json!({
            "part": part, "ms": seconds * 1e3, "share": seconds / step_seconds, key: value,
            "roofline_ms": min_seconds.map(|min| min * 1e3),
        })
    }
}

fn format_memory(memory: &MemoryUse) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let MemoryUse { weights, gradients, moments, activations, pool, peak, .. } = memory;
    format!(
        "memory in MB: weights {:.0}, gradients {:.0}, moments {:.0}, activations {:.0}, pool {:.0}; at most {:.0}",
        mb(*weights),
        mb(*gradients),
        mb(*moments),
        mb(*activations),
        mb(*pool),
        mb(*peak)
    )
}

fn dtype_name(config: &Config) -> String {
    format!("{:?}", config.train.dtype).to_lowercase()
}

/// Formats FLOP/s with a fitting unit.
fn format_flops(flops: f64) -> String {
    if flops >= 1e12 { format!("{:.1} TFLOP/s", flops / 1e12) } else { format!("{:.1} GFLOP/s", flops / 1e9) }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
