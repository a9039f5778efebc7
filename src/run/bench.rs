//! Where the time of a training step goes: each stage beside the least that this device could take for it.
//!
//! Two kinds of steps take turns: those of the trainer itself, back to back, which tell how long a step takes and how
//! long it waits for data; and steps with a point in time between their stages ([`stages`]), which tell the shares.

mod floor; // the roofline
mod input; // the config's data, or noise
mod memory; // what is held, by part
mod point; // points in time
mod stages; // a step, stage by stage
mod table; // what is printed

use super::open;
use super::pace::{Pace, Share};
use super::roof::peak;
use super::step::Stepper;
use crate::bridge::cuda;
use crate::bridge::profile::{Nvtx, Trace};
use crate::bridge::record::scope;
use crate::config::Config;
use crate::device::World;
use crate::fault::{Fault, Result};
use floor::{Floor, Rates};
use input::Input;
use memory::Before;
use point::rest;
use stages::staged;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use table::{Machine, Seen};
use tch::Device;

/// What the command line says beyond the config.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// How many of the trainer's steps are timed; at least one.
    pub steps: usize,
    /// A file for the last line of the output.
    pub out: Option<PathBuf>,
    /// A file for a Chrome trace of some more steps.
    pub trace: Option<PathBuf>,
    /// Tell NVTX what is being done.
    pub nvtx: bool,
}

/// The learning rate of benchmarks: so that weights move, and nothing else.
const LR: f64 = 1e-4;
/// Steps before the clock starts.
const WARM: u64 = 3;
/// The trainer's steps back to back, and the steps by stage behind them.
const TURN: (usize, usize) = (5, 2);

/// A training without an end and without a run.
pub struct Bench {
    pub stepper: Stepper,
    pace: Pace,
    config: Config,
    world: Arc<dyn World>,
    input: Input,
    /// Steps done.
    done: u64,
}

impl Bench {
    pub fn new(config: &Config, world: &Arc<dyn World>, real: bool) -> Result<(Bench, Option<String>)> {
        let stepper = open::stepper(config, world, deadline(config))?;
        let method = stepper.method.as_ref();
        let (input, why) = match real {
            true => Input::open(config, world.as_ref(), method)?,
            false => (Input::noise(config, world.as_ref(), method)?, None),
        };
        let pace = Pace::new(config.train.graph, config.train.global_batch, &stepper, world)?;
        Ok((Bench { stepper, pace, config: config.clone(), world: world.clone(), input, done: 0 }, why))
    }

    /// The next step as the trainer takes it; how long it waited for data.
    pub fn step(&mut self) -> Result<Duration> {
        let (given, waited) = self.given()?;
        let _scope = scope("step");
        self.pace.step(&mut self.stepper, &given.share(&self.config), LR)?;
        Ok(waited)
    }

    /// The next step, stage by stage: seconds of each, and bytes of its pixels.
    pub fn stages(&mut self) -> Result<([f64; 5], usize)> {
        let (given, _) = self.given()?;
        self.pace.settle(&self.stepper)?;
        let with = (LR, deadline(&self.config));
        let course = staged(&mut self.stepper, &given, &self.config, self.world.as_ref(), with)?;
        Ok((course.seconds(self.world.as_ref())?, given.bytes()))
    }

    fn given(&mut self) -> Result<(input::Given, Duration)> {
        let _scope = scope("data");
        self.done += 1;
        self.input.next(self.done - 1)
    }

    /// Samples of this rank's micro-batches.
    fn micro(&self) -> Vec<i64> {
        let rows = crate::data::order::rows(self.config.train.global_batch, self.world.rank(), self.world.size());
        let rows = (rows.end - rows.start) as i64;
        let most = self.config.train.micro_batch.map_or(rows, |most| most as i64).max(1);
        (0..rows).step_by(most as usize).map(|first| most.min(rows - first)).collect()
    }
}

fn deadline(config: &Config) -> Duration {
    Duration::from_secs_f64(config.world.deadline_s)
}

/// Times the config's step and prints a table; the last line is one JSON object.
pub fn bench(config: &Config, world: &Arc<dyn World>, order: &Order) -> Result<()> {
    let device = world.device();
    let (mut bench, noise) = Bench::new(config, world, true)?;
    let before = Before::steps(device)?;
    let nvtx = order.nvtx.then(Nvtx::begin).transpose()?;
    let mut seen = Seen::default();
    for _ in 0..WARM {
        bench.step()?;
    }
    bench.stages()?;
    while seen.steps.len() < order.steps.max(1) {
        turn(&mut bench, &mut seen, order.steps.max(1))?;
    }
    drop(nvtx);
    let memory = before.after(&bench.stepper.flat, &bench.stepper.updater)?;
    // Behind the steps: its tensors are no part of what they hold, and a GPU is warm.
    let rates = Rates::measured(device, config.train.dtype.kind())?;
    if let Some(path) = &order.trace {
        trace(&mut bench, if world.rank() == 0 { Some(path) } else { None })?;
    }
    if world.rank() > 0 {
        return Ok(());
    }
    let Stepper { flat, method, .. } = &bench.stepper;
    let (work, micro) = (method.work(config.train.global_batch), bench.micro());
    let floor = Floor::of(&work, &micro, flat, &rates);
    let name = name(device)?;
    let sheet = peak::data_sheet(&name, config.train.dtype.kind());
    let machine = Machine { name, ranks: world.size(), rates, sheet, floor, memory };
    let line = table::print(config, &bench.stepper, &machine, &seen, (micro.iter().sum(), noise))?;
    println!("{line}");
    let Some(path) = &order.out else { return Ok(()) };
    std::fs::write(path, format!("{line:#}\n")).map_err(|error| Fault::disk(path.display(), error))
}

/// Some of the trainer's steps back to back, and then some by stage. Whatever streams the trainer works on, the clock of
/// the host tells how long it takes until all is done; on a GPU, where steps are queued ahead, of each step the mean.
fn turn(bench: &mut Bench, seen: &mut Seen, most: usize) -> Result<()> {
    let device = bench.world.device();
    let steps = TURN.0.min(most - seen.steps.len());
    rest(device)?;
    let mut times = vec![Instant::now()];
    for _ in 0..steps {
        seen.waited.push(bench.step()?.as_secs_f64());
        times.push(Instant::now());
    }
    rest(device)?;
    match device.is_cuda() {
        true => seen.steps.extend(std::iter::repeat_n(times[0].elapsed().as_secs_f64() / steps as f64, steps)),
        false => seen.steps.extend(times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64())),
    }
    for _ in 0..TURN.1 {
        let (seconds, bytes) = bench.stages()?;
        seen.stages.push(seconds);
        seen.bytes = bytes;
    }
    Ok(())
}

/// Two more steps of each kind, recorded; every rank takes them, and one writes.
fn trace(bench: &mut Bench, path: Option<&PathBuf>) -> Result<()> {
    let device = bench.world.device();
    let recorder = path.map(|path| Trace::begin(device.is_cuda()).map(|trace| (trace, path))).transpose()?;
    for _ in 0..2 {
        bench.step()?;
        rest(device)?;
    }
    for _ in 0..2 {
        let _scope = scope("step by stage");
        bench.stages()?;
    }
    recorder.map_or(Ok(()), |(trace, path)| written(trace, path))
}

fn written(trace: Trace, path: &Path) -> Result<()> {
    trace.end(path)?;
    // The profiler does not say where it could not write.
    std::fs::metadata(path).map(drop).map_err(|error| Fault::disk(path.display(), error))
}

fn name(device: Device) -> Result<String> {
    match device {
        Device::Cuda(index) => Ok(cuda::device(index)?.name),
        _ => {
            let threads = tch::get_num_threads();
            Ok(format!("CPU, {threads} thread{}", if threads == 1 { "" } else { "s" }))
        }
    }
}

/// Steps on noise, which stays on the device, for every line on standard input: as many as it says, one where it is
/// empty; the seconds of one of them on standard output. At its end a JSON object that tells the most memory. For
/// benchmarks that take turns with another program.
pub fn by_turns(config: &Config, world: &Arc<dyn World>) -> Result<()> {
    let (mut bench, _) = Bench::new(config, world, false)?;
    let before = Before::steps(world.device())?;
    let (given, _) = bench.given()?;
    let share = given.share(config);
    let text = share.text.map(|text| text.f_to_device(world.device())).transpose()?;
    let share = Share { pixels: share.pixels.f_to_device(world.device())?, text, ..share };
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Fault::disk("standard input", error))?;
        let wrong = |_| Fault::usage(format!("wanted a number of steps or an empty line, got {line:?}"));
        let steps = if line.trim().is_empty() { 1 } else { line.trim().parse::<u32>().map_err(wrong)?.max(1) };
        rest(world.device())?;
        let began = Instant::now();
        for _ in 0..steps {
            bench.pace.step(&mut bench.stepper, &share, LR)?;
        }
        rest(world.device())?;
        println!("{:.6}", began.elapsed().as_secs_f64() / f64::from(steps));
    }
    let memory = before.after(&bench.stepper.flat, &bench.stepper.updater)?;
    println!("{}", serde_json::json!({"parameters": bench.stepper.method.table().parameters(), "memory": memory}));
    Ok(())
}
