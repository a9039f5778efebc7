//! What tch leaves out: hooks, gradients in a buffer of our own, the allocator, libtorch's CUDA half.

use crate::support::{Outcome, root};
use occlude::bridge::{self, Hooks};
use std::process::Command;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

crate::trials![
    a_hook_fires_once_per_backward_in_backward_order,
    hooks_fire_for_a_backward_on_another_thread,
    a_leaf_that_backward_does_not_reach_stays_silent,
    gradients_land_in_the_buffer_and_add_up,
    a_bf16_weight_has_an_fp32_gradient,
    a_hook_that_panics_ends_the_process_and_says_where,
    a_fault_carries_libtorch_s_reason,
    kept_memory_serves_the_next_request_of_its_size,
    opening_libtorch_s_cuda_half_makes_it_known,
    the_program_depends_on_no_cuda_library,
];

/// The cases that change a whole process. Returns the exit code.
pub fn case(name: &str) -> i32 {
    match name {
        "hook" => {
            let leaf = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let _hooks = Hooks::set(&[leaf.shallow_clone()], |_| panic!("a mistake in a hook")).expect("hooks");
            leaf.sum(Kind::Float).backward();
            0
        }
        "memory" => {
            memory();
            0
        }
        "cuda" => {
            println!("opened {}, runtime {}", bridge::open_cuda(), tch::utils::version_cudart());
            0
        }
        "sdp" => {
            crate::fused::sdp();
            0
        }
        "million" => crate::shard::million(),
        "contrast" => crate::kernel_targets::peak(),
        "server" => crate::server::case(),
        cuda if cuda.starts_with("cuda-") => crate::cuda::case(cuda),
        again if again.starts_with("recompute-") => crate::recompute::case(again),
        nccl if nccl.starts_with("nccl") => crate::nccl::case(nccl),
        "pace-memory" => crate::pace::case(),
        gpu if gpu.starts_with("gpu-") => crate::gpu_step::case(gpu),
        record if record.starts_with("record-") => crate::record::case(record),
        steady if steady.starts_with("steady-") => crate::steady::case(steady),
        cloud if cloud.starts_with("cloud-") => crate::cloud::case(cloud),
        other => crate::device::case(other),
    }
}

/// This binary again, for one case: exit code, standard output, standard error.
pub fn run(case: &str) -> Result<(Option<i32>, String, String), libtest_mimic::Failed> {
    let output = Command::new(std::env::current_exe()?).env("OCCLUDE_CASE", case).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

fn leaves(n: usize) -> Vec<Tensor> {
    (0..n)
        .map(|i| Tensor::full([4, 4], 0.1 * (1 + i) as f64, (Kind::Float, Device::Cpu)).set_requires_grad(true))
        .collect()
}

/// Leaves in the order of their hooks.
type Fired = Arc<Mutex<Vec<usize>>>;

fn hooked(leaves: &[Tensor]) -> (Hooks, Fired) {
    let fired = Fired::default();
    let seen = fired.clone();
    let hooks = Hooks::set(leaves, move |leaf| seen.lock().expect("a list").push(leaf)).expect("hooks");
    (hooks, fired)
}

/// Leaf 0 is used first, and once more at the end.
fn chain(leaves: &[Tensor]) -> Tensor {
    let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
    let y = leaves.iter().fold(x, |x, w| x.matmul(w).tanh());
    y.sum(Kind::Float)
}

fn a_hook_fires_once_per_backward_in_backward_order() -> Outcome {
    let leaves = leaves(5);
    let (_hooks, fired) = hooked(&leaves);
    for pass in 1..=3 {
        chain(&leaves).backward();
        assert_eq!(*fired.lock().unwrap(), [4, 3, 2, 1, 0], "pass {pass}");
        fired.lock().unwrap().clear();
    }
    // A leaf that is used twice has its gradient when both uses have been reached.
    (chain(&leaves) + leaves[4].sum(Kind::Float) + leaves[2].sum(Kind::Float)).backward();
    let mut order = std::mem::take(&mut *fired.lock().unwrap());
    assert_eq!(order.len(), 5, "each once: {order:?}");
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2, 3, 4]);
    Ok(())
}

fn hooks_fire_for_a_backward_on_another_thread() -> Outcome {
    let leaves = leaves(3);
    let (_hooks, fired) = hooked(&leaves);
    let loss = chain(&leaves);
    std::thread::spawn(move || loss.backward()).join().expect("a backward pass");
    assert_eq!(*fired.lock().unwrap(), [2, 1, 0]);
    Ok(())
}

fn a_leaf_that_backward_does_not_reach_stays_silent() -> Outcome {
    let leaves = leaves(4);
    let (_hooks, fired) = hooked(&leaves);
    chain(&[leaves[0].shallow_clone(), leaves[2].shallow_clone()]).backward();
    assert_eq!(*fired.lock().unwrap(), [2, 0]);
    Ok(())
}

fn gradients_land_in_the_buffer_and_add_up() -> Outcome {
    let leaves = leaves(3);
    let wanted: Vec<Tensor> = {
        chain(&leaves).backward();
        leaves.iter().map(|leaf| leaf.grad().copy()).collect()
    };
    let buffer = Tensor::zeros([3 * 20], (Kind::Float, Device::Cpu));
    let part = |i: usize| buffer.narrow(0, 20 * i as i64 + 2, 16).view([4, 4]);
    for (i, leaf) in leaves.iter().enumerate() {
        bridge::set_gradient(leaf, &part(i))?;
    }
    for pass in 1..=2 {
        chain(&leaves).backward();
        for (i, leaf) in leaves.iter().enumerate() {
            assert_eq!(leaf.grad().data_ptr(), part(i).data_ptr(), "pass {pass}: leaf {i} has another gradient");
            let off = (part(i) - &wanted[i] * pass).abs().max().double_value(&[]);
            assert!(off <= 1e-6, "pass {pass}: leaf {i} is off by {off:e}");
        }
    }
    let _ = buffer.shallow_clone().zero_();
    chain(&leaves).backward();
    assert!((part(1) - &wanted[1]).abs().max().double_value(&[]) <= 1e-6, "zeroed in place");
    assert_eq!(buffer.narrow(0, 18, 4).abs().sum(Kind::Float).double_value(&[]), 0.0, "what lies between stays");
    Ok(())
}

fn a_bf16_weight_has_an_fp32_gradient() -> Outcome {
    let leaf = Tensor::ones([5], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    let gradient = Tensor::zeros([5], (Kind::Float, Device::Cpu));
    bridge::set_gradient(&leaf, &gradient)?;
    let (_hooks, fired) = hooked(&[leaf.shallow_clone()]);
    // 256 + 1 is 256 in bf16.
    for _ in 0..300 {
        leaf.sum(Kind::BFloat16).backward();
    }
    assert_eq!(Vec::<f32>::try_from(&gradient)?, [300.0; 5]);
    assert_eq!((leaf.grad().kind(), leaf.grad().data_ptr()), (Kind::Float, gradient.data_ptr()));
    assert_eq!(fired.lock().unwrap().len(), 300);
    Ok(())
}

fn a_hook_that_panics_ends_the_process_and_says_where() -> Outcome {
    let (code, _, told) = run("hook")?;
    assert_eq!(code, None, "ended by a signal");
    assert!(told.contains("a mistake in a hook") && told.contains("hook panicked at tensor 0"), "{told}");
    Ok(())
}

fn a_fault_carries_libtorch_s_reason() -> Outcome {
    let x = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
    let bias = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    let fault = bridge::linear(&x([2, 5]), &x([3, 4]), &bias).expect_err("5 columns by 4");
    assert!(fault.message.starts_with("linear: ") && fault.message.len() > 20, "{fault}");
    Ok(())
}

fn memory() {
    let megabytes = |n: i64| Tensor::zeros([n << 18], (Kind::Float, Device::Cpu));
    let early = megabytes(3);
    bridge::keep_memory();
    drop(early); // A block from before is not ours, and is given back as it came.
    let three = megabytes(3);
    let place = three.data_ptr() as usize;
    drop(three);
    let (two, again) = (megabytes(2), megabytes(3));
    assert_eq!(again.data_ptr() as usize, place, "the block is used again");
    let other = megabytes(3);
    assert_ne!(other.data_ptr() as usize, place, "one block, one owner");
    assert_eq!(again.sum(Kind::Float).double_value(&[]), 0.0);
    drop((two, again, other));
    // Freed by another thread than the one that asked.
    let away = megabytes(3);
    let place = away.data_ptr() as usize;
    std::thread::spawn(move || drop(away)).join().expect("a thread");
    assert_eq!(megabytes(3).data_ptr() as usize, place, "kept for whoever asks next");
}

fn kept_memory_serves_the_next_request_of_its_size() -> Outcome {
    let (code, told, why) = run("memory")?;
    assert_eq!(code, Some(0), "{told}{why}");
    Ok(())
}

fn opening_libtorch_s_cuda_half_makes_it_known() -> Outcome {
    let there = root().join(".deps/site/torch/lib/libtorch_cuda.so").exists();
    let (code, told, why) = run("cuda")?;
    assert_eq!(code, Some(0), "{why}");
    let wanted = if there { "opened true, runtime 13000" } else { "opened false, " };
    assert!(told.starts_with(wanted), "wanted `{wanted}`, got `{told}`");
    Ok(())
}

fn the_program_depends_on_no_cuda_library() -> Outcome {
    let output = Command::new("readelf").args(["-d", env!("CARGO_BIN_EXE_occlude")]).output()?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let needed: Vec<&str> = told.lines().filter(|line| line.contains("(NEEDED)")).collect();
    assert!(needed.iter().any(|line| line.contains("libtorch_cpu")), "the list is read: {told}");
    for line in needed {
        for word in ["cuda", "cudart", "nccl", "cublas", "cudnn", "nvrtc"] {
            assert!(!line.contains(word), "one program serves machines with and without CUDA, but it needs {line}");
        }
    }
    Ok(())
}
