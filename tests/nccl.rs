//! NCCL: one copy of it in the process, and on GPUs the suite of every world.

use crate::bridge::run;
use crate::device::carries;
use crate::support::{Outcome, skipped, trial};
use libtest_mimic::Trial;
use occlude::bridge;
use occlude::device::World;
use occlude::device::nccl::{Nccl, library::Library};
use occlude::device::solo::Solo;
use occlude::fault::Code;
use std::collections::BTreeSet;
use std::sync::Arc;
use tch::{Cuda, Device};

pub fn trials() -> Vec<Trial> {
    let name = "nccl::a_rank_on_a_gpu_conforms";
    vec![
        trial("nccl::it_is_the_copy_that_libtorch_has", it_is_the_copy_that_libtorch_has),
        trial("nccl::more_ranks_than_gpus_are_refused", more_ranks_than_gpus_are_refused),
        if Cuda::is_available() { trial(name, a_rank_on_a_gpu_conforms) } else { skipped(name, "no CUDA device here") },
    ]
}

/// The case that wants a process of its own. Returns the exit code.
pub fn case() -> i32 {
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

fn a_rank_on_a_gpu_conforms() -> Outcome {
    let world = Nccl::over(Arc::new(Solo::new(Device::Cpu)))?;
    let mut channel = world.channel("conformance")?;
    carries(channel.as_mut(), &world, Device::Cpu);
    carries(channel.as_mut(), &world, world.device());
    Ok(())
}
