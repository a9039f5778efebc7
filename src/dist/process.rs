//! Process setup: death with the launcher, requests by signal, CPU affinity and number of threads.

use crate::bridge;
use crate::error::{Error, ExitCode, Result};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use std::env;
use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Asks the kernel to kill this process when its parent dies. The forking thread of the launcher lives as long as the
/// launcher (checked with Open MPI 5), so this never fires early.
pub fn die_with_parent() -> Result<()> {
    let parent = getppid();
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Error::failed(format!("cannot ask to die with the launcher: {error}.")))?;
    // The parent may have died before the call.
    if getppid() != parent {
        signal_hook::low_level::exit(ExitCode::Failed as i32);
    }
    Ok(())
}

/// The variables by which OpenMP's library decides, while it is loaded, how threads wait for each other.
const WAIT_VARIABLES: [&str; 2] = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"];

/// Returns the variable that decides how the threads of matrix products wait for each other, with its value; `None` if
/// that is left to OpenMP's library.
pub fn wait_policy() -> Option<(&'static str, OsString)> {
    WAIT_VARIABLES.iter().find_map(|name| Some((*name, env::var_os(name)?)))
}

/// Restarts this program in the same process with threads that sleep while they wait, unless the environment decides
/// how they wait. By default they spin for longer than a product takes: if another process takes the core of one
/// thread, all others waste theirs, and one second of work takes ten. Must be called before anything else. If the
/// restart fails, the program continues as it is.
pub fn restart_with_passive_threads() {
    if wait_policy().is_some() {
        return;
    }
    let Ok(program) = env::current_exe() else { return };
    let passive = (WAIT_VARIABLES[0].into(), "passive".into());
    let environment: Option<Vec<CString>> =
        env::vars_os().chain([passive]).map(|(name, value)| environment_entry(name, value)).collect();
    let arguments: Option<Vec<CString>> = env::args_os().map(c_string).collect();
    if let (Some(program), Some(arguments), Some(environment)) = (c_string(program.into()), arguments, environment) {
        bridge::execute(&program, &arguments, &environment);
    }
}

/// Returns NAME=VALUE.
fn environment_entry(mut name: OsString, value: OsString) -> Option<CString> {
    name.push("=");
    name.push(value);
    c_string(name)
}

fn c_string(text: OsString) -> Option<CString> {
    CString::new(text.into_vec()).ok()
}

/// The requests that arrived by signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalRequest {
    /// Save, then stop with exit code 75. Stays set.
    pub stop: bool,
    /// Save and continue.
    pub save: bool,
}

/// A listener for signals: SIGUSR1, SIGTERM and SIGINT request to save and stop, SIGUSR2 to save and continue. A second
/// request to stop ends the process at once with exit code 70, because nothing was saved.
#[derive(Clone)]
pub struct SignalRequests {
    stop: Arc<AtomicBool>,
    save: Arc<AtomicBool>,
}

/// Signals within this time of the first request to stop are repetitions of it: a scheduler may signal the launcher and
/// the ranks.
const REPETITION_WINDOW: Duration = Duration::from_millis(300);

const SIGNALS: [i32; 4] = [SIGTERM, SIGINT, SIGUSR1, SIGUSR2];

impl SignalRequests {
    /// Starts a thread that receives the signals for the rest of the process's life. They are blocked for this thread
    /// and all threads that it starts from now on: a signal during a matrix product of some libraries was seen to
    /// corrupt the heap.
    pub fn listen() -> Result<Self> {
        let describe = |error: std::io::Error| Error::failed(format!("cannot listen for signals: {error}."));
        let signals = Signals::new(SIGNALS).map_err(describe)?;
        bridge::mask_signals(&SIGNALS, true)?;
        let requests = SignalRequests { stop: Arc::default(), save: Arc::default() };
        let listener = requests.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || listener.receive_signals(signals))
            .map_err(describe)?;
        Ok(requests)
    }
    fn receive_signals(&self, mut signals: Signals) {
        if let Err(error) = bridge::mask_signals(&SIGNALS, false) {
            tracing::error!("{error}; requests by signal have no effect");
        }
        let mut first_stop: Option<Instant> = None;
        for signal in signals.forever() {
            if signal == SIGUSR2 {
                self.save.store(true, Ordering::SeqCst);
            } else if first_stop.get_or_insert_with(Instant::now).elapsed() > REPETITION_WINDOW {
                signal_hook::low_level::exit(ExitCode::Failed as i32);
            } else {
                self.stop.store(true, Ordering::SeqCst);
            }
        }
    }
    /// Returns the requests to this rank, and clears a request to save. Ranks agree on them by a reduction.
    pub fn poll(&self) -> SignalRequest {
        SignalRequest { stop: self.stop.load(Ordering::SeqCst), save: self.save.swap(false, Ordering::SeqCst) }
    }
}

/// Sets libtorch's number of threads and returns it: `threads`, else OMP_NUM_THREADS, else this rank's share of its
/// node's cores. If the launcher has pinned the process to fewer cores, the affinity is widened to the rank's share of
/// the launcher's own cores. Must be called before other threads are started, because they inherit the affinity.
pub fn pin_threads(threads: Option<usize>) -> usize {
    let pinned = sched_getaffinity(None).ok();
    let node = if is_under_launcher() { widen_to_launcher().or(pinned) } else { pinned };
    let local = local_rank_and_size().unwrap_or(LocalRank { rank: 0, size: 1 });
    // Counted after widening. Respects the quota of a container.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let requested = threads.or_else(|| env::var("OMP_NUM_THREADS").ok()?.parse().ok());
    let budget = requested.unwrap_or(cores / local.size).max(1);
    if let (Some(pinned), Some(node)) = (pinned, node) {
        let set = if (pinned.count() as usize) < budget { share_of_node(&node, &local, budget) } else { pinned };
        // The kernel has just allowed a larger set; on an error the process runs on all cores of its node.
        let _ = sched_setaffinity(None, &set);
    }
    tch::set_num_threads(budget as i32);
    budget
}

/// Sets the affinity of this process to that of the launcher. Returns what the kernel made of it, which may be less in
/// a container.
fn widen_to_launcher() -> Option<CpuSet> {
    let launcher = sched_getaffinity(Some(getppid()?)).ok()?;
    sched_setaffinity(None, &launcher).ok()?;
    sched_getaffinity(None).ok()
}

/// Returns this rank's share of a node's cores, or all of them if a share would be smaller than the budget.
fn share_of_node(node: &CpuSet, local: &LocalRank, budget: usize) -> CpuSet {
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| node.is_set(core)).collect();
    let share = &cores[local.rank * cores.len() / local.size..(local.rank + 1) * cores.len() / local.size];
    if share.len() < budget {
        return *node;
    }
    let mut set = CpuSet::new();
    share.iter().for_each(|&core| set.set(core));
    set
}

/// Returns whether an MPI launcher has started this process.
pub fn is_under_launcher() -> bool {
    ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE"].iter().any(|name| env::var_os(name).is_some())
}

/// A rank among the ranks of its host.
struct LocalRank {
    rank: usize,
    size: usize,
}

/// Reads the local rank and size from the launcher's environment variables, since MPI is not initialized yet.
fn local_rank_and_size() -> Option<LocalRank> {
    let number = |name: &str| env::var(name).ok()?.split('(').next()?.parse::<usize>().ok();
    let variables = [
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
        ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ];
    let (rank, size) = variables.iter().find_map(|(rank, size)| Some((number(rank)?, number(size)?)))?;
    (rank < size).then_some(LocalRank { rank, size })
}
