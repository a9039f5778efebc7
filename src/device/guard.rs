//! What a process owes its surroundings: it dies with its launcher, hears requests, and keeps to its processors.

use crate::bridge;
use crate::fault::{Code, Fault, Result};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Asks the kernel to kill this process when its parent dies. The launcher's forking thread lives as long as the
/// launcher (checked with Open MPI 5), so this never fires early.
pub fn die_with_parent() -> Result<()> {
    let parent = getppid();
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Fault::failed(format!("cannot ask to die with the launcher: {error}.")))?;
    // It may have died before the call.
    if getppid() != parent {
        signal_hook::low_level::exit(Code::Failed as i32);
    }
    Ok(())
}

/// What has been asked of this process since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Save, then stop with exit code 75. Stays set.
    pub stop: bool,
    /// Save and go on.
    pub save: bool,
}

/// Listens for signals: SIGUSR1, SIGTERM and SIGINT ask to stop after saving, SIGUSR2 to save and go on. A second
/// request to stop ends the process at once with exit code 70, for nothing has been saved then.
#[derive(Clone)]
pub struct Requests {
    stop: Arc<AtomicBool>,
    save: Arc<AtomicBool>,
}

/// A scheduler may signal the launcher and the ranks: what comes within this time of a request is its echo.
const ECHO: Duration = Duration::from_millis(300);

impl Requests {
    /// Starts listening, for the rest of the process's life: on a thread of its own, and neither this thread nor those
    /// that it starts from now on are interrupted. Matrix products of libraries do not bear that: a signal amid one was
    /// seen to leave a damaged heap behind.
    pub fn listen() -> Result<Self> {
        const ALL: [i32; 4] = [SIGTERM, SIGINT, SIGUSR1, SIGUSR2];
        let fault = |error: std::io::Error| Fault::failed(format!("cannot listen for signals: {error}."));
        let mut signals = Signals::new(ALL).map_err(fault)?;
        bridge::mask_signals(&ALL, true)?;
        let requests = Requests { stop: Arc::default(), save: Arc::default() };
        let (stop, save) = (requests.stop.clone(), requests.save.clone());
        let listen = move || {
            if let Err(fault) = bridge::mask_signals(&ALL, false) {
                tracing::error!("{fault}; requests by signal will not be heard");
            }
            let mut first: Option<Instant> = None;
            for signal in signals.forever() {
                if signal == SIGUSR2 {
                    save.store(true, Ordering::SeqCst);
                } else if first.get_or_insert_with(Instant::now).elapsed() > ECHO {
                    signal_hook::low_level::exit(Code::Failed as i32);
                } else {
                    stop.store(true, Ordering::SeqCst);
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(fault)?;
        Ok(requests)
    }
    /// What this rank has been asked; ranks agree on it by reducing it. A request to save is told once.
    pub fn poll(&self) -> Request {
        Request { stop: self.stop.load(Ordering::SeqCst), save: self.save.swap(false, Ordering::SeqCst) }
    }
}

/// Sets the number of threads of libtorch: `threads`, else OMP_NUM_THREADS, else this rank's share of its node's
/// cores. Where the launcher has pinned the process to fewer processors than that, it is widened to its share of
/// those that the launcher itself may use. To be called before other threads are started, which inherit the pinning.
/// Returns the number of threads.
pub fn ground(threads: Option<usize>) -> usize {
    let pinned = sched_getaffinity(None).ok();
    let (rank, size) = local_place().unwrap_or((0, 1));
    let mut node = pinned;
    if launched()
        && let Some(all) = getppid().and_then(|parent: Pid| sched_getaffinity(Some(parent)).ok())
    {
        // Tried for real: the kernel keeps us within what the container allows, and the count below knows its quota.
        if sched_setaffinity(None, &all).is_ok() {
            node = sched_getaffinity(None).ok();
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let asked = threads.or_else(|| std::env::var("OMP_NUM_THREADS").ok()?.parse().ok());
    let budget = asked.unwrap_or(cores / size).max(1);
    if let (Some(pinned), Some(node)) = (pinned, node) {
        let set = if (pinned.count() as usize) < budget { share(&node, rank, size, budget) } else { pinned };
        // Refused only where the kernel has just allowed more; then the process runs on all of its node.
        let _ = sched_setaffinity(None, &set);
    }
    tch::set_num_threads(budget as i32);
    budget
}

/// The local rank's part of a node's processors; all of them where parts would be smaller than the budget.
fn share(node: &CpuSet, rank: usize, size: usize, budget: usize) -> CpuSet {
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| node.is_set(core)).collect();
    let part = &cores[rank * cores.len() / size..(rank + 1) * cores.len() / size];
    if part.len() < budget {
        return *node;
    }
    let mut set = CpuSet::new();
    part.iter().for_each(|&core| set.set(core));
    set
}

/// Whether a launcher of MPI jobs has started this process.
pub fn launched() -> bool {
    ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE"].iter().any(|name| std::env::var_os(name).is_some())
}

/// Local rank and local size as the launcher tells them before MPI is joined.
fn local_place() -> Option<(usize, usize)> {
    let number = |name: &str| std::env::var(name).ok()?.split('(').next()?.parse::<usize>().ok();
    let pairs = [
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
        ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ];
    let (rank, size) = pairs.iter().find_map(|(rank, size)| Some((number(rank)?, number(size)?)))?;
    (rank < size).then_some((rank, size))
}
