//! Tests of hooks, gradients in a given buffer, the caching allocator, and opening the CUDA backend of libtorch.

use crate::support::child_process::run_case;
use crate::support::{Outcome, root};
use occlude::bridge::{self, GradHooks};
use std::process::Command;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

crate::trials![
    a_hook_fires_once_per_backward_in_backward_order,
    hooks_fire_for_a_backward_on_another_thread,
    no_hook_fires_for_an_unreached_leaf,
    gradients_accumulate_in_the_buffer,
    a_bf16_weight_has_an_fp32_gradient,
    a_panicking_hook_aborts_and_names_the_tensor,
    an_error_carries_the_message_of_libtorch,
    cached_memory_serves_the_next_request_of_its_size,
    open_cuda_registers_the_cuda_backend,
    the_program_links_no_cuda_library,
];

/// Runs a case that changes process-wide state. Returns the exit code.
pub fn case(name: &str) -> i32 {
    match name {
        "hook" => {
            let leaf = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let _hooks =
                GradHooks::register(&[leaf.shallow_clone()], |_| panic!("a mistake in a hook")).expect("hooks");
            leaf.sum(Kind::Float).backward();
        }
        "memory" => cache_memory(),
        "cuda" => println!("opened {}, runtime {}", bridge::load_cuda(), tch::utils::version_cudart()),
        other => panic!("no case {other}"),
    }
    0
}

fn leaves(n: usize) -> Vec<Tensor> {
    (0..n)
        .map(|i| Tensor::full([4, 4], 0.1 * (1 + i) as f64, (Kind::Float, Device::Cpu)).set_requires_grad(true))
        .collect()
}

/// Indices of leaves in the order in which their hooks fired.
type Fired = Arc<Mutex<Vec<usize>>>;

fn set_hooks(leaves: &[Tensor]) -> (GradHooks, Fired) {
    let fired = Fired::default();
    let visible = fired.clone();
    let hooks = GradHooks::register(leaves, move |leaf| visible.lock().expect("a list").push(leaf)).expect("hooks");
    (hooks, fired)
}

/// A chain that uses leaf 0 first and leaf 4 last.
fn chain(leaves: &[Tensor]) -> Tensor {
    let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
    let y = leaves.iter().fold(x, |x, w| x.matmul(w).tanh());
    y.sum(Kind::Float)
}

fn a_hook_fires_once_per_backward_in_backward_order() -> Outcome {
    let leaves = leaves(5);
    let (_hooks, fired) = set_hooks(&leaves);
    for pass in 1..=3 {
        chain(&leaves).backward();
        assert_eq!(*fired.lock().unwrap(), [4, 3, 2, 1, 0], "pass {pass}");
        fired.lock().unwrap().clear();
    }
    // The gradient of a leaf that is used twice is complete when both uses have been reached.
    (chain(&leaves) + leaves[4].sum(Kind::Float) + leaves[2].sum(Kind::Float)).backward();
    let mut order = std::mem::take(&mut *fired.lock().unwrap());
    assert_eq!(order.len(), 5, "each once: {order:?}");
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2, 3, 4]);
    Ok(())
}

fn hooks_fire_for_a_backward_on_another_thread() -> Outcome {
    let leaves = leaves(3);
    let (_hooks, fired) = set_hooks(&leaves);
    let loss = chain(&leaves);
    std::thread::spawn(move || loss.backward()).join().expect("a backward pass");
    assert_eq!(*fired.lock().unwrap(), [2, 1, 0]);
    Ok(())
}

fn no_hook_fires_for_an_unreached_leaf() -> Outcome {
    let leaves = leaves(4);
    let (_hooks, fired) = set_hooks(&leaves);
    chain(&[leaves[0].shallow_clone(), leaves[2].shallow_clone()]).backward();
    assert_eq!(*fired.lock().unwrap(), [2, 0]);
    Ok(())
}

fn gradients_accumulate_in_the_buffer() -> Outcome {
    let leaves = leaves(3);
    let expected: Vec<Tensor> = {
        chain(&leaves).backward();
        leaves.iter().map(|leaf| leaf.grad().copy()).collect()
    };
    let buffer = Tensor::zeros([3 * 20], (Kind::Float, Device::Cpu));
    let part = |i: usize| buffer.narrow(0, 20 * i as i64 + 2, 16).view([4, 4]);
    for (i, leaf) in leaves.iter().enumerate() {
        bridge::set_grad(leaf, &part(i))?;
    }
    for pass in 1..=2 {
        chain(&leaves).backward();
        for (i, leaf) in leaves.iter().enumerate() {
            assert_eq!(leaf.grad().data_ptr(), part(i).data_ptr(), "pass {pass}: leaf {i} has another gradient");
            let difference = (part(i) - &expected[i] * pass).abs().max().double_value(&[]);
            assert!(difference <= 1e-6, "pass {pass}: leaf {i} is off by {difference:e}");
        }
    }
    let _ = buffer.shallow_clone().zero_();
    chain(&leaves).backward();
    assert!((part(1) - &expected[1]).abs().max().double_value(&[]) <= 1e-6, "zeroed in place");
    assert_eq!(
        buffer.narrow(0, 18, 4).abs().sum(Kind::Float).double_value(&[]),
        0.0,
        "gaps between gradients are unchanged"
    );
    Ok(())
}

fn a_bf16_weight_has_an_fp32_gradient() -> Outcome {
    let leaf = Tensor::ones([5], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    let gradient = Tensor::zeros([5], (Kind::Float, Device::Cpu));
    bridge::set_grad(&leaf, &gradient)?;
    let (_hooks, fired) = set_hooks(&[leaf.shallow_clone()]);
    // 256 + 1 is 256 in bf16.
    for _ in 0..300 {
        leaf.sum(Kind::BFloat16).backward();
    }
    assert_eq!(Vec::<f32>::try_from(&gradient)?, [300.0; 5]);
    assert_eq!((leaf.grad().kind(), leaf.grad().data_ptr()), (Kind::Float, gradient.data_ptr()));
    assert_eq!(fired.lock().unwrap().len(), 300);
    Ok(())
}

fn a_panicking_hook_aborts_and_names_the_tensor() -> Outcome {
    let (code, _, output) = run_case("hook")?;
    assert_eq!(code, None, "ended by a signal");
    assert!(output.contains("a mistake in a hook") && output.contains("hook panicked at tensor 0"), "{output}");
    Ok(())
}

fn an_error_carries_the_message_of_libtorch() -> Outcome {
    let x = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
    let bias = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    let error = bridge::linear(&x([2, 5]), &x([3, 4]), &bias).expect_err("5 columns by 4");
    assert!(error.message.starts_with("linear: ") && error.message.len() > 20, "{error}");
    Ok(())
}

fn cache_memory() {
    let megabytes = |n: i64| Tensor::zeros([n << 18], (Kind::Float, Device::Cpu));
    let early = megabytes(3);
    bridge::install_caching_allocator();
    drop(early); // A block from before `keep_memory` is freed as usual.
    let three = megabytes(3);
    let address = three.data_ptr() as usize;
    drop(three);
    let two = megabytes(2);
    let second = megabytes(3);
    assert_eq!(second.data_ptr() as usize, address, "the block is used again");
    let other = megabytes(3);
    assert_ne!(other.data_ptr() as usize, address, "one block, one owner");
    assert_eq!(second.sum(Kind::Float).double_value(&[]), 0.0);
    drop((two, second, other));
    // Freed by another thread than the one that allocated it.
    let away = megabytes(3);
    let address = away.data_ptr() as usize;
    std::thread::spawn(move || drop(away)).join().expect("a thread");
    assert_eq!(megabytes(3).data_ptr() as usize, address, "cached for the next request");
}

fn cached_memory_serves_the_next_request_of_its_size() -> Outcome {
    let (code, output, why) = run_case("memory")?;
    assert_eq!(code, Some(0), "{output}{why}");
    Ok(())
}

fn open_cuda_registers_the_cuda_backend() -> Outcome {
    let exists = root().join(".deps/site/torch/lib/libtorch_cuda.so").exists();
    let (code, output, why) = run_case("cuda")?;
    assert_eq!(code, Some(0), "{why}");
    let expected = if exists { "opened true, runtime 13000" } else { "opened false, " };
    assert!(output.starts_with(expected), "wanted `{expected}`, got `{output}`");
    Ok(())
}

fn the_program_links_no_cuda_library() -> Outcome {
    let output = Command::new("readelf").args(["-d", env!("CARGO_BIN_EXE_occlude")]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let needed: Vec<&str> = text.lines().filter(|line| line.contains("(NEEDED)")).collect();
    assert!(needed.iter().any(|line| line.contains("libtorch_cpu")), "the list is read: {text}");
    for line in needed {
        for word in ["cuda", "cudart", "nccl", "cublas", "cudnn", "nvrtc"] {
            assert!(!line.contains(word), "one program serves machines with and without CUDA, but it needs {line}");
        }
    }
    Ok(())
}
