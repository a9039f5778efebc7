//! Tests of the recorder of libtorch operators.

use crate::support::Outcome;
use crate::support::child_process::run_case;
use occlude::bridge::record::{Recorder, TraceSpan, scope};
use occlude::bridge::{allocated_bytes, install_caching_allocator};
use tch::{Device, Kind, Tensor};

crate::trials![
    operators_are_recorded_in_order_with_overloads,
    the_backward_pass_is_recorded,
    custom_spans_contain_the_operators_inside,
    other_threads_and_later_operators_are_not_recorded,
    live_tensors_are_counted,
];

fn recorded(work: impl FnOnce()) -> Vec<TraceSpan> {
    let recorder = Recorder::start().expect("a recorder");
    work();
    recorder.stop()
}

fn names(spans: &[TraceSpan]) -> Vec<&str> {
    spans.iter().map(|span| span.name.as_str()).collect()
}

fn ones() -> Tensor {
    Tensor::ones([8, 8], (Kind::Float, Device::Cpu))
}

fn operators_are_recorded_in_order_with_overloads() -> Outcome {
    let x = ones();
    let spans = recorded(|| drop((&x + &x).matmul(&x).to_kind(Kind::BFloat16)));
    let names = names(&spans);
    let position_of =
        |name: &str| names.iter().position(|found| *found == name).unwrap_or_else(|| panic!("{name}: {names:?}"));
    let order = ["aten::add.Tensor", "aten::matmul", "aten::to.dtype_layout"].map(position_of);
    assert!(order.is_sorted(), "{names:?}");
    // `matmul` calls `mm` inside.
    assert!(spans[position_of("aten::matmul")].contains(&spans[position_of("aten::mm")]), "{spans:?}");
    assert!(!spans[position_of("aten::add.Tensor")].contains(&spans[position_of("aten::mm")]), "{spans:?}");
    Ok(())
}

fn the_backward_pass_is_recorded() -> Outcome {
    let w = ones().set_requires_grad(true);
    let loss = ones().matmul(&w).tanh().sum(Kind::Float);
    let spans = recorded(|| loss.backward());
    assert!(names(&spans).contains(&"aten::tanh_backward"), "{:?}", names(&spans));
    Ok(())
}

fn custom_spans_contain_the_operators_inside() -> Outcome {
    let x = ones();
    let spans = recorded(|| {
        let inner = scope("inner");
        let y = x.tanh();
        drop(inner);
        drop(y.sin());
    });
    let span_of =
        |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:?}"));
    assert!(span_of("inner").contains(span_of("aten::tanh")) && !span_of("inner").contains(span_of("aten::sin")));
    assert!(span_of("inner").start_ns < span_of("inner").end_ns);
    drop(scope("nobody looks"));
    Ok(())
}

fn other_threads_and_later_operators_are_not_recorded() -> Outcome {
    let open = recorded(|| {
        std::thread::spawn(|| drop(ones().cos())).join().expect("a thread");
        std::mem::forget(scope("never ended"));
    });
    assert_eq!(names(&open), [""; 0], "no operators of other threads, and no unfinished ones");
    drop(ones().cos());
    let spans = recorded(|| drop(ones().exp()));
    assert!(!names(&spans).contains(&"aten::cos") && names(&spans).contains(&"aten::exp"), "{:?}", names(&spans));
    Ok(())
}

/// Runs a case that needs its own process. Returns the exit code.
pub fn case(name: &str) -> i32 {
    match name {
        "record-memory" => {
            install_caching_allocator();
            let empty = allocated_bytes();
            let small = ones();
            let large = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
            let both = allocated_bytes() - empty;
            drop(small);
            let one = allocated_bytes() - empty;
            drop(large);
            println!("{both} {one} {}", allocated_bytes() - empty);
            0
        }
        other => panic!("no case {other}"),
    }
}

fn live_tensors_are_counted() -> Outcome {
    let (code, output, why) = run_case("record-memory")?;
    assert_eq!(code, Some(0), "{why}");
    let bytes: Vec<usize> = output.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    let [both, one, none] = bytes[..] else { panic!("{output}") };
    assert!((4 << 20..(4 << 20) + 65536).contains(&one), "{output}");
    assert!(both >= one + 256 && both < one + 1024 && none == 0, "{output}");
    Ok(())
}
