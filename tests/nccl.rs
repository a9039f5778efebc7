//! NCCL: one copy of it in the process, and on GPUs the suite of every world.

use crate::bridge::run;
use crate::device::carries;
use crate::step::{BATCH, Path, SOON};
use crate::support::{Outcome, root, skipped, trial};
use libtest_mimic::Trial;
use occlude::bridge;
use occlude::device::World;
use occlude::device::mpi::Mpi;
use occlude::device::nccl::{Nccl, library::Library};
use occlude::device::solo::Solo;
use occlude::fault::Code;
use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use tch::{Cuda, Device};

type OnDevice = fn() -> Outcome;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("nccl::it_is_the_copy_that_libtorch_has", it_is_the_copy_that_libtorch_has),
        trial("nccl::more_ranks_than_gpus_are_refused", more_ranks_than_gpus_are_refused),
    ];
    let on_a_device: [(&str, OnDevice); 2] = [
        ("nccl::a_rank_on_a_gpu_conforms", a_rank_on_a_gpu_conforms),
        ("nccl::two_ranks_on_one_gpu_conform_and_train_as_one", two_ranks_on_one_gpu_conform_and_train_as_one),
    ];
    trials.extend(on_a_device.map(|(name, case)| match Cuda::is_available() {
        true => trial(name, case),
        false => skipped(name, "no CUDA device here"),
    }));
    trials
}

/// The cases that want a process of their own. Returns the exit code.
pub fn case(name: &str) -> i32 {
    if name == "nccl-two" {
        return two();
    }
    bridge::open_cuda();
    let version = Library::get().and_then(Library::version).expect("the wheel brings NCCL");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc");
    let copies: BTreeSet<&str> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.contains("libnccl"))
        .collect();
    println!("{version} {}", copies.len());
    0
}

fn it_is_the_copy_that_libtorch_has() -> Outcome {
    let (code, told, why) = run("nccl")?;
    assert_eq!((code, told.as_str()), (Some(0), "22809 1\n"), "version and copies in the process; {why}");
    Ok(())
}

fn more_ranks_than_gpus_are_refused() -> Outcome {
    if Cuda::device_count() == 0 {
        let fault = Nccl::over(Arc::new(Solo::new(Device::Cpu))).err().expect("a rank without a GPU");
        assert_eq!(fault.code, Code::Usage);
        assert!(fault.message.contains("1 ranks on a host with 0 GPUs"), "{fault}");
    }
    Ok(())
}

/// One of two ranks on device 0, as two hosts with a GPU each to NCCL, which refuses two ranks of a host on one GPU. For
/// function alone: their kernels take turns on the device.
fn two() -> i32 {
    bridge::open_cuda();
    let host: Arc<dyn World> = Arc::new(Mpi::join().expect("a launcher"));
    // SAFETY: before NCCL is opened and before a thread of ours reads the environment.
    unsafe { std::env::set_var("NCCL_HOSTID", format!("rank-{}", host.rank())) };
    let world: Arc<dyn World> = Arc::new(Nccl::on(host.clone(), 0).expect("a GPU"));
    let mut channel = world.channel("conformance").expect("a channel");
    carries(channel.as_mut(), world.as_ref(), world.device());
    let (path, captured) = Path::ahead(world.clone(), 12, BATCH, 3);
    path.agrees(&Path::solo(12, BATCH), "two ranks on one GPU, captured");
    assert_eq!(captured, 2, "a part that adds up, and one that reduces");
    host.leave(SOON).expect("both ranks leave");
    // Graphs hold the communicators: this process ends with them.
    std::process::exit(0)
}

fn two_ranks_on_one_gpu_conform_and_train_as_one() -> Outcome {
    let output = Command::new(root().join("launch/mpirun"))
        .args(["-n", "2"])
        .arg(std::env::current_exe()?)
        .envs([("OCCLUDE_CASE", "nccl-two"), ("OMP_NUM_THREADS", "1")])
        .envs([("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_IB_DISABLE", "1"), ("NCCL_NVLS_ENABLE", "0")])
        .output()?;
    let told = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said).into_owned());
    if output.status.success() { Ok(()) } else { Err(format!("{}\n{}{}", output.status, told[0], told[1]).into()) }
}

fn a_rank_on_a_gpu_conforms() -> Outcome {
    let world = Nccl::over(Arc::new(Solo::new(Device::Cpu)))?;
    let mut channel = world.channel("conformance")?;
    carries(channel.as_mut(), &world, Device::Cpu);
    carries(channel.as_mut(), &world, world.device());
    Ok(())
}
