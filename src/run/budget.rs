//! Where the time of feeding goes: the conveyor of a config run as fast as it can, nobody computing behind it.

use super::open;
use crate::config::Config;
use crate::device::World;
use crate::fault::{Fault, Result};
use crate::feed::{Feed, Stage, process_seconds};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps before the clock starts: threads, connections and buffers are there then.
const WARM: u64 = 5;

/// What was measured, in seconds of processor but for `wall`.
struct Spent {
    rows: u64,
    wall: f64,
    process: f64,
    stages: [f64; 4],
    copy: f64,
    /// Seconds that the consumer stood waiting.
    waited: f64,
}

/// `occlude bench data`: rows a second of a config's data on this rank for `seconds`, and what each stage takes of the
/// cores. The last line of standard output is one JSON object.
pub fn data(config: &Config, world: &Arc<dyn World>, seconds: f64) -> Result<()> {
    let set = open::training_set(config)?;
    let grid = config.method.build(&config.input)?.grid().to_owned();
    let source = open::source(config, set.clone(), open::tokenizer(config)?, world.as_ref(), grid)?;
    let (threads, remote) = (source.threads, set.remote());
    let order = open::order(config, &set)?;
    let feed = Feed::train(source, order, config.train.global_batch, world.rank(), world.size(), 0..u64::MAX >> 8)?;
    let spent = measure(feed, world, seconds)?;
    if world.rank() == 0 {
        report(&spent, threads, remote);
    }
    Ok(())
}

fn measure(mut feed: Feed, world: &Arc<dyn World>, seconds: f64) -> Result<Spent> {
    const STAGES: [Stage; 4] = [Stage::Fetch, Stage::Decode, Stage::View, Stage::Batch];
    let next = |feed: &mut Feed| feed.next().unwrap_or_else(|| Err(Fault::failed("the feed ended early")));
    for _ in 0..WARM {
        next(&mut feed)?;
    }
    let seen = |feed: &Feed| STAGES.map(|stage| feed.clock().seconds(stage));
    let (stages, rows, process, began) = (seen(&feed), feed.clock().rows(), process_seconds(), Instant::now());
    let (mut copy, mut waited) = (Duration::ZERO, Duration::ZERO);
    while began.elapsed().as_secs_f64() < seconds {
        let rows = next(&mut feed)?;
        waited += rows.waited;
        let copying = Instant::now();
        drop(rows.to_device(0..rows.ids.len(), world.device())?);
        copy += copying.elapsed();
    }
    let after = seen(&feed);
    Ok(Spent {
        rows: feed.clock().rows() - rows,
        wall: began.elapsed().as_secs_f64(),
        process: process_seconds() - process,
        stages: std::array::from_fn(|stage| after[stage] - stages[stage]),
        copy: copy.as_secs_f64(),
        waited: waited.as_secs_f64(),
    })
}

fn report(spent: &Spent, threads: usize, remote: bool) {
    let Spent { rows, wall, process, stages: [mut fetch, decode, view, batch], copy, waited } = *spent;
    let known = fetch + decode + view + batch + copy;
    if remote {
        // Transfers run on threads of their own, and are what nothing else explains.
        fetch += (process - known).max(0.0);
    }
    let stages = [("fetch", fetch), ("decode", decode), ("view", view), ("batch", batch), ("copy", copy)];
    println!("{:<8}{:>16}{:>10}", "stage", "samples/s/core", "cores");
    for (name, seconds) in stages {
        println!("{name:<8}{:>16.0}{:>10.2}", rows as f64 / seconds.max(1e-9), seconds / wall);
    }
    let busy = (decode + view + if remote { 0.0 } else { fetch }) / (wall * threads as f64);
    let largest = stages.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("five stages").0;
    // Cores that are all at work have no room for a stage that waits.
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let limit = match busy > 0.8 || process > 0.9 * wall * cores {
        true => largest,
        false if waited > 0.5 * wall => "waiting for bytes",
        false => "the consumer",
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
