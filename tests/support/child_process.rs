//! Tests that need a process or a world of their own run this binary again, with OCCLUDE_CASE set.

use std::process::Command;

/// Runs one case in this process. Returns the exit code.
pub fn dispatch(name: &str) -> i32 {
    match name {
        "hook" | "memory" | "cuda" => crate::bridge::libtorch::case(name),
        "sdp" => {
            crate::bridge::fused::check_sdp_order();
            0
        }
        "million" => crate::data::shard::open_million_samples(),
        "contrast" => crate::op::kernel_targets::peak_memory(),
        "server" => crate::support::object_store::case(),
        "pace-memory" => crate::train::step_mode::case(),
        "conformance" => crate::dist::collectives::case(),
        cuda if cuda.starts_with("cuda-") => crate::bridge::cuda_library::case(cuda),
        recompute if recompute.starts_with("recompute-") => crate::part::recompute::case(recompute),
        nccl if nccl.starts_with("nccl") => crate::dist::nccl::case(nccl),
        gpu if gpu.starts_with("gpu-") => crate::train::gpu_step::case(gpu),
        record if record.starts_with("record-") => crate::bridge::recorder::case(record),
        memory if memory.starts_with("steady-") => crate::loader::memory_bounds::case(memory),
        cloud if cloud.starts_with("cloud-") => crate::data::cloud_store::case(cloud),
        other => crate::launch::mpirun::case(other),
    }
}

/// Runs this binary again for one case: exit code, standard output, standard error.
pub fn run_case(case: &str) -> Result<(Option<i32>, String, String), libtest_mimic::Failed> {
    let output = Command::new(std::env::current_exe()?).env("OCCLUDE_CASE", case).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}
