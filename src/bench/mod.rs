//! `occlude bench`: where the time of a training step goes, compared with a roofline of this device.
//!
//! Two kinds of steps alternate: the trainer's own steps, back to back, which give the time of a step and the time that
//! it waits for data; and steps with a timestamp after each stage (`stages`), which give the share of each stage.

pub mod data; // the data path alone
pub mod ops; // every operation alone
mod cases; // the operations and shapes that `ops` times
mod input; // the config's data, or random samples
mod memory; // memory by purpose
mod roofline; // lower bounds of a step's stages
mod stages; // one step, stage by stage
mod table; // the printed table and its JSON

use crate::bridge::cuda;
use crate::bridge::profile::{NvtxRanges, Profiler};
use crate::bridge::record::scope;
use crate::config::Config;
use crate::data::order;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::timing::peak;
use crate::timing::timestamp::synchronize_device;
use crate::train::session::build_stepper;
use crate::train::step::Stepper;
use crate::train::step_mode::{LocalBatch, StepMode};
use input::{BenchBatch, BenchInput};
use memory::MemoryBaseline;
use roofline::{DeviceRates, Roofline};
use stages::run_staged_step;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use table::{BenchEnvironment, StepTimings};
use tch::Device;

/// Options of `occlude bench step` beyond the config.
#[derive(Clone, Debug, Default)]
pub struct BenchOptions {
    /// Number of the trainer's steps to time; at least one.
    pub steps: usize,
    /// File to which the JSON object is written as well.
    pub out: Option<PathBuf>,
    /// File for a Chrome trace of a few more steps.
    pub trace: Option<PathBuf>,
    /// Emits NVTX ranges during the timed steps.
    pub nvtx: bool,
}

/// Learning rate of benchmark steps: any value that moves the weights.
const LR: f64 = 1e-4;
/// Steps before the timed ones.
const WARMUP_STEPS: u64 = 3;
/// Number of the trainer's steps, back to back, in each round.
const TRAINER_STEPS_PER_ROUND: usize = 5;
/// Number of steps with timestamps between their stages at the end of each round.
const STAGED_STEPS_PER_ROUND: usize = 2;

/// A training without an end and without a run folder.
pub struct Bench {
    pub stepper: Stepper,
    mode: StepMode,
    config: Config,
    world: Arc<dyn World>,
    input: BenchInput,
    /// Steps done.
    steps_done: u64,
}

impl Bench {
    /// Sets up the model and its input: the config's data if `use_data` is set and they can be opened, otherwise random
    /// samples. The second value says why the data could not be opened.
    pub fn new(config: &Config, world: &Arc<dyn World>, use_data: bool) -> Result<(Bench, Option<String>)> {
        let stepper = build_stepper(config, world)?;
        let method = stepper.method.as_ref();
        let (input, no_data_reason) = if use_data {
            BenchInput::open(config, world.as_ref(), method)?
        } else {
            (BenchInput::with_noise(config, world.as_ref(), method)?, None)
        };
        let mode = StepMode::new(config.train.cuda_graph, config.train.global_batch, &stepper, world)?;
        let bench = Bench { stepper, mode, config: config.clone(), world: world.clone(), input, steps_done: 0 };
        Ok((bench, no_data_reason))
    }

    /// Runs the next step as the trainer does. Returns the time that it waited for data.
    pub fn step(&mut self) -> Result<Duration> {
        let (batch, wait_time) = self.next_batch()?;
        let _scope = scope("step");
        self.mode.step(&mut self.stepper, &batch.local_batch(&self.config)?, LR)?;
        Ok(wait_time)
    }

    /// Runs the next step stage by stage. Returns the seconds of each stage and the bytes of the input.
    pub fn step_by_stage(&mut self) -> Result<([f64; 5], usize)> {
        let (batch, _) = self.next_batch()?;
        self.mode.flush(&self.stepper)?;
        let timeout = collective_timeout(&self.config);
        let times = run_staged_step(&mut self.stepper, &batch, &self.config, self.world.as_ref(), LR, timeout)?;
        Ok((times.seconds(self.world.as_ref())?, batch.bytes()))
    }

    fn next_batch(&mut self) -> Result<(BenchBatch, Duration)> {
        let _scope = scope("data");
        self.steps_done += 1;
        self.input.next(self.steps_done - 1)
    }

    /// Returns the number of samples of each micro-batch of this rank.
    fn micro_batch_sizes(&self) -> Vec<i64> {
        let rows = order::rank_rows(self.config.train.global_batch, self.world.rank(), self.world.size());
        let rows = (rows.end - rows.start) as i64;
        let max_size = self.config.train.micro_batch.map_or(rows, |size| size as i64).max(1);
        (0..rows).step_by(max_size as usize).map(|first| max_size.min(rows - first)).collect()
    }
}

fn collective_timeout(config: &Config) -> Duration {
    Duration::from_secs_f64(config.world.collective_timeout_s)
}

/// Times the config's training step and prints a table; the last line of standard output is one JSON object.
pub fn bench_step(config: &Config, world: &Arc<dyn World>, options: &BenchOptions) -> Result<()> {
    let device = world.device();
    let (mut bench, no_data_reason) = Bench::new(config, world, true)?;
    let baseline = MemoryBaseline::record(device)?;
    let nvtx = options.nvtx.then(NvtxRanges::start).transpose()?;
    let mut timings = StepTimings::default();
    for _ in 0..WARMUP_STEPS {
        bench.step()?;
    }
    bench.step_by_stage()?;
    let steps = options.steps.max(1);
    while timings.step_seconds.len() < steps {
        run_round(&mut bench, &mut timings, steps)?;
    }
    drop(nvtx);
    let memory = baseline.measure(&bench.stepper.flat, &bench.stepper.updater)?;
    // Measured after the steps, so that its tensors do not count as the steps' memory and a GPU is warm.
    let rates = DeviceRates::measure(device, config.train.dtype.kind())?;
    if let Some(path) = &options.trace {
        record_trace(&mut bench, if world.rank() == 0 { Some(path) } else { None })?;
    }
    if world.rank() > 0 {
        return Ok(());
    }
    let Stepper { flat, method, .. } = &bench.stepper;
    let cost = method.cost(&method.model().patchify().grid, config.train.global_batch);
    let micro_batches = bench.micro_batch_sizes();
    let roofline = Roofline::new(&cost, &micro_batches, flat, &rates);
    let name = device_name(device)?;
    let data_sheet_flops = peak::data_sheet_flops(&name, config.train.dtype.kind());
    let environment = BenchEnvironment { name, ranks: world.size(), rates, data_sheet_flops, roofline, memory };
    let local_samples = micro_batches.iter().sum();
    let line = table::print_table(config, &bench.stepper, &environment, &timings, local_samples, no_data_reason)?;
    println!("{line}");
    let Some(path) = &options.out else { return Ok(()) };
    std::fs::write(path, format!("{line:#}\n")).map_err(|error| Error::disk(path.display(), error))
}

/// Runs some of the trainer's steps back to back, then some stage by stage.
///
/// Whatever streams the trainer uses, the host's clock measures the time until all work is done. On a GPU, where steps
/// are queued ahead, every step counts as the mean.
fn run_round(bench: &mut Bench, timings: &mut StepTimings, max_steps: usize) -> Result<()> {
    let device = bench.world.device();
    let steps = TRAINER_STEPS_PER_ROUND.min(max_steps - timings.step_seconds.len());
    synchronize_device(device)?;
    let mut times = vec![Instant::now()];
    for _ in 0..steps {
        timings.data_wait_seconds.push(bench.step()?.as_secs_f64());
        times.push(Instant::now());
    }
    synchronize_device(device)?;
    if device.is_cuda() {
        let mean = times[0].elapsed().as_secs_f64() / steps as f64;
        timings.step_seconds.extend(std::iter::repeat_n(mean, steps));
    } else {
        timings.step_seconds.extend(times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()));
    }
    for _ in 0..STAGED_STEPS_PER_ROUND {
        let (seconds, bytes) = bench.step_by_stage()?;
        timings.stage_seconds.push(seconds);
        timings.input_bytes = bytes;
    }
    Ok(())
}

/// Runs two more steps of each kind under the profiler. Every rank runs them, and the rank with a path writes the
/// trace.
fn record_trace(bench: &mut Bench, path: Option<&PathBuf>) -> Result<()> {
    let device = bench.world.device();
    let profiler = path.map(|path| Profiler::start(device.is_cuda()).map(|profiler| (profiler, path))).transpose()?;
    for _ in 0..2 {
        bench.step()?;
        synchronize_device(device)?;
    }
    for _ in 0..2 {
        let _scope = scope("step by stage");
        bench.step_by_stage()?;
    }
    profiler.map_or(Ok(()), |(profiler, path)| save_trace(profiler, path))
}

fn save_trace(profiler: Profiler, path: &Path) -> Result<()> {
    profiler.save(path)?;
    // The profiler does not report a failed write.
    std::fs::metadata(path).map(drop).map_err(|error| Error::disk(path.display(), error))
}

fn device_name(device: Device) -> Result<String> {
    match device {
        Device::Cuda(index) => Ok(cuda::device_properties(index)?.name),
        _ => {
            let threads = tch::get_num_threads();
            Ok(format!("CPU, {threads} thread{}", if threads == 1 { "" } else { "s" }))
        }
    }
}

/// Runs steps on request, for benchmarks that interleave with another program.
///
/// Every line on standard input is a number of steps (an empty line is one); the mean seconds of one step go to
/// standard output. The samples are random and stay on the device. At the end of the input a JSON object gives the peak
/// memory.
pub fn bench_interleaved(config: &Config, world: &Arc<dyn World>) -> Result<()> {
    let device = world.device();
    let (mut bench, _) = Bench::new(config, world, false)?;
    let baseline = MemoryBaseline::record(device)?;
    let (batch, _) = bench.next_batch()?;
    let batch = batch.local_batch(config)?;
    let views = batch.views.iter().map(|view| Ok(view.f_to_device(device)?)).collect::<Result<_>>()?;
    let side = batch.side.map(|tensor| Ok(tensor.f_to_device(device)?))?;
    let batch = LocalBatch { views, side, ..batch };
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Error::disk("standard input", error))?;
        let steps = parse_steps(&line)?;
        synchronize_device(device)?;
        let start = Instant::now();
        for _ in 0..steps {
            bench.mode.step(&mut bench.stepper, &batch, LR)?;
        }
        synchronize_device(device)?;
        println!("{:.6}", start.elapsed().as_secs_f64() / f64::from(steps));
    }
    let memory = baseline.measure(&bench.stepper.flat, &bench.stepper.updater)?;
    let parameters = bench.stepper.method.model().params().parameter_count();
    println!("{}", serde_json::json!({"parameters": parameters, "memory": memory}));
    Ok(())
}

/// Parses a line of standard input: a number of steps, or one step where the line is empty.
fn parse_steps(line: &str) -> Result<u32> {
    if line.trim().is_empty() {
        return Ok(1);
    }
    let steps = line.trim().parse::<u32>();
    let steps = steps.map_err(|_| Error::usage(format!("wanted a number of steps or an empty line, got {line:?}")))?;
    Ok(steps.max(1))
}
