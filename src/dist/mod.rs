//! Ranks: worlds, channels and their collectives, the heartbeat, and process setup. A world is a value that is passed
//! down; only [`init_world`] knows all kinds.

mod agreement;
mod collective;
mod channel;
mod delayed;
mod reduce;
pub mod process;
pub mod mpi;
pub mod nccl;
pub mod heartbeat;
pub mod solo;
mod transport;
pub mod world;

pub use agreement::check_agreement;
pub use delayed::{CollectiveEvent, DelayedWorld};
pub use heartbeat::{Heartbeat, HeartbeatTimeouts, Phase, ProgressHandle};
pub use process::{SignalRequest, SignalRequests, pin_threads, restart_with_passive_threads, wait_policy};
pub use world::{Channel, Pending, ReduceOp, World};

use crate::error::{Error, ExitCode, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use tch::Device;

/// Initializes the world of this process: MPI under a launcher, otherwise a single rank; with NCCL, one GPU per rank,
/// if there are GPUs. Also sets the number of threads (see [`pin_threads`]) and makes the process die with its
/// launcher.
pub fn init_world() -> Result<Arc<dyn World>> {
    pin_threads(None);
    let has_gpu = tch::Cuda::is_available();
    if !process::is_under_launcher() {
        return Ok(Arc::new(solo::SoloWorld::new(Device::cuda_if_available())));
    }
    process::die_with_parent()?;
    let world: Arc<dyn World> = Arc::new(mpi::MpiWorld::init()?);
    Ok(if has_gpu { Arc::new(nccl::NcclWorld::new(world)?) } else { world })
}

/// Runs the work of a job on every rank. An error or a panic on any rank ends all of them and is reported once; a stop
/// on request occurs on all ranks together and is returned on each.
pub fn run_to_end(world: &dyn World, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let result = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::failed("a panic ended the training; the message above says where")));
    match result {
        Err(error) if error.code != ExitCode::Stopped => report_and_abort(world, &error),
        // Ranks arrive here at most the time of one checkpoint apart.
        result => world.leave(Duration::from_secs(600)).and(result),
    }
}

/// Reports an error and ends every rank of the job. Rank 0 reports at once and the others later, when they are already
/// gone, so that an error of all ranks is reported once.
pub fn report_and_abort(world: &dyn World, error: &Error) -> ! {
    std::thread::sleep(Duration::from_millis(1500) * world.rank().min(2) as u32);
    match world.size() {
        1 => eprintln!("{error}"),
        _ => eprintln!("rank {}: {error}", world.rank()),
    }
    world.abort(error.code)
}
