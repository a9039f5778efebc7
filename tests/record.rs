//! What libtorch runs, as the recorder notes it.

use crate::bridge::run;
use crate::support::Outcome;
use occlude::bridge::record::{Recorder, Span, scope};
use occlude::bridge::{keep_memory, memory_in_use};
use tch::{Device, Kind, Tensor};

crate::trials![
    operations_are_noted_in_order_with_their_overloads,
    a_backward_pass_is_noted,
    spans_of_our_own_hold_what_runs_inside,
    other_threads_and_what_comes_after_are_not_noted,
    living_tensors_are_counted,
];

fn recorded(work: impl FnOnce()) -> Vec<Span> {
    let recorder = Recorder::start().expect("a recorder");
    work();
    recorder.stop()
}

fn names(spans: &[Span]) -> Vec<&str> {
    spans.iter().map(|span| span.name.as_str()).collect()
}

fn ones() -> Tensor {
    Tensor::ones([8, 8], (Kind::Float, Device::Cpu))
}

fn operations_are_noted_in_order_with_their_overloads() -> Outcome {
    let x = ones();
    let spans = recorded(|| drop((&x + &x).matmul(&x).to_kind(Kind::BFloat16)));
    let names = names(&spans);
    let at = |name: &str| names.iter().position(|found| *found == name).unwrap_or_else(|| panic!("{name}: {names:?}"));
    let order = ["aten::add.Tensor", "aten::matmul", "aten::to.dtype_layout"].map(at);
    assert!(order.is_sorted(), "{names:?}");
    // A product is made of another operation, inside it.
    assert!(spans[at("aten::matmul")].holds(&spans[at("aten::mm")]), "{spans:?}");
    assert!(!spans[at("aten::add.Tensor")].holds(&spans[at("aten::mm")]), "{spans:?}");
    Ok(())
}

fn a_backward_pass_is_noted() -> Outcome {
    let w = ones().set_requires_grad(true);
    let loss = ones().matmul(&w).tanh().sum(Kind::Float);
    let spans = recorded(|| loss.backward());
    assert!(names(&spans).contains(&"aten::tanh_backward"), "{:?}", names(&spans));
    Ok(())
}

fn spans_of_our_own_hold_what_runs_inside() -> Outcome {
    let x = ones();
    let spans = recorded(|| {
        let inner = scope("inner");
        let y = x.tanh();
        drop(inner);
        drop(y.sin());
    });
    let of = |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:?}"));
    assert!(of("inner").holds(of("aten::tanh")) && !of("inner").holds(of("aten::sin")));
    assert!(of("inner").start_ns < of("inner").end_ns);
    drop(scope("nobody looks"));
    Ok(())
}

fn other_threads_and_what_comes_after_are_not_noted() -> Outcome {
    let open = recorded(|| {
        std::thread::spawn(|| drop(ones().cos())).join().expect("a thread");
        std::mem::forget(scope("never ended"));
    });
    assert_eq!(names(&open), [""; 0], "neither another thread's, nor what has not ended");
    drop(ones().cos());
    let spans = recorded(|| drop(ones().exp()));
    assert!(!names(&spans).contains(&"aten::cos") && names(&spans).contains(&"aten::exp"), "{:?}", names(&spans));
    Ok(())
}

/// The cases that want a process of their own. Returns the exit code.
pub fn case(name: &str) -> i32 {
    match name {
        "record-memory" => {
            keep_memory();
            let empty = memory_in_use();
            let small = ones();
            let large = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
            let both = memory_in_use() - empty;
            drop(small);
            let one = memory_in_use() - empty;
            drop(large);
            println!("{both} {one} {}", memory_in_use() - empty);
            0
        }
        other => panic!("no case {other}"),
    }
}

fn living_tensors_are_counted() -> Outcome {
    let (code, told, why) = run("record-memory")?;
    assert_eq!(code, Some(0), "{why}");
    let bytes: Vec<usize> = told.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    let [both, one, none] = bytes[..] else { panic!("{told}") };
    assert!((4 << 20..(4 << 20) + 65536).contains(&one), "{told}");
    assert!(both >= one + 256 && both < one + 1024 && none == 0, "{told}");
    Ok(())
}
