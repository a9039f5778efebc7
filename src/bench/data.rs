//! Benchmark of the data path: the data loader of a config at full speed, without a model behind it.

use crate::config::Config;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::loader::{DataLoader, LoadedRows, LoaderStage, process_cpu_seconds};
use crate::setup;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps before the clock starts, in which threads, connections and buffers are set up.
const WARMUP_STEPS: u64 = 5;

/// The stages of the loader in the order of the table.
const STAGES: [LoaderStage; 4] = [LoaderStage::Fetch, LoaderStage::Decode, LoaderStage::View, LoaderStage::Batch];

/// CPU seconds by stage; `wall` and `waited` are wall-clock seconds.
struct CpuTime {
    rows: u64,
    wall: f64,
    process: f64,
    stages: [f64; 4],
    copy: f64,
    /// Seconds for which the consumer was blocked.
    waited: f64,
}

/// `occlude bench data`: measures for `seconds` seconds how many samples per second this rank's data loader delivers,
/// and the CPU time of each stage. The last line of standard output is one JSON object.
pub fn bench_data(config: &Config, world: &Arc<dyn World>, seconds: f64) -> Result<()> {
    let set = setup::open_training_set(config)?;
    let grid = config.method.build(&config.input)?.model().patchify().grid;
    let tokenizer = setup::open_tokenizer(config)?;
    let options = setup::loader_options(config, set.clone(), tokenizer, world.as_ref(), grid)?;
    let threads = options.threads;
    let is_remote = set.is_remote();
    let order = setup::sample_order(config, &set)?;
    let batch = config.train.global_batch;
    let loader = DataLoader::for_training(options, order, batch, world.rank(), world.size(), 0..u64::MAX >> 8)?;
    let time = measure(loader, world, seconds)?;
    if world.rank() == 0 {
        report(&time, threads, is_remote);
    }
    Ok(())
}

fn measure(mut loader: DataLoader, world: &Arc<dyn World>, seconds: f64) -> Result<CpuTime> {
    for _ in 0..WARMUP_STEPS {
        next_rows(&mut loader)?;
    }
    let stages_before = stage_seconds(&loader);
    let rows_before = loader.cpu_time().rows();
    let process_before = process_cpu_seconds();
    let start = Instant::now();
    let mut copy = Duration::ZERO;
    let mut waited = Duration::ZERO;
    while start.elapsed().as_secs_f64() < seconds {
        let rows = next_rows(&mut loader)?;
        waited += rows.wait_time;
        let copy_start = Instant::now();
        drop(rows.to_device(0..rows.ids.len(), world.device())?);
        copy += copy_start.elapsed();
    }
    let stages = stage_seconds(&loader);
    Ok(CpuTime {
        rows: loader.cpu_time().rows() - rows_before,
        wall: start.elapsed().as_secs_f64(),
        process: process_cpu_seconds() - process_before,
        stages: std::array::from_fn(|stage| stages[stage] - stages_before[stage]),
        copy: copy.as_secs_f64(),
        waited: waited.as_secs_f64(),
    })
}

fn next_rows(loader: &mut DataLoader) -> Result<LoadedRows> {
    loader.next().unwrap_or_else(|| Err(Error::failed("the data loader ended early")))
}

fn stage_seconds(loader: &DataLoader) -> [f64; 4] {
    STAGES.map(|stage| loader.cpu_time().seconds(stage))
}

fn report(time: &CpuTime, threads: usize, is_remote: bool) {
    let CpuTime { rows, wall, process, stages: [mut fetch, decode, view, batch], copy, waited } = *time;
    let known = fetch + decode + view + batch + copy;
    if is_remote {
        // Transfers run on threads that are not timed: they are the CPU time that no other stage accounts for.
        fetch += (process - known).max(0.0);
    }
    let stages = [("fetch", fetch), ("decode", decode), ("view", view), ("batch", batch), ("copy", copy)];
    println!("{:<8}{:>16}{:>10}", "stage", "samples/s/core", "cores");
    for (name, seconds) in stages {
        println!("{name:<8}{:>16.0}{:>10.2}", rows as f64 / seconds.max(1e-9), seconds / wall);
    }
    let busy = (decode + view + if is_remote { 0.0 } else { fetch }) / (wall * threads as f64);
    let largest = stages.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("five stages").0;
    // If all cores are busy, the largest stage is the limit even where the loader's threads wait.
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let limit = if busy > 0.8 || process > 0.9 * wall * cores {
        largest
    } else if waited > 0.5 * wall {
        "waiting for bytes"
    } else {
        "the consumer"
    };
    println!(
        "{:.0} samples/s on {threads} threads, which are busy {:.0} % of the time",
        rows as f64 / wall,
        busy * 100.0
    );
    println!("the limit is: {limit}");
    let per_sample = |seconds: f64| seconds * 1e6 / rows as f64;
    let line = json!({
        "samples_per_s": rows as f64 / wall, "threads": threads, "limit": limit, "busy": busy,
        "samples": rows, "wall_s": wall, "process_us_per_sample": per_sample(process),
        "us_per_sample": stages.iter().map(|(name, seconds)| (*name, per_sample(*seconds)))
            .collect::<std::collections::BTreeMap<_, _>>(),
    });
    println!("{line}");
}
