//! What `occlude bench` prints, and the same as JSON.

use super::floor::{Floor, Rates, Sizes};
use super::memory::Memory;
use super::stages::Stage;
use crate::config::Config;
use crate::fault::Result;
use crate::part::work::Work;
use crate::run::step::Stepper;
use serde_json::{Value, json};

/// What was measured.
#[derive(Default)]
pub struct Seen {
    /// Seconds of each of the trainer's steps, and of its waiting for data.
    pub steps: Vec<f64>,
    pub waited: Vec<f64>,
    /// Seconds of the stages of each step that was taken by stage.
    pub stages: Vec<[f64; 5]>,
    /// Bytes of a step's pixels.
    pub bytes: usize,
}

/// What it was measured on.
pub struct Machine {
    pub name: String,
    pub ranks: usize,
    pub rates: Rates,
    /// Floating-point operations a second by the data sheet.
    pub sheet: Option<f64>,
    pub floor: Floor,
    pub memory: Memory,
}

/// A line of the table.
struct Row {
    part: &'static str,
    seconds: f64,
    /// Floating-point operations, or bytes.
    done: Done,
    /// The least seconds that it could take.
    floor: Option<f64>,
}

enum Done {
    Flops(f64),
    Bytes(f64),
    Nothing,
}

/// The value at a share of the sorted values.
fn quantile(values: impl Iterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(((values.len().max(1) - 1) as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// Prints the table; returns its JSON. `rows` are this rank's samples of a step; `noise` says why there are no data.
pub fn print(
    config: &Config,
    stepper: &Stepper,
    machine: &Machine,
    seen: &Seen,
    (rows, noise): (i64, Option<String>),
) -> Result<Value> {
    let Machine { rates, sheet, floor, memory, .. } = machine;
    let dtype = format!("{:?}", config.train.dtype).to_lowercase();
    let (batch, seconds) = (config.train.global_batch, median(seen.steps.iter().copied()));
    let work = stepper.method.work(batch);
    let ranks = if machine.ranks > 1 { format!(" and {} ranks", machine.ranks) } else { String::new() };
    println!("{}: {batch} samples a step in {dtype} on {}{ranks}", config.about.title, machine.name);
    let input = match &noise {
        Some(why) => format!("noise, since the data do not open: {}", first_line(why)),
        None => "the config's data".to_owned(),
    };
    println!("input: {input}");
    let of_sheet = sheet.map_or(String::new(), |sheet| format!(" ({} by the data sheet)", speed(sheet)));
    let upload = rates.upload.map_or(String::new(), |rate| format!(", to the device {:.0} GB/s", rate / 1e9));
    println!(
        "measured: matrix product {}{of_sheet}, copy {:.0} GB/s{upload}\n",
        speed(rates.product),
        rates.copy / 1e9
    );

    println!("{:<12}{:>11}{:>8}{:>16}{:>13}{:>10}", "part", "ms", "share", "achieved", "roofline ms", "reached");
    let parts: Vec<Value> = lines(&work, stepper, machine, seen, rows).iter().map(|row| row.print(seconds)).collect();

    let flops = work.training_flops();
    let rate = batch as f64 / seconds;
    let used = flops * rate / machine.ranks as f64;
    let (of_product, of_sheet) = (used / rates.product, sheet.map(|sheet| used / sheet));
    let best = rows as f64 * machine.ranks as f64 / floor.step();
    let told = of_sheet.map_or(String::new(), |share| format!(", {:.1} % of the data sheet's", 100.0 * share));
    println!("\n{rate:.1} samples/s; model FLOP utilisation {:.1} % of the measured product{told}", 100.0 * of_product);
    println!("{:.0} % of the roofline's {best:.1} samples/s (forward, backward, optimizer)", 100.0 * rate / best);
    println!("{}", memory_line(memory));
    let quartiles = [0.25, 0.75].map(|share| 1e3 * quantile(seen.steps.iter().copied(), share));
    Ok(json!({
        "ms": seconds * 1e3, "ms_quartiles": quartiles, "steps": seen.steps.len(), "samples_per_s": rate,
        "parameters": stepper.method.table().parameters(), "threads": tch::get_num_threads(),
        "device": machine.name, "ranks": machine.ranks, "dtype": dtype, "global_batch": batch, "parts": parts,
        "input": if noise.is_some() { "noise" } else { "data" },
        "data_wait": median(seen.waited.iter().copied()) / seconds,
        "flop_per_sample": flops, "mfu_of_product": of_product, "mfu_of_data_sheet": of_sheet,
        "product_flop_per_s": rates.product, "data_sheet_flop_per_s": sheet, "copy_bytes_per_s": rates.copy,
        "roofline_samples_per_s": best, "of_roofline": rate / best, "memory": memory,
    }))
}

/// The stages, what lies between them, and the whole.
fn lines(work: &Work, stepper: &Stepper, machine: &Machine, seen: &Seen, rows: i64) -> Vec<Row> {
    let Machine { rates, floor, .. } = machine;
    let stage = |stage: Stage| median(seen.stages.iter().map(|seconds| seconds[stage as usize]));
    let [forward, backward] = work.flops().map(|flops| flops * rows as f64);
    let moved = Sizes::of(&stepper.flat).update();
    let waited =
        Row { part: "data wait", seconds: median(seen.waited.iter().copied()), done: Done::Nothing, floor: None };
    let mut all = vec![waited];
    for at in Stage::ALL {
        let (part, done, floor) = match at {
            Stage::Copy => {
                let upload = rates.upload.map(|rate| seen.bytes as f64 / rate);
                ("copy", rates.upload.map_or(Done::Nothing, |_| Done::Bytes(seen.bytes as f64)), upload)
            }
            Stage::Forward => ("forward", Done::Flops(forward), Some(floor.forward)),
            Stage::Backward => ("backward", Done::Flops(backward), Some(floor.backward)),
            Stage::Reduce => ("reduction", Done::Nothing, None),
            Stage::Update => ("optimizer", Done::Bytes(moved), Some(floor.update)),
        };
        all.push(Row { part, seconds: stage(at), done, floor });
    }
    let step = median(seen.steps.iter().copied());
    let rest = step - all.iter().map(|row| row.seconds).sum::<f64>();
    all.push(Row { part: "the rest", seconds: rest, done: Done::Nothing, floor: None });
    all.push(Row { part: "step", seconds: step, done: Done::Flops(forward + backward), floor: Some(floor.step()) });
    all
}

impl Row {
    /// Prints the line; its JSON. `step` is the seconds of a whole step.
    fn print(&self, step: f64) -> Value {
        let Row { part, seconds, done, floor } = self;
        let (achieved, key, value) = match done {
            Done::Flops(flops) => (speed(flops / seconds), "flop_per_s", Some(flops / seconds)),
            Done::Bytes(bytes) => (format!("{:.1} GB/s", bytes / seconds / 1e9), "bytes_per_s", Some(bytes / seconds)),
            Done::Nothing => ("–".to_owned(), "bytes_per_s", None),
        };
        let dash = || "–".to_owned();
        println!(
            "{part:<12}{:>11.3}{:>6.1} %{achieved:>16}{:>13}{:>10}",
            seconds * 1e3,
            100.0 * seconds / step,
            floor.map_or_else(dash, |floor| format!("{:.3}", floor * 1e3)),
            floor.map_or_else(dash, |floor| format!("{:.0} %", 100.0 * floor / seconds)),
        );
        json!({
            "part": part, "ms": seconds * 1e3, "share": seconds / step, key: value,
            "roofline_ms": floor.map(|floor| floor * 1e3),
        })
    }
}

fn memory_line(memory: &Memory) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let Memory { weights, gradients, moments, activations, pool, peak, .. } = memory;
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

/// Floating-point operations a second, readable.
fn speed(flops: f64) -> String {
    if flops >= 1e12 { format!("{:.1} TFLOP/s", flops / 1e12) } else { format!("{:.1} GFLOP/s", flops / 1e9) }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
