//! Where tensors live and how ranks talk. A world is a value that is handed down; only `join` knows which there are.

mod agree;
mod call;
mod channel;
mod delayed;
mod fold;
pub mod guard;
pub mod mpi;
pub mod nccl;
pub mod pulse;
pub mod solo;
mod wire;
pub mod world;

pub use agree::agree;
pub use guard::{Request, Requests, ground};
pub use pulse::{Beat, Limits, Phase, Pulse};
pub use world::{Channel, Pending, Reduce, World};

use crate::fault::{Code, Fault, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use tch::Device;

/// The world that this process was started in: MPI under a launcher, else one rank alone; on GPUs where there are any,
/// one for each rank. Sets the number of threads (see [`ground`]) and binds the process's life to its launcher's.
pub fn join() -> Result<Arc<dyn World>> {
    ground(None);
    let gpu = tch::Cuda::is_available();
    if !guard::launched() {
        return Ok(Arc::new(solo::Solo::new(Device::cuda_if_available())));
    }
    guard::die_with_parent()?;
    let world: Arc<dyn World> = Arc::new(mpi::Mpi::join()?);
    Ok(if gpu { Arc::new(nccl::Nccl::over(world)?) } else { world })
}

/// Runs a job's work to its end on every rank. A fault or a panic on any rank ends all of them, told once; a stop on
/// request is all ranks' own and is returned on each.
pub fn together(world: &dyn World, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let result = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Fault::failed("a panic ended the training; the message above says where")));
    match result {
        Err(fault) if fault.code != Code::Stopped => fail(world, &fault),
        // The ranks come here within the time of one save of each other.
        result => world.leave(Duration::from_secs(600)).and(result),
    }
}

/// Tells why and ends every rank of the job. A fault that all ranks share is told once: rank 0 speaks at once, the
/// others a little later, by when they are gone.
pub fn fail(world: &dyn World, fault: &Fault) -> ! {
    std::thread::sleep(Duration::from_millis(1500) * world.rank().min(2) as u32);
    match world.size() {
        1 => eprintln!("{fault}"),
        _ => eprintln!("rank {}: {fault}", world.rank()),
    }
    world.abort(fault.code)
}
