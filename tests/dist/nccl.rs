//! Tests of NCCL: one copy of it in the process, and the suite of every world on GPUs.

use crate::dist::collectives::check_collectives;
use crate::support::child_process::run_case;
use crate::support::{Outcome, no_cuda_device, root};
use crate::train::step::{BATCH, SOON, Trajectory};
use occlude::bridge;
use occlude::dist::World;
use occlude::dist::mpi::MpiWorld;
use occlude::dist::nccl::NcclWorld;
use occlude::dist::nccl::library::NcclLibrary;
use occlude::dist::solo::SoloWorld;
use occlude::error::ExitCode;
use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use tch::{Cuda, Device};

crate::trials![
    the_process_loads_only_the_nccl_of_libtorch,
    more_ranks_than_gpus_are_rejected;
    no_cuda_device:
    one_gpu_rank_passes_the_suite,
    two_ranks_on_one_gpu_pass_the_suite_and_train_as_one,
];

/// Runs a case that needs its own process. Returns the exit code.
pub fn case(name: &str) -> i32 {
    if name == "nccl-two" {
        return one_of_two_ranks();
    }
    bridge::load_cuda();
    let version = NcclLibrary::get().and_then(NcclLibrary::version).expect("the wheel brings NCCL");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc");
    let copies: BTreeSet<&str> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.contains("libnccl"))
        .collect();
    println!("{version} {}", copies.len());
    0
}

fn the_process_loads_only_the_nccl_of_libtorch() -> Outcome {
    let (code, output, why) = run_case("nccl")?;
    assert_eq!((code, output.as_str()), (Some(0), "22809 1\n"), "version and copies in the process; {why}");
    Ok(())
}

fn more_ranks_than_gpus_are_rejected() -> Outcome {
    if Cuda::device_count() == 0 {
        let error = NcclWorld::new(Arc::new(SoloWorld::new(Device::Cpu))).err().expect("a rank without a GPU");
        assert_eq!(error.code, ExitCode::Usage);
        assert!(error.message.contains("1 ranks on a host with 0 GPUs"), "{error}");
    }
    Ok(())
}

/// One of two ranks on device 0, which NCCL takes for two hosts with a GPU each, since it rejects two ranks of one host
/// on one GPU. This checks function only: the kernels of the ranks share the device.
fn one_of_two_ranks() -> i32 {
    bridge::load_cuda();
    let host: Arc<dyn World> = Arc::new(MpiWorld::init().expect("a launcher"));
    // SAFETY: NCCL is not open yet, and no other thread reads the environment.
    unsafe { std::env::set_var("NCCL_HOSTID", format!("rank-{}", host.rank())) };
    let world: Arc<dyn World> = Arc::new(NcclWorld::with_device(host.clone(), 0).expect("a GPU"));
    let mut channel = world.open_channel("conformance").expect("a channel");
    check_collectives(channel.as_mut(), world.as_ref(), world.device());
    let (path, captured) = Trajectory::train_pipelined(world.clone(), 12, BATCH, 3);
    path.assert_matches(&Trajectory::train_solo(12, BATCH), "two ranks on one GPU, captured");
    assert_eq!(captured, 2, "one part that accumulates, and one that reduces");
    host.leave(SOON).expect("both ranks leave");
    // The graphs hold the communicators, so this process exits without freeing them.
    std::process::exit(0)
}

fn two_ranks_on_one_gpu_pass_the_suite_and_train_as_one() -> Outcome {
    let output = Command::new(root().join("launch/mpirun"))
        .args(["-n", "2"])
        .arg(std::env::current_exe()?)
        .envs([("OCCLUDE_CASE", "nccl-two"), ("OMP_NUM_THREADS", "1")])
        .envs([("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_IB_DISABLE", "1"), ("NCCL_NVLS_ENABLE", "0")])
        .output()?;
    let text = [&output.stdout, &output.stderr].map(|printed| String::from_utf8_lossy(printed).into_owned());
    if output.status.success() { Ok(()) } else { Err(format!("{}\n{}{}", output.status, text[0], text[1]).into()) }
}

fn one_gpu_rank_passes_the_suite() -> Outcome {
    let world = NcclWorld::new(Arc::new(SoloWorld::new(Device::Cpu)))?;
    let mut channel = world.open_channel("conformance")?;
    check_collectives(channel.as_mut(), &world, Device::Cpu);
    check_collectives(channel.as_mut(), &world, world.device());
    Ok(())
}
